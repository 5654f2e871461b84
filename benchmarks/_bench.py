"""The harness of every benchmark: right before fast, contenders in turns, ratios rather than times.

A case is timed in rounds. In each round every contender runs once, on the same fresh inputs, in a new random order; on
a machine shared with others a time means nothing, but what slows one contender of a round down slows its neighbours
too, so the median over rounds of the ratio of two contenders holds still. Before the clock starts, each contender's
results are compared with float64; a wrong one ends the benchmark.
"""

import inspect
import os
import random
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

# The profiler's C++ side announces its start and stop on stderr, in the middle of the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tyro.conf import arg

from coterie.training.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
# Rounds of one case: enough for quartiles, and no more than they need.
MIN_ROUNDS, MAX_ROUNDS = 3, 200

_NO_PAIRS = (tyro.conf.FlagCreatePairsOff,)  # no --no-quick

Inputs = Any  # what a case's make_inputs returns


@dataclass
class Options:
    """Options that all benchmarks share; each adds its own."""

    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """A first impression in less than two minutes on two slow cores."""
    seconds_per_case: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="(default: 10; quick: 3)")] = None
    """Time one case's rounds this long (three rounds at least, 200 at most), checks not included."""
    limit_seconds: Annotated[float, arg(metavar="FLOAT")] = 10.0
    """Skip a contender that needs longer than this once."""
    limit_gib: Annotated[float, arg(metavar="FLOAT")] = 4.0
    """Skip a contender that would allocate more than this at once."""
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: torch's choice)")] = None
    """Of torch's CPU operations."""
    default_malloc: Annotated[bool, arg(help_behavior_hint="")] = False
    """Leave the C library's allocator as it is. Otherwise all contenders use freed buffers again, as coterie's
    training does: without that, mapping big buffers anew is much of every contender's time, and more of those with
    bigger intermediates."""
    device: Annotated[str, arg(metavar="DEVICE")] = "cpu"
    """Where to run: cpu or cuda."""
    seed: Annotated[int, arg(metavar="INT")] = 0
    """Of weights, inputs and order."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="(default: benchmarks/results)")] = RESULTS
    """Folder for the JSON and the PNG."""

    def check(self) -> None:
        """Raises ValueError for values that cannot be."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads: got {self.threads}, must be at least 1")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"--device: got {self.device!r}, must be cpu or cuda")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"--device: got {self.device!r}, but torch finds no GPU")

    @property
    def budget(self) -> float:
        """Seconds per case."""
        return self.seconds_per_case if self.seconds_per_case is not None else 3.0 if self.quick else 10.0


class WrongResult(ValueError):
    """A contender computed something else than the reference: there is nothing to time."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: as in the tables.
        run: what is timed: inputs -> results by name.
        expected: inputs -> the same results in float64, by name. It may leave some out, and may hold the first rows
            only. Contenders that share one function share its values.
        tolerances: by result, the largest accepted ‖result − expected‖ / ‖expected‖.
        parameters: tensors that are there anyway: not counted as saved for backward.
        work: FLOPs over the baseline's, to foresee a contender that is too slow; 0 if unknown.
        skip: why it does not take part, if it does not.
        optional: whether it is skipped, and the benchmark goes on, when it raises a RuntimeError of its own.
    """

    name: str
    run: Callable[[Inputs], Mapping[str, Tensor]]
    expected: Callable[[Inputs], Mapping[str, Tensor]]
    tolerances: Mapping[str, float]
    parameters: Sequence[Tensor] = ()
    work: float = 0.0
    skip: str = ""
    optional: bool = False


def title(labels: Mapping[str, Any]) -> str:
    """Labels as text: numbers with their names, words by themselves."""
    return ", ".join(f"{name} {v}" if isinstance(v, int) else str(v) for name, v in labels.items())


@dataclass(frozen=True)
class Case:
    """One table: contenders that compute the same thing, or cost the same.

    Attributes:
        labels: what tells it from other cases, in order; JSON-able.
        baseline: name of the contender that ratios are over; never skipped.
        contenders: at least the baseline.
        make_inputs: seed -> fresh inputs.
        warm_up: run each contender once on other inputs before every time it is timed. oneDNN keeps the last 1024
            programs that it built: contenders that take turns evict each other's, as none does by itself.
    """

    labels: Mapping[str, Any]
    baseline: str
    contenders: Sequence[Contender]
    make_inputs: Callable[[int], Inputs]
    warm_up: bool = False

    @property
    def title(self) -> str:
        return title(self.labels)


@dataclass
class Row:
    """What one contender of a case did.

    Attributes:
        skipped: why not, or "".
        seconds: by round; a slow contender sits out the later ones.
        error: the largest ‖result − expected‖ / ‖expected‖ over its results.
        peak_bytes: the most that one run had allocated at once beyond its inputs, its results (gradients too) included.
        saved_bytes: kept from forward for backward, inputs included, parameters not.
    """

    skipped: str = ""
    seconds: list[float] = field(default_factory=list)
    error: float = 0.0
    peak_bytes: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


@dataclass
class Result:
    """A measured case."""

    labels: dict[str, Any]
    baseline: str
    rows: dict[str, Row]

    @property
    def title(self) -> str:
        return title(self.labels)

    def ratio(self, name: str, over: str) -> Ratio | None:
        """How many times as fast as `over` is `name`? None if one of them did not run."""
        if not (name in self.rows and over in self.rows):
            return None
        ratios = [b / a for a, b in zip(self.rows[name].seconds, self.rows[over].seconds, strict=False)]
        if not ratios:
            return None
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return Ratio(statistics.median(ratios), low, high)

    def fastest(self, names: Sequence[str]) -> str | None:
        """The one with the smallest median time among those that ran."""
        ran = [name for name in names if name in self.rows and self.rows[name].seconds]
        return min(ran, key=lambda name: statistics.median(self.rows[name].seconds), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: labels, and per contender its row with times and the ratio over the baseline."""
        contenders = {}
        for name, row in self.rows.items():
            ratio = self.ratio(name, self.baseline)
            contenders[name] = asdict(row) | {"ratio": asdict(ratio) if ratio else None}
        return {"labels": self.labels, "baseline": self.baseline, "contenders": contenders}


def measure(case: Case, options: Options, *, say: Callable[[str], object] = lambda text: None) -> Result:
    """Checks every contender of a case, counts its memory, and times them in turns.

    Args:
        case: what to measure.
        options: budget, limits, seed and device.
        say: called with what is going on, for a progress bar.

    Raises:
        WrongResult: a contender's error exceeds its tolerance; the message names both.
    """
    rows = {contender.name: Row(contender.skip) for contender in case.contenders}
    inputs = case.make_inputs(options.seed)
    expected: dict[Callable, Mapping[str, Tensor]] = {}
    baseline_seconds = 0.0
    # The baseline first: its time foretells others'.
    for contender in sorted(case.contenders, key=lambda contender: contender.name != case.baseline):
        row, is_baseline = rows[contender.name], contender.name == case.baseline
        if row.skipped:
            continue
        foreseen = contender.work * baseline_seconds
        if foreseen > options.limit_seconds:
            row.skipped = f"would take about {foreseen:.0f} s"
            continue
        say(f"{contender.name}: checking")
        if contender.expected not in expected:
            expected[contender.expected] = contender.expected(inputs)
        run = partial(contender.run, inputs)
        try:
            results, row.peak_bytes, first = peak_bytes(run, options.device)
        except RuntimeError as error:
            if not contender.optional:
                raise
            row.skipped = f"raises {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        row.error = check(contender, results, expected[contender.expected], where=case.title)
        del results
        if first > 2 * options.limit_seconds and not is_baseline:
            row.skipped = f"takes {first:.0f} s"
            continue
        # The run that warms up: the first one was watched by the profiler.
        row.saved_bytes, second = saved_bytes(run, contender.parameters, options.device)
        if is_baseline:
            baseline_seconds = min(first, second)
        elif min(first, second) > options.limit_seconds:
            row.skipped = f"takes {min(first, second):.0f} s"
    expected.clear()
    _time(case, rows, options, say)
    return Result(dict(case.labels), case.baseline, rows)


def _time(case: Case, rows: dict[str, Row], options: Options, say: Callable[[str], object]) -> None:
    turns = [contender for contender in case.contenders if not rows[contender.name].skipped]
    order = random.Random(options.seed)
    started = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - started > options.budget:
            break
        inputs = case.make_inputs(options.seed + 1 + number)
        others = case.make_inputs(options.seed + 1 + MAX_ROUNDS + number) if case.warm_up else None
        order.shuffle(turns)
        if number < MIN_ROUNDS or number % 10 == 0:  # a terminal is slow beside a decoding step
            say(f"round {number + 1}")
        for contender in turns:
            row = rows[contender.name]
            # Whoever alone has used up the case's time leaves the rest to the others. By the median: one repetition
            # that the system interrupted is not the contender's.
            spent = statistics.median(row.seconds) * len(row.seconds) if row.seconds else 0.0
            if number and contender.name != case.baseline and spent > max(options.budget, 1.0):
                continue
            if case.warm_up:
                contender.run(others)
            results, seconds = _timed(partial(contender.run, inputs), options.device)
            del results  # what it costs to free them is not the contender's
            row.seconds.append(seconds)


def _timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    _synchronize(device)
    start = time.perf_counter()
    results = run()
    _synchronize(device)
    return results, time.perf_counter() - start


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def check(
    contender: Contender, results: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str = ""
) -> float:
    """The largest relative error of a contender's results.

    Raises:
        WrongResult: it exceeds the contender's tolerance, or is not a number, or a result is missing.
    """
    largest = 0.0
    for name, want in expected.items():
        if name not in results:
            raise WrongResult(f"{contender.name} ({where}): no {name!r} among its results {list(results)}")
        got = results[name][: len(want)].double()
        if got.shape != want.shape:
            raise WrongResult(f"{contender.name} ({where}): {name} is {list(got.shape)}, must be {list(want.shape)}")
        error = float((got - want).norm() / want.norm().clamp_min(torch.finfo(want.dtype).tiny))
        if not error <= contender.tolerances[name]:
            raise WrongResult(
                f"{contender.name} ({where}): the error of {name} is {error:.2e}, "
                f"must be at most {contender.tolerances[name]:.0e}; not timed"
            )
        largest = max(largest, error)
    return largest


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> tuple[Any, int, float]:
    """What `run` returns, the most bytes torch had allocated at once meanwhile beyond what was before, and seconds.

    On a CPU every allocation and every free is recorded and summed up; scratch memory inside a matmul library is not
    torch's and not counted. On a GPU it is the caching allocator's own maximum.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results, seconds = _timed(run, device)
        return results, torch.cuda.max_memory_allocated(device) - before, seconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        results, seconds = _timed(run, device)
    # `record.events()` folds allocations into the operators that made them and loses their order.
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return results, peak, seconds


def saved_bytes(run: Callable[[], Any], parameters: Sequence[Tensor] = (), device: str = "cpu") -> tuple[int, float]:
    """Bytes that `run`'s forward pass keeps for backward, every storage once, `parameters` not at all; and seconds."""
    # Held until the end, so that no freed storage's address is taken by another and counted as known.
    known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in parameters}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, seconds = _timed(run, device)
    return total, seconds


SomeOptions = TypeVar("SomeOptions", bound=Options)


def start(options_class: type[SomeOptions], argv: Sequence[str] | None, *, prog: str) -> SomeOptions:
    """Reads the command line and sets the process up, for all contenders alike; the class' docstring is the help."""
    # Indented by a blank, because tyro joins lines that begin with a letter and leaves the wrapping to the terminal.
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = inspect.cleandoc(options_class.__doc__).split("\n\n")
    description = "\n\n".join(
        textwrap.fill(" ".join(text.split()), width, initial_indent=" ", subsequent_indent=" ") for text in paragraphs
    )
    options = tyro.cli(
        options_class, args=argv, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        options.check()
    except ValueError as error:
        print(f"{Path(prog).stem}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a table's rule must not fail in an ASCII terminal
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.default_malloc:
        keep_freed_memory()
    return options
