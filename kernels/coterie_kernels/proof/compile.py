"""Compiles a launch ahead of time, and says what would be wrong with it on the GPU."""

import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field

import triton
from triton import knobs
from triton.runtime.cache import get_cache_manager

from coterie_kernels.proof.capture import GPUS, Launch

INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
TENSOR_MEMORY = 512  # columns an SM of 10.0 has
_KIB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one SM or CU.

    NVIDIA's are the CUDA programming guide's, "technical specifications per compute capability"; AMD's the CDNA 3 ISA
    reference's: 4 SIMDs of 512 vector registers (architectural and accumulation together) and 8 waves each.

    Attributes:
        block_shared: bytes that one block may have.
        shared: bytes in all; `reserved` of them go to the system with every block.
        registers: of one SIMD or sub-core, each as wide as a warp.
        unit: registers are given out in multiples of this.
        warps, blocks: at most so many.
    """

    block_shared: int
    shared: int
    reserved: int
    registers: int
    unit: int
    warps: int
    blocks: int


LIMITS = {
    # 8.0 has 163 KiB a block; 8.6, 8.9 and 12.0, which run the same kernels, 99.
    "sm_80": Limits(99 * _KIB, 164 * _KIB, _KIB, 512, 8, 64, 32),
    "sm_90": Limits(227 * _KIB, 228 * _KIB, _KIB, 512, 8, 64, 32),
    "sm_100": Limits(227 * _KIB, 228 * _KIB, _KIB, 512, 8, 64, 32),
    "gfx942": Limits(64 * _KIB, 64 * _KIB, 0, 512, 8, 32, 32),
}


@dataclass(frozen=True)
class Compiled:
    """What became of a launch.

    Attributes:
        error: why it does not compile; everything else is then 0.
        registers: of a thread.
        spilled: bytes a thread stores and loads for want of registers.
        stack: bytes of a thread's stack (NVIDIA) or scratch (AMD), for spilled registers too.
        shared: bytes of a block.
        tensor_memory: columns of a block.
        warps: how many fit on an SM or CU at once.
        instructions: name → how often it is in the assembly.
        dots: rows of each `tl.dot`.
        traps: its code does nothing but trap, or may.
        seconds: to compile, next to nothing if it had been before.
    """

    error: str | None = None
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    warps: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    dots: tuple[int, ...] = ()
    traps: bool = False
    seconds: float = 0.0


def compile_launch(launch: Launch, target: str) -> Compiled:
    """As the JIT would on that target; a failure is in `error`, not raised."""
    start = time.monotonic()
    try:
        with _quiet() as diagnostics:
            kernel, log = _build(launch, target)
    except Exception as error:
        return Compiled(error=_reason(error, diagnostics()), seconds=time.monotonic() - start)
    is_amd = GPUS[target].backend == "hip"
    assembly = kernel.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled, stack = _amd_resources(assembly) if is_amd else _nvidia_resources(log)
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    return Compiled(
        registers=registers,
        spilled=spilled,
        stack=stack,
        shared=shared,
        tensor_memory=columns,
        warps=occupancy(target, registers, shared, columns, kernel.metadata.num_warps),
        instructions={name: assembly.count(name) for name in INSTRUCTIONS.values()},
        dots=tuple(int(rows) for rows in re.findall(r"tt\.dot\b.*-> tensor<(\d+)x", kernel.asm["ttir"])),
        traps=not is_amd and re.search(r"^\s*trap;", assembly, re.MULTILINE) is not None,
        seconds=time.monotonic() - start,
    )


def _build(launch: Launch, target: str) -> tuple[triton.compiler.CompiledKernel, str]:
    """The kernel, and what ptxas said of it: kept in Triton's cache beside the kernel."""
    gpu, said = GPUS[target], io.StringIO()
    with knobs.nvidia.scope(), redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(launch.source(target), target=gpu, options=launch.options)
    if gpu.backend != "cuda":
        return kernel, ""
    cached = get_cache_manager(kernel.hash)
    if "Used" in (log := said.getvalue()):
        cached.put(log, "ptxas.log", binary=False)
    elif path := cached.get_file("ptxas.log"):
        with open(path) as file:
            log = file.read()
    else:  # something else compiled it
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            return _build(launch, target)
    return kernel, log


@contextmanager
def _quiet() -> Iterator:
    """Keeps what compilers write to the standard error; yields a function that tells it."""
    sys.stderr.flush()
    standard = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        said = []
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: "".join(said)
        finally:
            os.dup2(standard, 2)
            os.close(standard)
            file.seek(0)
            said.append(file.read())


def _reason(error: BaseException, diagnostics: str) -> str:
    """One line: the innermost error, whose place in the kernel the outer ones tell, and the compiler's own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [f"{type(error).__name__}: {error}", *re.findall(r"error: .*", diagnostics)]
    return " ".join(" ".join(lines).split())[:600]


def _nvidia_resources(log: str) -> tuple[int, int, int]:
    """(registers, bytes spilled, bytes of stack): the worst and the sums over functions."""
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return (
        max(int(used) for used in re.findall(r"Used (\d+) registers", log)),
        sum(int(stores) + int(loads) for _, stores, loads in spilled),
        sum(int(stack) for stack, _, _ in spilled),
    )


def _amd_resources(assembly: str) -> tuple[int, int, int]:
    """As of NVIDIA. A scalar register spilled to a vector register is no traffic; spilled to memory, it is scratch."""

    def figure(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return figure("vgpr_count"), 4 * figure("vgpr_spill_count"), figure("private_segment_fixed_size")


def occupancy(target: str, registers: int, shared: int, columns: int, num_warps: int) -> int:
    """Warps that fit on an SM or CU at once by registers, shared and tensor memory, and their number."""
    limits = LIMITS[target]
    granted = -(-max(registers, 1) // limits.unit) * limits.unit
    blocks = min(
        4 * (limits.registers // granted) // num_warps,  # each of the four parts has its own registers
        limits.shared // max(shared + limits.reserved, 1),
        TENSOR_MEMORY // max(columns, 1),
        limits.warps // num_warps,
        limits.blocks,
    )
    return blocks * num_warps


def faults(compiled: Compiled, target: str, must_use_tensor_cores: bool, may_spill: bool) -> list[str]:
    """Sentences; none if all is well.

    must_use_tensor_cores: below 64 rows Triton takes the older mma.sync on sm_90 and sm_100, as no wider instruction is
    that low.
    """
    if compiled.error is not None:
        return [f"does not compile: {compiled.error}"]
    limits, found = LIMITS[target], []
    if compiled.spilled and not may_spill:
        found.append(f"spills {compiled.spilled} bytes")
    if compiled.stack and not may_spill:
        found.append(f"has {compiled.stack} bytes of stack")
    if compiled.shared > limits.block_shared:
        found.append(f"wants {_kib(compiled.shared)} of shared memory, but there are {_kib(limits.block_shared)}")
    if compiled.tensor_memory > TENSOR_MEMORY:
        found.append(f"wants {compiled.tensor_memory} columns of tensor memory, but there are {TENSOR_MEMORY}")
    if compiled.traps:
        found.append(f"traps: with {compiled.registers} registers, its code may be nothing else")
    if must_use_tensor_cores:
        found.extend(_misses_tensor_cores(compiled, target))
    return found


def _misses_tensor_cores(compiled: Compiled, target: str) -> list[str]:
    wanted = INSTRUCTIONS[target]
    if not compiled.dots:
        return ["multiplies nothing by tl.dot"]
    if max(compiled.dots) < 64 and target in ("sm_90", "sm_100"):
        wanted = INSTRUCTIONS["sm_80"]
    return [] if compiled.instructions[wanted] else [f"has no {wanted}"]


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / _KIB:.1f} KiB"
