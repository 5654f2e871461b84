"""`check`: a catalog's small examples in Triton's interpreter, sanitized, and again with their programs shuffled."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from coterie_kernels.proof.catalog import Example
from coterie_kernels.proof.interpreter import shuffled_grid
from coterie_kernels.proof.sanitize import sanitize


def check_example(example: Example, seed: int = 0) -> list[str]:
    """What is wrong, a line each: the sanitizer's findings; if none, whether the order of programs changes a bit.

    Raises:
        RuntimeError: kernels are not interpreted.
    """
    with sanitize() as sanitizer:
        results = example.run()
        sanitizer.check_results(results)
    if sanitizer.findings:  # a stray store that nobody stops could end this process
        return [str(finding) for finding in sanitizer.findings]
    with shuffled_grid(seed):
        shuffled = example.run()
    if _same_bits(results, shuffled):
        return []
    failures, plain = [], example.run()
    if not _same_bits(plain, shuffled):
        failures.append("other results when programs run in another order")
    if not _same_bits(plain, results):
        failures.append("results use lanes that a load masked out without naming a value")
    return failures


@dataclass
class Check:
    """Runs kernels in Triton's interpreter and tells of stray, unwritten and contested memory. Needs no GPU."""

    entry: tuple[str, ...] = ()
    """Only these of the catalog; all if none is named."""
    seed: int = 0
    """Of the order of programs."""
    catalog: str = "coterie_kernels.proof.catalog"
    """The module whose CATALOG is meant."""

    def run(self) -> int:
        """Prints how many examples passed, and every failure; returns how many failures there are."""
        if not triton.knobs.runtime.interpret:
            raise SystemExit("there is no interpreter to check kernels in: set TRITON_INTERPRET=1")
        catalog = {entry.name: entry for entry in importlib.import_module(self.catalog).CATALOG}
        if unknown := set(self.entry) - set(catalog):
            raise SystemExit(f"no entry {', '.join(sorted(unknown))} in the catalog: {', '.join(catalog)}")
        examples = [(name, example) for name in self.entry or catalog for example in catalog[name].small()]
        failures = []
        for name, example in tqdm(examples, unit="example", disable=None):
            failures += [f"{name}, {example.label}: {failure}" for failure in check_example(example, self.seed)]
        for name in dict(examples):
            print(f"{name:<20} {sum(each == name for each, _ in examples):>3} examples")
        print(f"{len(examples)} examples by Triton {triton.__version__}; {len(failures)} failures", *failures, sep="\n")
        return len(failures)


def _same_bits(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a.shape == b.shape and torch.equal(_bits(a), _bits(b)))
        for a, b in zip(left, right, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
