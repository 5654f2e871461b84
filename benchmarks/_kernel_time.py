"""What MoE layers take on a GPU, over what its matrix products and its copies take at best."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import _bench
import _expert_mlp
import _kernel_cost
import _tell
from _bench import Case, Contender
from coterie.ops import expert_mlp, grouped_matmul, route_topk
from coterie.report import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Timer = Callable[[Callable[[], Any]], float]  # seconds of a function
TORCH_GROUPED = "torch grouped_mm"
ROUNDS, REPETITIONS = 5, 5
CEILING_SIZE = 8192


def gpu_timer(run: Callable[[], Any]) -> float:
    """The median over a tenth of a second, caches flushed in between, of seconds between events on the GPU."""
    import triton

    return triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median") / 1e3


@dataclass(frozen=True)
class Ceilings:
    """Measured on this GPU: FLOP/s of one large product in the dtype, and bytes/s of one large copy, both ways."""

    flops: float
    bandwidth: float


@dataclass
class Timed:
    """A contender; seconds by round, of which the median counts. GB/s: of bytes that no implementation can avoid."""

    name: str
    labels: dict[str, Any]
    useful_flops: int
    least_bytes: int
    error: float = 0.0
    skipped: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run(options, facts: dict[str, Any], timer: Timer = gpu_timer) -> list[Timed]:
    """Times every shape, forward and with backward; writes tables, JSON and PNG.

    Raises:
        WrongResult: a contender computes something else than float64 does.
    """
    dtype = getattr(torch, options.dtype)
    repeats = repeatability(dtype, options.device)
    for name, differing in repeats.items():
        said = "the same bits every time" if not differing else f"DIFFERS in {', '.join(differing)}"
        print(f"{name}, {REPETITIONS} runs: {said}")
    ceilings = measure_ceilings(dtype, options.device, timer)
    print(f"ceilings, measured: {ceilings.flops / 1e12:.1f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s\n")
    rows: list[Timed] = []
    cases = [(shape, passes) for shape in options.shapes for passes in (_expert_mlp.FORWARD, _expert_mlp.BOTH)]
    for shape, passes in tqdm(cases, unit="case", disable=None):
        here = time_case(shape, passes, options, timer)
        rows += here
        tqdm.write(format_case(here, ceilings))
        content = {
            "benchmark": "kernel_cost",
            "machine": facts,
            "ceilings": asdict(ceilings),
            "differs between runs": repeats,
            "rows": [asdict(row) for row in rows],
        }
        _tell.write_json(options.out / "kernel_time.json", json.loads(json.dumps(content)))
    print(options.out / "kernel_time.json")
    print(_tell.write_chart(options.out / "kernel_time.png", lambda: draw(rows, ceilings, facts["device"])))
    return rows


def measure_ceilings(dtype: torch.dtype, device: str, timer: Timer) -> Ceilings:
    size = CEILING_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / timer(lambda: left @ right)
    source = torch.empty(4 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * source.numel() / timer(lambda: target.copy_(source)))


def time_case(shape: _kernel_cost.Shape, passes: str, options, timer: Timer) -> list[Timed]:
    """Checks the contenders of one shape, then times them in turns."""
    tokens, dim, hidden_dim, num_experts, top_k = shape
    both = passes == _expert_mlp.BOTH
    parameters = _expert_mlp.make_parameters(shape, getattr(torch, options.dtype), options)
    case = _expert_mlp.make_case(shape, options.dtype, "balanced", passes, parameters, options)
    inputs = case.make_inputs(options.seed)
    useful = 6 * tokens * top_k * dim * hidden_dim * (3 if both else 1)
    matrices = 3 * min(num_experts, tokens * top_k) * dim * hidden_dim
    size = getattr(torch, options.dtype).itemsize
    # x and y and the matrices once; backward reads x, the gradient of y and the matrices and writes two gradients.
    least = size * (2 * tokens * dim + matrices + (3 * tokens * dim + 2 * matrices if both else 0))
    labels = dict(case.labels)
    expected: dict[Callable, Any] = {}
    rows, runs = [], []
    for contender in _contenders(case, parameters, both):
        is_dense = contender.name == _expert_mlp.DENSE
        row = Timed(contender.name, labels, useful, 0 if is_dense else least, skipped=contender.skip)
        rows.append(row)
        if row.skipped:
            continue
        try:
            results = contender.run(inputs)
        except RuntimeError as error:
            if not contender.optional:
                raise
            row.skipped = f"raises {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if contender.expected not in expected:
            expected[contender.expected] = contender.expected(inputs)
        row.error = _bench.check(contender, results, expected[contender.expected], where=case.title)
        runs.append((row, contender))
    for _ in range(ROUNDS):
        for row, contender in runs:
            row.seconds.append(timer(lambda contender=contender: contender.run(inputs)))
    return rows


def _contenders(case: Case, parameters: _expert_mlp.Parameters, both: bool) -> list[Contender]:
    """The CPU benchmark's, but for two of its dense ones; torch's grouped_mm by itself; and Liger's."""
    others = (_expert_mlp.DENSE_FLOAT32, _expert_mlp.DENSE_PARAMS)
    kept = [contender for contender in case.contenders if contender.name not in others]
    ours = next(contender for contender in kept if contender.name == _expert_mlp.OURS)
    gate_up, down = parameters.gate_up, parameters.down

    def leaves(inputs) -> dict[str, Tensor]:
        return {"x": inputs.x, "gate_up": gate_up, "down": down, "weights": inputs.weights}

    def by_torch(inputs) -> Tensor:
        return _torch_grouped(inputs.x, inputs.expert_ids, inputs.weights, gate_up, down)

    kept.append(replace(ours, name=TORCH_GROUPED, run=_expert_mlp.runner(by_torch, leaves, both), optional=True))
    liger = _kernel_cost.liger_fused_moe(tuned=True)
    if liger is None:
        return [*kept, replace(ours, name=_kernel_cost.LIGER, skip="not installed", optional=True)]

    def by_liger(inputs) -> Tensor:
        return liger(inputs.x, gate_up, down, inputs.expert_ids.int(), inputs.weights)

    run = _expert_mlp.runner(by_liger, leaves, both)
    return [*kept, replace(ours, name=_kernel_cost.LIGER, run=run, optional=True)]


def _torch_grouped(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order = expert_ids.flatten().argsort(stable=True)
    tokens = order // expert_ids.shape[1]
    ends = torch.bincount(expert_ids.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[tokens], gate_up.mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, tokens, rows)


def repeatability(dtype: torch.dtype, device: str, impl: str | None = None) -> dict[str, list[str]]:
    """Of each op, forward and backward on the same inputs: which results were not the same bits in every run."""
    tokens, dim, hidden_dim, num_experts, top_k = 512, 256, 128, 16, 4
    problem = _kernel_cost.make_problem((tokens, dim, hidden_dim, num_experts, top_k), dtype, 0)
    problem = _kernel_cost.Problem(
        *(t.detach().to(device).requires_grad_(t.requires_grad) for t in vars(problem).values())
    )
    logits = torch.randn(tokens, num_experts, device=device).requires_grad_()
    counts = torch.full((num_experts,), tokens // num_experts, device=device)

    def mlp(recompute: bool) -> dict[str, Tensor]:
        y = expert_mlp(
            problem.x,
            problem.expert_ids,
            problem.weights,
            problem.gate_up,
            problem.down,
            recompute=recompute,
            impl=impl,
        )
        return _kernel_cost.named(y, torch.autograd.grad(y, problem.leaves, problem.grad))

    def route() -> dict[str, Tensor]:
        routing = route_topk(logits, top_k, normalize=True, impl=impl)
        (grad,) = torch.autograd.grad(routing.weights, logits, torch.ones_like(routing.weights))
        return {"expert_ids": routing.expert_ids, "weights": routing.weights, "grad logits": grad}

    def product() -> dict[str, Tensor]:
        y = grouped_matmul(problem.x, problem.gate_up, counts, impl=impl)
        grads = torch.autograd.grad(y, (problem.x, problem.gate_up), torch.ones_like(y))
        return {"y": y, "grad x": grads[0], "grad weight": grads[1]}

    ops = {
        "route_topk": route,
        "grouped_matmul": product,
        "expert_mlp": lambda: mlp(False),
        "expert_mlp, recompute": lambda: mlp(True),
    }
    return {name: _differing(op) for name, op in ops.items()}


def _differing(op: Callable[[], dict[str, Tensor]]) -> list[str]:
    first = op()
    others = [op() for _ in range(REPETITIONS - 1)]
    return [name for name, value in first.items() if not all(torch.equal(value, other[name]) for other in others)]


def format_case(rows: Sequence[Timed], ceilings: Ceilings) -> str:
    """Measured: milliseconds, useful TFLOP/s and unavoidable GB/s, also as parts of the ceilings."""
    header = ["measured", "ms", "TFLOP/s", "of matmul", "GB/s at least", "of copy", "× dense", "error"]
    ran = [row for row in rows if row.seconds]
    dense = next(row.median for row in ran if row.name == _expert_mlp.DENSE)
    cells = []
    for row in ran:
        flops, rate = row.useful_flops / row.median, row.least_bytes / row.median
        moved = [f"{rate / 1e9:.0f}", f"{rate / ceilings.bandwidth:.0%}"] if rate else ["–", "–"]
        cells.append(
            [
                row.name,
                f"{row.median * 1e3:.3f}",
                f"{flops / 1e12:.1f}",
                f"{flops / ceilings.flops:.0%}",
                *moved,
                f"{dense / row.median:.2f}",
                f"{row.error:.0e}",
            ]
        )
    skipped = [f"{row.name}: skipped: {row.skipped}" for row in rows if row.skipped]
    return "\n".join([_bench.title(rows[0].labels), format_table(header, cells), *skipped, ""])


def draw(rows: Sequence[Timed], ceilings: Ceilings, device: str) -> "Figure":
    """Useful TFLOP/s of each contender, a panel per shape and pass; the dashed line is the measured product's.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.figure

    titles = list(dict.fromkeys(_bench.title(row.labels) for row in rows))
    height = 1.0 + 2.0 * -(-len(titles) // 2)
    figure = matplotlib.figure.Figure(figsize=(12, height), dpi=110, layout="constrained")
    figure.suptitle(f"Expert MLPs on {device}: useful TFLOP/s, measured", x=0.01, ha="left", weight="bold")
    panels = figure.subplots(-(-len(titles) // 2), 2, squeeze=False)
    for axes in panels.flat[len(titles) :]:
        axes.set_axis_off()
    for axes, title in zip(panels.flat, titles, strict=False):
        here = [row for row in rows if _bench.title(row.labels) == title and row.seconds]
        rates = [row.useful_flops / row.median / 1e12 for row in here]
        axes.barh(range(len(here)), rates, 0.7, color=_tell.COLOURS[0])
        for at, rate in enumerate(rates):
            axes.text(rate, at, f" {rate:.3g}", size=7, va="center")
        axes.axvline(ceilings.flops / 1e12, color="#777777", linewidth=0.9, linestyle=(0, (2, 3)))
        axes.set_yticks(range(len(here)), [row.name for row in here], size=8)
        axes.set_ylim(len(here) - 0.5, -0.5)
        axes.set_title(title, loc="left", size=9, weight="bold")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
