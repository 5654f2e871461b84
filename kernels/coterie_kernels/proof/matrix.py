"""`python -m coterie_kernels.proof compile`: every kernel of the catalog, for every target, dtype and tile size."""

import importlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import triton
from tqdm import tqdm

from coterie_kernels.proof.capture import Launch, capture
from coterie_kernels.proof.catalog import DTYPES, Entry, Example
from coterie_kernels.proof.compile import INSTRUCTIONS, Compiled, compile_launch, faults
from coterie_kernels.target import TARGETS, aiming_at

_SIZES = ("ROWS", "UNITS", "DEPTH", "COLUMNS", "BLOCK")  # constexprs that a tile table or launcher chose


@dataclass
class Compile:
    """Compiles kernels ahead of time and tells what would spill, overflow or miss the tensor cores. Needs no GPU."""

    quick: bool = False
    """One example per entry and target instead of all."""
    target: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = TARGETS
    """Only these."""
    entry: tuple[str, ...] = ()
    """Only these of the catalog; all if none is named."""
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = tuple(str(d).removeprefix("torch.") for d in DTYPES)
    """Only these."""
    json: Path | None = None
    """Also write all figures to this file."""
    workers: int = os.cpu_count() or 1
    """Processes that compile."""
    catalog: str = "coterie_kernels.proof.catalog"
    """The module whose CATALOG is meant."""

    def run(self) -> int:
        """Prints the figures and every fault; returns how many faults there are."""
        if triton.knobs.runtime.interpret:
            raise SystemExit("TRITON_INTERPRET is set, so that there is nothing to compile: unset it")
        jobs, missing = self._jobs()
        results = []
        with tqdm(total=len(jobs), desc=f"Triton {triton.__version__}", unit="kernel", disable=None) as progress:
            for job, compiled in _compiled(jobs, self.workers):
                results.append(Result(job, compiled, faults(compiled, job.target, job.multiplies, job.may_spill)))
                progress.update()
        results.sort(key=lambda result: result.job.order)
        print(_table(results))
        found = missing + [f"{result.job}: {fault}" for result in results for fault in result.faults]
        seconds = sum(result.compiled.seconds for result in results)
        print(
            f"{len(results)} kernels by Triton {triton.__version__}, {seconds:.0f} s of compiling; {len(found)} faults"
        )
        print(*found, sep="\n")
        if self.json is not None:
            self.json.write_text(json.dumps([result.figures() for result in results], indent=1))
        return len(found)

    def _jobs(self) -> tuple[list["Job"], list[str]]:
        """What to compile, each code once, and the kernels that should have been there and are not."""
        catalog = {entry.name: entry for entry in importlib.import_module(self.catalog).CATALOG}
        if unknown := set(self.entry) - set(catalog):
            raise SystemExit(f"no entry {', '.join(sorted(unknown))} in the catalog: {', '.join(catalog)}")
        jobs, missing = {}, []
        for entry in (catalog[name] for name in self.entry or catalog):
            launched = set()
            for target in self.target:
                for dtype, example in self._examples(entry, target):
                    with aiming_at(target), capture() as launches:
                        example.run()
                    for launch in launches:
                        launched.add(launch.name)
                        is_dot = launch.name in entry.multiplies
                        label = f"{entry.name}, {example.label}"
                        job = Job(len(jobs), target, dtype, label, launch, is_dot, example.may_spill)
                        jobs.setdefault(launch.key(target), job)
            if not self.quick:
                absent = set(entry.multiplies) - launched
                missing += [f"{entry.name}: no example launches {name}" for name in sorted(absent)]
        return list(jobs.values()), missing

    def _examples(self, entry: Entry, target: str) -> Iterator[tuple[str, Example]]:
        every = [
            (str(dtype).removeprefix("torch."), example)
            for dtype in DTYPES
            if str(dtype).removeprefix("torch.") in self.dtype
            for example in entry.matrix(target, dtype)
        ]
        if not self.quick:
            return iter(every)
        every = [(dtype, example) for dtype, example in every if not example.may_spill]
        first = TARGETS.index(target)  # each target takes others, so that together they reach more
        return iter(every[(2 * first + 1) * len(every) // 8 :][:1])


@dataclass(frozen=True)
class Job:
    """multiplies: it must use tensor cores. may_spill: in the one example, the first, that it is compiled for."""

    order: int
    target: str
    dtype: str
    example: str
    launch: Launch
    multiplies: bool
    may_spill: bool

    @property
    def kernel(self) -> str:
        return f"{self.launch.module.rpartition('.')[2]}.{self.launch.name}"

    @property
    def tile(self) -> str:
        values, options = self.launch.values, self.launch.options
        sizes = [f"{name.lower()} {values[name]}" for name in _SIZES if name in values]
        return ", ".join(
            sizes + [f"{name[4:]} {options[name]}" for name in ("num_warps", "num_stages") if name in options]
        )

    def __str__(self) -> str:
        return f"{self.target}, {self.dtype}, {self.kernel} ({self.tile}) of {self.example}"


@dataclass(frozen=True)
class Result:
    job: Job
    compiled: Compiled
    faults: list[str]

    def figures(self) -> dict:
        job = self.job
        what = {name: getattr(job, name) for name in ("kernel", "target", "dtype", "tile", "example", "multiplies")}
        return {"triton": triton.__version__, **what, **asdict(self.compiled), "faults": self.faults}


def _compiled(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Compiled]]:
    """In any order. A compiler that dies takes its pool along: what was left then goes one by one."""
    left = list(jobs)
    while left:
        together, left = (left, []) if workers > 1 else (left[:1], left[1:])
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            futures = {pool.submit(compile_launch, job.launch, job.target): job for job in together}
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    if workers == 1:
                        yield futures[future], Compiled(error="the compiler died")
                    else:
                        left.append(futures[future])
        workers = 1 if left else workers


def _table(results: Sequence[Result]) -> str:
    """The worst of each kernel, target, dtype and tile sizes."""
    groups = defaultdict(list)
    for result in results:
        groups[result.job.kernel, result.job.target, result.job.dtype, result.job.tile].append(result.compiled)
    rows = [("kernel", "target", "dtype", "tile", "of", "registers", "spilled", "shared KiB", "by", "warps")]
    for key, group in sorted(groups.items(), key=lambda item: item[0][:3]):
        good = [compiled for compiled in group if compiled.error is None]
        worst = ["error"] * 5
        if good:
            used = [name for name in INSTRUCTIONS.values() if any(compiled.instructions[name] for compiled in good)]
            worst = [
                str(max(compiled.registers for compiled in good)),
                str(max(max(compiled.spilled, compiled.stack) for compiled in good)),
                f"{max(compiled.shared for compiled in good) / 1024:.1f}",
                " ".join(used) or "-",
                str(min(compiled.warps for compiled in good)),
            ]
        rows.append((*key, str(len(group)), *worst))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
