"""A training step of LoRA on frozen experts: coterie's beside PEFT's `target_parameters`, in the same model.

PEFT forms W + s·B·A, a second copy of every expert, and the gradient to it, which is as large again. coterie adds the
update to what the routed rows made of W and forms neither. The model is transformers' qwen3_moe, as it is made for
training; PEFT runs on each experts implementation there is, coterie's own among them.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm
from tyro.conf import arg

import _bench
import _tell
from _bench import Case, Contender, Result
from coterie.modules import add_lora
from coterie.modules.lora import low_ranks
from coterie.report import format_table, human_bytes

Shape = tuple[int, int, int, int, int]  # T, D, F, E, K
SHAPES: tuple[Shape, ...] = (
    (512, 512, 256, 32, 4),
    (2048, 512, 256, 32, 4),
    (256, 1024, 768, 32, 4),
    (1024, 1024, 768, 32, 4),
)
OURS, OURS_SHARED = "coterie", "coterie, A shared"
PEFT_KINDS = {"PEFT coterie": "coterie", "PEFT grouped_mm": "grouped_mm", "PEFT eager": "eager"}
BASELINE = "PEFT grouped_mm"  # what transformers chooses by itself

# What the library means to reach over the best of PEFT's: times as fast, and its peak memory over theirs.
SPEED_BAR, PEAK_BAR = 2.0, 0.6
# Of the loss and of gradients. They tell right from wrong: a router in bfloat16 sends some tokens elsewhere than one in
# float64 does, which makes up most of the error; how exact ours is, the tests say.
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (2e-2, 0.5)}


@dataclass
class Options(_bench.Options):
    """Compare coterie's LoRA on experts with PEFT's target_parameters: forward, loss and backward of a model.

    T tokens in sequences of at most 512, D model width, F expert hidden width, E experts, K experts per token. Ratios
    are medians over interleaved rounds, each with fresh tokens. With no options: four shapes and two dtypes, in about
    ten minutes on two slow cores and in 8 GB.
    """

    shape: Annotated[
        tuple[Shape, ...],
        tyro.conf.UseAppendAction,
        arg(metavar="T D F E K", help_behavior_hint="(repeatable; default: 4 shapes)"),
    ] = ()
    """Measure this shape instead of the default ones."""
    dtypes: Annotated[
        tuple[Literal["float32", "bfloat16"], ...], arg(help_behavior_hint="(default: both; quick: float32)")
    ] = ()
    """Of the frozen weights; factors are float32 beside them."""
    layers: Annotated[int, arg(metavar="INT")] = 2
    """Of the model."""
    rank: Annotated[int, arg(metavar="INT")] = 16
    """R."""

    def check(self) -> None:
        super().check()
        for shape in self.shape:
            if min(shape) < 1 or shape[4] > shape[3] or shape[1] % 64:
                got = " ".join(map(str, shape))
                raise ValueError(
                    f"--shape: got {got}, must be T D F E K, all positive, with K at most E and D a multiple of 64"
                )
            if shape[0] > 512 and shape[0] % 512:
                raise ValueError(f"--shape: got T = {shape[0]}, must be at most 512 or a multiple of it")
        for name, value in (("layers", self.layers), ("rank", self.rank)):
            if value < 1:
                raise ValueError(f"--{name}: got {value}, must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/bench_lora.py")
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        print(f"bench_lora: {error.name} is not installed: there is nothing to compare with", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
    cases = [
        (shape, dtype)
        for shape in options.shape or (SHAPES[:1] if options.quick else SHAPES)
        for dtype in options.dtypes or (("float32",) if options.quick else ("bfloat16", "float32"))
    ]
    facts = _tell.machine(options.device)
    print(_tell.format_machine(facts) + "\n")
    results: list[Result] = []
    weights: dict[str, int] = {}  # bytes of the frozen model, by case
    try:
        with tqdm(cases, unit="case", disable=None) as bar:
            for shape, dtype in bar:
                case, size = make_case(shape, dtype, options)
                weights[case.title] = size
                result = _bench.measure(case, options, say=partial(_say, bar, case.title))
                results.append(result)
                tqdm.write(_tell.format_result(result, {}))
                _tell.write_json(
                    options.out / "lora.json",
                    {
                        "benchmark": "lora",
                        "machine": facts,
                        "seed": options.seed,
                        "layers": options.layers,
                        "rank": options.rank,
                        "cases": [each.to_dict() for each in results],
                        "bars": bars(results, weights),
                    },
                )
    except _bench.WrongResult as error:
        print(f"bench_lora: wrong result: {error}", file=sys.stderr)
        return 1
    print(format_bars(results, weights))
    print(f"\n{options.out / 'lora.json'}")
    subtitle = f"medians and quartiles of interleaved rounds; {facts['cpu']}, {facts['threads']} threads"
    print(
        _tell.write_chart(
            options.out / "lora.png",
            lambda: _tell.bar_chart(
                results,
                column=lambda result: "T {T}, D {D}, F {F}, E {E}, K {K}".format(**result.labels),
                row=lambda result: "forward and backward",
                series=lambda result: result.labels["dtype"],
                title="LoRA on experts: speed over PEFT on transformers' grouped_mm",
                subtitle=subtitle,
            ),
        )
    )
    return 0


def _say(bar: tqdm, title: str, text: str) -> None:
    bar.set_description(f"{title}: {text}")


# --- contenders ---


def make_case(shape: Shape, dtype: str, options: Options) -> tuple[Case, int]:
    """The contenders of one table, on the same frozen memory, and how many bytes that is."""
    tokens = shape[0]
    base = _make_model(shape, getattr(torch, dtype), options)
    length = min(tokens, 512)

    def make_inputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, base.config.vocab_size, (tokens // length, length), generator=generator).to(
            options.device
        )

    ours = _ours(base, options, "none")
    factors = {name: factor.detach() for name, factor in ours.factors.items()}
    # Right is what PEFT computes in float64 on transformers' plainest experts.
    wide = _twin(base, "eager", torch.float64)
    truth = _peft(wide, "eager", options, factors)
    shared = _ours(base, options, "a")
    shared_truth = _peft(wide, "eager", options, _unshared(shared.factors, shape[3]))
    loss, gradients = TOLERANCES[dtype]

    def contender(name: str, model: "_Model", expected: Callable, **more) -> Contender:
        tolerances = {"loss": loss, **dict.fromkeys(model.factors, gradients)}
        return Contender(name, model.step, expected, tolerances, tuple(model.module.parameters()), **more)

    contenders = [
        contender(OURS, ours, truth.step),
        contender(OURS_SHARED, shared, partial(_shared_step, shared_truth)),
    ]
    for name, kind in PEFT_KINDS.items():
        contenders.append(contender(name, _peft(base, kind, options, factors), truth.step, optional=name != BASELINE))
    labels = dict(zip("TDFEK", shape, strict=True)) | {"dtype": dtype}
    return Case(labels, BASELINE, contenders, make_inputs, warm_up=True), sum(p.nbytes for p in base.parameters())


@dataclass(frozen=True)
class _Model:
    """A model with an adapter, and its factors by "<matrix>.a" and ".b", read as [E, R, I] and [E, O, R]."""

    module: nn.Module
    factors: Mapping[str, Tensor]
    read: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient

    def step(self, ids: Tensor) -> dict[str, Tensor]:
        loss = self.module(input_ids=ids, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, tuple(self.factors.values()))
        named = zip(self.factors, gradients, strict=True)
        return {"loss": loss.detach()[None], **{name: self.read(name, gradient) for name, gradient in named}}


def _make_model(shape: Shape, dtype: torch.dtype, options: Options) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from coterie.interop import register_hf

    register_hf()
    _, dim, hidden_dim, num_experts, top_k = shape
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1024,
        hidden_size=dim,
        intermediate_size=hidden_dim,
        moe_intermediate_size=hidden_dim,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=options.layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=max(dim // 256, 1),
        head_dim=64,
    )
    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(config).to(options.device, dtype).train()


def _twin(base: nn.Module, implementation: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Another model over the same memory, or over a copy of another dtype."""
    shared = {} if dtype else {id(t): t for t in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    model.config = copy.deepcopy(base.config)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = model.config
    if dtype:
        model.to(dtype)
    model.set_experts_implementation(implementation)
    return model.requires_grad_(False)


def _ours(base: nn.Module, options: Options, shared: str) -> _Model:
    model = _twin(base, "coterie")
    add_lora(model, options.rank, 2 * options.rank, shared=shared)
    torch.manual_seed(options.seed + 1)
    factors = {}
    for site, low in low_ranks(model, "default").items():
        nn.init.normal_(low.b, std=0.02)  # an update that is not zero, so that A has a gradient
        factors |= {f"{site}.a": low.a, f"{site}.b": low.b}
    return _Model(model, factors)


def _peft(base: nn.Module, kind: str, options: Options, factors: Mapping[str, Tensor]) -> _Model:
    """PEFT's adapter with the given factors. It keeps A [E·R, I] expert by expert and B [O, R·E] rank by rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(_twin(base, kind), config)
    experts, own = base.config.num_experts, {}
    for prefix, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            site = prefix.removeprefix("base_model.model.").replace(".base_layer", "")
            own[f"{site}.{module.parameter_name}.a"] = module.lora_A["default"].weight
            own[f"{site}.{module.parameter_name}.b"] = module.lora_B["default"].weight

    def read(name: str, t: Tensor) -> Tensor:
        return t.unflatten(0, (experts, -1)) if name.endswith(".a") else t.unflatten(1, (-1, experts)).permute(2, 0, 1)

    with torch.no_grad():
        for name, factor in factors.items():
            read(name, own[name]).copy_(factor)
    return _Model(model, {name: own[name] for name in factors}, read)


def _unshared(factors: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    return {name: factor.detach().expand(num_experts, -1, -1) for name, factor in factors.items()}


def _shared_step(model: _Model, ids: Tensor) -> dict[str, Tensor]:
    """The gradient to a factor that experts share is the sum of theirs."""
    return {name: g.sum(0, keepdim=True) if name.endswith(".a") else g for name, g in model.step(ids).items()}


# --- bars ---


def bars(results: Sequence[Result], weights: Mapping[str, int]) -> list[dict]:
    """Every figure that has a bar: coterie over the best of PEFT's, in speed and in peak memory.

    Peaks are the step's own, without the weights that lie there anyway; and with them, which has no bar.
    """
    found = []
    for result in results:
        labels = result.labels
        best = result.fastest(list(PEFT_KINDS))
        ratio = result.ratio(OURS, best) if best else None
        if ratio is None:
            continue
        value = ratio.median
        found.append(
            {**labels, "what": "speed", "over": best, "value": value, "bar": SPEED_BAR, "met": value >= SPEED_BAR}
        )
        peaks = {name: result.rows[name].peak_bytes for name in PEFT_KINDS if result.rows[name].seconds}
        least, own = min(peaks, key=peaks.get), result.rows[OURS].peak_bytes
        value = own / peaks[least]
        found.append(
            {**labels, "what": "peak", "over": least, "value": value, "bar": PEAK_BAR, "met": value <= PEAK_BAR}
        )
        value = (own + weights[result.title]) / (peaks[least] + weights[result.title])
        found.append({**labels, "what": "peak and weights", "over": least, "value": value, "bar": None, "met": None})
    return found


def format_bars(results: Sequence[Result], weights: Mapping[str, int]) -> str:
    """One line a case: how coterie compares with the fastest and with the leanest of PEFT's."""
    found = bars(results, weights)
    rows = []
    for result in results:
        own = [entry for entry in found if all(entry[key] == value for key, value in result.labels.items())]
        cells = [f"{_judged(entry)} ({entry['over'].removeprefix('PEFT ')})" for entry in own]
        rows.append([result.title, *(cells or ["–"] * 3), human_bytes(weights[result.title])])
    header = ["coterie over the best of PEFT's", "speed", "peak", "peak and weights", "weights"]
    judged = [entry["met"] for entry in found if entry["met"] is not None]
    return f"{format_table(header, rows)}\n{sum(judged)} of {len(judged)} met"


def _judged(entry: dict) -> str:
    said = f"{entry['value']:.2f}"
    if entry["met"] is None:
        return said
    good, bad = ("≥", "<") if entry["what"] == "speed" else ("≤", ">")
    return f"{said} {good if entry['met'] else bad} {entry['bar']:.1f} {'met' if entry['met'] else 'MISSED'}"


if __name__ == "__main__":
    sys.exit(main())
