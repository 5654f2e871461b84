"""What token mixers can learn, on a CPU: small tasks on which linear and full attention part ways.

    python benchmarks/quality/run.py mqar
    python benchmarks/quality/run.py retrieval

Models of width 64 and one to four layers that differ in their mixers alone are trained on data made as they go: every
mixer at every learning rate with one seed, then with more seeds at the rate with the least loss. Runs share out the
cores. "retrieval" is three tasks, passkey, multi-key and variable-tracking, that are learned at one length and tested
at up to sixteen times that.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm
from tyro.conf import arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _tell
from coterie.report import format_table
from quality.mixers import DEEP_ATTENTION, HYBRID, HYBRIDS, MIXERS, WINDOWED, Model
from quality.tasks import GROUPS, IGNORED, TASKS, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is expected: task → test, mixer → at least, or (for a mixer that is to fail) at most.
AT_LEAST = {
    ("mqar", "L 64, 8 pairs", "gated delta"): 0.98,
    ("parity", "on to 160", "gated delta ±"): 0.97,
    ("parity", "on to 160", "delta ±"): 0.97,
}
AT_MOST = {
    ("mqar", "L 64, 8 pairs", "linear"): 0.9,
    ("parity", "on to 160", "gated delta"): 0.97,
    ("parity", "on to 160", "delta"): 0.97,
}
AT_LEAST |= {(name, "L 128", mixer): 0.95 for name in GROUPS["retrieval"] for mixer in HYBRIDS}
AT_MOST |= {(name, test, WINDOWED): 0.5 for name in GROUPS["retrieval"] for test in TASKS[name].tests}
WITHIN = 0.01
_LOOKS = {
    "attention": (_tell.COLOURS[2], "-"),
    WINDOWED: ("#999999", ":"),
    "gated delta": (_tell.COLOURS[0], "--"),
    HYBRIDS[0]: (_tell.COLOURS[4], "-"),
    HYBRIDS[1]: ("#CC9933", "-."),
}
_TEST_BATCH, _TEST_TOKENS, _CHECK_EVERY = 256, 2**17, 50


@dataclass
class Options:
    """Train small models on a synthetic task and compare their mixers: table, JSON and PNG.

    With no options: eleven mixers, two learning rates, three seeds; 44 runs of up to a minute on a core each, five to
    ten minutes in all on two. Of each task of "retrieval" five mixers, one learning rate, three seeds: 15 runs.
    """

    task: Annotated[str, tyro.conf.Positional, arg(metavar="{" + ",".join([*TASKS, *GROUPS]) + "}")]
    """What to learn."""
    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """Three mixers, one learning rate, one seed, few steps: to see that it runs."""
    mixers: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: the task's)")] = ()
    """Only these."""
    learning_rates: Annotated[
        tuple[float, ...], arg(metavar="RATE ...", help_behavior_hint="(default: the task's)")
    ] = ()
    """Of AdamW, to choose from."""
    seeds: Annotated[int, arg(metavar="INT")] = 3
    """Runs with the chosen learning rate."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the task's)")] = None
    """Of a run, at most: one that has solved its task ends."""
    workers: Annotated[int, arg(metavar="INT", help_behavior_hint="(default: one a core)")] = os.cpu_count() or 1
    """Runs at a time, of one thread each."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="(default: benchmarks/results)")] = (
        Path(__file__).resolve().parent.parent / "results"
    )
    """Folder for the JSON and the PNG."""

    def check(self) -> None:
        """Raises ValueError for values that cannot be."""
        if self.task not in TASKS | GROUPS:
            raise ValueError(f"task: got {self.task!r}, must be one of {', '.join(TASKS | GROUPS)}")
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"--mixers: got {name!r}, must be of {', '.join(map(repr, MIXERS))}")
        for name, value in (("seeds", self.seeds), ("workers", self.workers), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: got {value}, must be at least 1")
        if min(self.learning_rates, default=1) <= 0:
            raise ValueError(f"--learning-rates: got {self.learning_rates}, must be positive")
        if self.quick:
            self.mixers = self.mixers or (("attention", "linear", "gated delta") if self.task in TASKS else ())
            self.learning_rates, self.seeds, self.steps = (3e-3,), 1, self.steps or 20


@dataclass(frozen=True)
class Run:
    """One training, and what became of it: accuracy by test, and the mean loss of the last test batch."""

    task: str
    mixer: str
    learning_rate: float
    seed: int
    steps: int
    accuracy: Mapping[str, float] | None = None
    loss: float = float("nan")
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit code: 0 also where an expectation is not met, 2 for wrong options."""
    options = tyro.cli(
        Options, args=argv, prog="python benchmarks/quality/run.py", config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        options.check()
    except ValueError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    names = GROUPS.get(options.task, (options.task,))
    done = {name: compare(name, options) for name in names}
    path = options.out / f"quality_{options.task}.png"
    picture = partial(draw, *done[names[0]], names[0]) if TASKS[names[0]].end is None else partial(draw_lengths, done)
    print(_tell.write_chart(path, picture))
    return 0


def compare(name: str, options: Options) -> tuple[list[Run], dict[str, float]]:
    """One task's runs and the chosen learning rates by mixer; told in tables and a JSON."""
    start, task = time.monotonic(), TASKS[name]
    steps, mixers, runs = options.steps or task.steps, options.mixers or task.mixers, []
    learning_rates = options.learning_rates or task.learning_rates
    total = len(mixers) * (len(learning_rates) + options.seeds - 1)
    with tqdm(total=total, unit="run", desc=name, disable=None) as bar, _pool(options.workers) as pool:
        sweep = [Run(name, mixer, rate, 0, steps) for mixer in mixers for rate in learning_rates]
        runs += _done(pool, sweep, bar)
        rates = {mixer: best_rate(runs, mixer) for mixer in mixers}
        more = [Run(name, m, rates[m], seed, steps) for m in mixers for seed in range(1, options.seeds)]
        runs += _done(pool, more, bar)
    minutes = (time.monotonic() - start) / 60
    print(f"{name} ({task.source}), {minutes:.1f} minutes on {options.workers} cores")
    print(format_runs(runs, rates, task))
    print(format_expectations(expectations(runs, rates)))
    path = options.out / f"quality_{name}.json"
    content = {"benchmark": f"quality {name}", "machine": _tell.machine(), "minutes": minutes}
    content |= {"runs": [asdict(run) for run in runs], "rates": rates, "expected": expectations(runs, rates)}
    _tell.write_json(path, content)
    print(f"\n{path}")
    return runs, rates


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def _done(pool: ProcessPoolExecutor, runs: Iterable[Run], bar: tqdm) -> Iterator[Run]:
    for future in as_completed([pool.submit(train, run) for run in runs]):
        bar.update()
        yield future.result()


# --- training ---


def train(run: Run) -> Run:
    """The run with its results. Same run, same results."""
    start, task = time.monotonic(), TASKS[run.task]
    torch.manual_seed(run.seed)
    model = Model(task.vocab_size, MIXERS[run.mixer], task.layers, rotary=task.rotary)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=run.steps))
    for step in range(run.steps):
        loss, _ = _score(model, *task.sample(task.batch, task.length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % _CHECK_EVERY == 0 and _test(model, task, task.length)[0] < task.solved:
            break
    tested = {name: _test(model, task, length) for name, length in task.tests.items()}
    return replace(
        run,
        steps=step + 1,
        accuracy={name: accuracy for name, (_, accuracy) in tested.items()},
        loss=next(iter(tested.values()))[0],
        seconds=time.monotonic() - start,
    )


def _rate(step: int, *, steps: int) -> float:
    """A tenth of the steps up, then half a cosine down to a tenth."""
    warm_up = steps / 10
    return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def _score(model: Model, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy."""
    logits, asked = model(ids), targets != IGNORED
    logits, targets = logits[asked], targets[asked]
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()


@torch.no_grad()
def _test(model: Model, task: Task, length: int) -> tuple[float, float]:
    """On data that no training sees: the seeds of those are small.

    Scored are the questions at the end, where the task has such; else, of a longer sequence, what lies beyond the
    trained length.
    """
    batch = min(_TEST_BATCH, _TEST_TOKENS // length)
    sample = task.test_sample or task.sample
    ids, targets = sample(batch, length, torch.Generator().manual_seed(10**6))
    if task.end is not None:
        targets[:, : -task.end] = IGNORED
    elif length > task.length:
        targets[:, : task.length] = IGNORED
    loss, accuracy = _score(model, ids, targets)
    return loss.item(), accuracy.item()


# --- results ---


def best_rate(runs: Sequence[Run], mixer: str) -> float:
    """The learning rate with the least loss at the trained length."""
    own = [run for run in runs if run.mixer == mixer and run.seed == 0]
    return min(own, key=lambda run: run.loss if run.loss == run.loss else float("inf")).learning_rate


def chosen(runs: Sequence[Run], rates: Mapping[str, float], mixer: str, test: str) -> list[float]:
    """The accuracies of all seeds at the chosen rate, the least first."""
    return sorted(run.accuracy[test] for run in runs if run.mixer == mixer and run.learning_rate == rates[mixer])


def format_runs(runs: Sequence[Run], rates: Mapping[str, float], task: Task) -> str:
    rows = []
    for mixer, rate in rates.items():
        own = [run for run in runs if run.mixer == mixer and run.learning_rate == rate]
        cells = []
        for test in task.tests:
            scores = chosen(runs, rates, mixer, test)
            cells.append(f"{statistics.median(scores):.3f} [{scores[0]:.3f}–{scores[-1]:.3f}]")
        steps, seconds = (f"{statistics.median(getattr(r, what) for r in own):.0f}" for what in ("steps", "seconds"))
        rows.append([mixer, f"{rate:g}", *cells, steps, seconds])
    header = ["mixer", "learning rate", *(f"{test}: median [range]" for test in task.tests), "steps", "seconds"]
    return format_table(header, rows)


def expectations(runs: Sequence[Run], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was expected of the median, what came, and whether it is so."""
    name, found = runs[0].task, []

    def median(mixer: str, test: str) -> float:
        return statistics.median(chosen(runs, rates, mixer, test))

    for bars, sign in ((AT_LEAST, "≥"), (AT_MOST, "≤")):
        for (task, test, mixer), bar in bars.items():
            if task == name and mixer in rates:
                value = median(mixer, test)
                met = value >= bar if sign == "≥" else value <= bar
                found.append({"what": f"{mixer}, {test}", "value": value, "expected": f"{sign} {bar}", "met": met})
    if {HYBRID, DEEP_ATTENTION} <= rates.keys():
        for test in TASKS[name].tests:
            least, value = median(DEEP_ATTENTION, test) - WITHIN, median(HYBRID, test)
            expected = f"≥ {least:.3f}, {DEEP_ATTENTION}, − {WITHIN}"
            found.append({"what": f"{HYBRID}, {test}", "value": value, "expected": expected, "met": value >= least})
    return found


def format_expectations(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "\nNothing was expected of these mixers."
    rows = [[e["what"], f"{e['value']:.3f}", e["expected"], "as expected" if e["met"] else "NOT so"] for e in found]
    return "\n" + format_table(["", "median", "expected", ""], rows)


def draw(runs: Sequence[Run], rates: Mapping[str, float], name: str) -> "Figure":
    """A panel for each test: a bar for each mixer's median, a dot for each seed."""
    import matplotlib.figure

    task = TASKS[name]
    size = (1.6 + 4.2 * len(task.tests), 1.3 + 0.32 * len(rates))
    figure = matplotlib.figure.Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.7 / size[1]))
    figure.text(0.01, 1 - 0.1 / size[1], f"{name}: accuracy by mixer", size=14, weight="bold", va="top")
    said = (
        f"Width 64, layers: {task.layers} if not said; median and every seed at the best learning rate; {task.source}"
    )
    figure.text(0.01, 1 - 0.42 / size[1], said, size=8.5, color="#777777", va="top")
    panels = figure.subplots(1, len(task.tests), squeeze=False, sharey=True)[0]
    for axes, test in zip(panels, task.tests, strict=True):
        for place, mixer in enumerate(rates):
            scores = chosen(runs, rates, mixer, test)
            colour = _tell.COLOURS[2 if mixer in ("attention", DEEP_ATTENTION) else 4 if mixer == HYBRID else 0]
            axes.barh(place, statistics.median(scores), 0.7, color=colour)
            axes.plot(scores, [place] * len(scores), ".", color="#222222", markersize=4)
        axes.set_yticks(range(len(rates)), rates)
        axes.set_ylim(len(rates) - 0.5, -0.5)
        axes.set_xlim(0, 1.02)
        axes.set_title(test, loc="left", size=10, weight="bold")
        axes.tick_params(axis="both", length=0, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_lengths(done: Mapping[str, tuple[Sequence[Run], Mapping[str, float]]]) -> "Figure":
    """A panel for each task: the median accuracy over the length, a line for each mixer, a dot for each seed."""
    import matplotlib.figure

    size = (max(1.2 + 3.6 * len(done), 8.0), 4.4)
    figure = matplotlib.figure.Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 1.05 / size[1]))
    figure.text(0.01, 1 - 0.1 / size[1], "Retrieval by length", size=14, weight="bold", va="top")
    said = (
        "Accuracy at the answers, trained at the first length; median and every seed; tasks of RULER, arXiv:2404.06654"
    )
    figure.text(0.01, 1 - 0.42 / size[1], said, size=8.5, color="#777777", va="top")
    panels = figure.subplots(1, len(done), squeeze=False, sharey=True)[0]
    for axes, (name, (runs, rates)) in zip(panels, done.items(), strict=True):
        tests = TASKS[name].tests
        for mixer in rates:
            scores = {length: chosen(runs, rates, mixer, test) for test, length in tests.items()}
            colour, style = _LOOKS.get(mixer, ("#222222", "-"))
            medians = [statistics.median(each) for each in scores.values()]
            axes.plot([*scores], medians, style, color=colour, label=mixer, linewidth=1.8, clip_on=False)
            for length, each in scores.items():
                axes.plot([length] * len(each), each, ".", color=colour, markersize=5, clip_on=False)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*tests.values()], [f"{length:,}" for length in tests.values()])
        axes.minorticks_off()
        axes.set_ylim(0, 1)
        axes.set_title(name, loc="left", size=10, weight="bold")
        axes.set_xlabel("L, tokens", size=8)
        axes.grid(axis="y", color="#EEEEEE")
        axes.tick_params(axis="both", length=0, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    corner = (0.0, 1 - 0.6 / size[1])
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="upper left", bbox_to_anchor=corner, ncols=len(labels), frameon=False, fontsize=8.5
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
