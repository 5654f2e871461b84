"""Matrix products on a CPU: in which dtype, by which library, and how many rows at a time.

torch multiplies float32 by its BLAS, which on x86 is MKL, and narrower dtypes by oneDNN. Each has a weak spot. MKL
keeps AMD's CPUs with AVX-512 to AVX2 code, at less than half their speed; oneDNN does not, so they multiply float32 by
it too. oneDNN builds a program for every shape it meets, about half a millisecond each, and keeps
the last 1024; so experts' row counts are rounded up to few different ones. Without bfloat16 instructions a bfloat16
product is several times slower than the same in float32, so it is converted.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has matmul instructions for `dtype`."""
    if dtype in (torch.float32, torch.float64):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):  # where oneDNN also says yes to what it emulates
        if dtype == torch.bfloat16:
            return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU should multiply tensors of `dtype`: itself where native, else float32."""
    return dtype if multiplies_natively(dtype) else torch.float32


@cache
def float32_by_onednn() -> bool:
    """Whether oneDNN multiplies float32 faster than torch's BLAS: twice as fast on AMD's AVX-512."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.cpu._is_avx512_supported() and _is_amd()


def _is_amd() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()  # Windows: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD"
    return "AuthenticAMD" in text


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether `multiply` takes tensors of `dtype` to oneDNN."""
    return float32_by_onednn() if dtype == torch.float32 else dtype != torch.float64


def padded_height(rows: int, dtype: torch.dtype) -> int:
    """The row count to multiply `rows` ≥ 1 rows of one expert as, in `dtype`: few different ones for oneDNN."""
    if rows == 1 or not by_onednn(dtype):
        return rows
    multiple = 4 if rows <= 64 else 32
    return -(-rows // multiple) * multiple


def linear(x: Tensor, matrix: Tensor) -> Tensor:
    """[n, A] × [B, A] → [n, B] by oneDNN, float32 too, with less to do per call than `torch.mm` has."""
    return torch.ops.mkldnn._linear_pointwise.default(x, matrix, None, "none", [], "")


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """[n, A] × [A, B] → [n, B] in a's dtype, which is b's; `out` may be of another."""
    if a.dtype == torch.float32 and float32_by_onednn():
        y = linear(a, b.mT)
    elif out is None or out.dtype != a.dtype:
        y = torch.mm(a, b)
    else:
        return torch.mm(a, b, out=out)
    return y if out is None else out.copy_(y)


def batch_sizes(dtype: torch.dtype) -> tuple[int, ...]:
    """How many products of matrices [E, A, B] of `dtype` are worth one `multiply_batch`, best first.

    Powers of two, for few different shapes; few where matrices are converted, for the cache; none where batches would
    go to the slower library.
    """
    work = matmul_dtype(dtype)
    if work == torch.float32 and float32_by_onednn():
        return ()
    return (16, 8, 4, 2) if work == dtype else (4, 2)


def multiply_batch(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """[g, n, A] × [g, A, B] → [g, n, B]: few rows each, side by side on the cores."""
    if out is None or out.dtype != a.dtype:
        y = torch.bmm(a, b)
        return y if out is None else out.copy_(y)
    return torch.bmm(a, b, out=out)


def multiply_each(rows: Tensor, experts: list[int], stacked: Tensor) -> Tensor:
    """rows[n] @ stacked[experts[n]]ᵀ, [N, B], for a handful of rows; anything where there is no such expert.

    Every microsecond of the loop counts.
    """
    experts = [min(expert, len(stacked) - 1) for expert in experts]
    matrices = [stacked[expert].to(rows.dtype) for expert in experts]
    if rows.dtype == torch.bfloat16:
        if multiplies_natively(rows.dtype):
            return torch.cat([linear(row, matrix) for row, matrix in zip(rows.split(1), matrices, strict=True)])
        return torch.stack([torch.mv(matrix, row) for row, matrix in zip(rows.unbind(), matrices, strict=True)])
    # The BLAS runs a float32 matrix-vector product on one core: give each core a part of the matrix.
    parts = torch.get_num_threads()
    parts = parts if stacked.shape[1] % parts == 0 else 1
    factors = rows[:, None, None, :].expand(-1, parts, 1, -1).unbind()  # [parts, 1, A] each
    parts_of = [matrix.unflatten(0, (parts, -1)).mT for matrix in matrices]  # [parts, A, B / parts]
    products = [torch.bmm(factor, matrix) for factor, matrix in zip(factors, parts_of, strict=True)]
    return torch.stack(products).flatten(1)
