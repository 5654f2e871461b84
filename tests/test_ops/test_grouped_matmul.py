"""`grouped_matmul`: one matmul per expert, every implementation against the reference in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from _check import check_op, fuzz, relative_error
from coterie.ops import _layout, _products, grouped_matmul
from coterie.ops.grouped_matmul import (
    _multiply_columns_device,
    _multiply_rows_device,
    _sum_rows_device,
    expert_of_rows,
    multiply_columns,
    multiply_rows,
    sum_rows,
)

# Rows of each expert: none, one, few-row neighbours, one giant (three tiles of it), nothing but empty ones.
COUNTS = {
    "mixed": [3, 0, 1, 40, 5, 6, 7, 0],
    "tiles": [1, 2500, 0, 2],
    "groups": [5, 6, 5, 7, 6, 5, 5, 80, 6, 5],
    "single rows": [1, 1, 1, 1, 1, 1, 1],
    "one expert": [17],
    "empty": [0, 0, 0],
}


def _inputs(counts, dim, width, dtype, *, unused=0, gathered=False, bias=False):
    num_rows = sum(counts) + unused
    num_tokens = num_rows // 2 + 1 if gathered else num_rows
    x = torch.randn(num_tokens, dim).to(dtype).requires_grad_()
    weight = (torch.randn(len(counts), width, dim) / dim**0.5).to(dtype).requires_grad_()
    rows = torch.randint(0, num_tokens, (num_rows,)) if gathered else None
    bias = torch.randn(len(counts), width).to(dtype).requires_grad_() if bias else None
    return x, weight, torch.tensor(counts), rows, bias


def _op(x, weight, counts, rows=None, bias=None, *, impl):
    return grouped_matmul(x, weight, counts, rows=rows, bias=bias, impl=impl)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"unused": 5, "gathered": True, "bias": True}], ids=["plain", "all"])
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_is_the_reference(counts, dtype, more, impl):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    check_op(_op, _inputs(COUNTS[counts], 7, 5, dtype, **more), impl)


@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 6, 33]), min_size=1, max_size=9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 100, 2**18]),
    st.sampled_from(["torch", "triton"]),
)
@fuzz
def test_any_shape(counts, dim, width, unused, gathered, bias, onednn, chunk, impl):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_products, "float32_by_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
        patch.setattr(_layout, "_CHUNK_NUMBERS", chunk)
        inputs = _inputs(counts, dim, width, torch.float32, unused=unused, gathered=gathered, bias=bias)
        check_op(_op, inputs, impl, layouts=["dense"])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_memory_of_any_order(impl):
    x = torch.randn(6, 20).t().requires_grad_()  # [20, 6], transposed
    weight = torch.randn(6, 4, 3).permute(2, 1, 0).requires_grad_()  # [3, 4, 6]
    strided = torch.randn(20, 12)[:, ::2].requires_grad_()
    bias = torch.randn(4, 3).t().requires_grad_()
    for rows_of in (x, strided, torch.randn(1, 6).expand(20, 6).requires_grad_()):
        check_op(_op, (rows_of, weight, torch.tensor([4, 9, 5]), None, bias), impl)


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_only_what_is_asked_for(which, impl):
    inputs = _inputs(COUNTS["mixed"], 4, 6, torch.float32, unused=2, gathered=True, bias=True)
    for i, name in ((0, "x"), (1, "weight"), (4, "bias")):
        inputs[i].requires_grad_(name == which)
    check_op(_op, inputs, impl, layouts=["dense"])


def test_gradcheck_and_twice():
    x, weight, counts, rows, bias = _inputs([2, 0, 3], 3, 2, torch.float64, unused=1, gathered=True, bias=True)
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda *t, i=impl: _op(t[0], t[1], counts, rows, t[2], impl=i), (x, weight, bias)
        )
    assert torch.autograd.gradgradcheck(
        lambda *t: _op(t[0], t[1], counts, rows, t[2], impl="reference"), (x, weight, bias)
    )


@pytest.mark.parametrize("more", [{}, {"unused": 5, "gathered": True, "bias": True}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(more, dtype, impl):
    inputs = _inputs(COUNTS["mixed"], 4, 6, dtype, **more)
    torch.library.opcheck(torch.ops.coterie.grouped_matmul.default, (*inputs, impl), rtol=1e-5, atol=1e-5)
    x, weight, counts, rows, bias = (t if t is None else t.detach() for t in inputs)
    grad = torch.randn(x.shape[0] if rows is None else len(rows), 6).to(dtype)
    for needs in ([True, True, bias is not None], [False, True, False]):
        args = (grad, x, weight, counts, rows, needs, impl)
        torch.library.opcheck(torch.ops.coterie.grouped_matmul_backward.default, args, rtol=1e-5, atol=1e-5)


def test_expert_of_rows():
    assert expert_of_rows(torch.tensor([2, 0, 1, 0]), 5).tolist() == [0, 0, 2, 4, 4]
    assert expert_of_rows(torch.tensor([0, 0]), 1).tolist() == [2]


# ------ what accelerators run; torch's grouped_mm works on a CPU too


@pytest.mark.parametrize("counts", ["mixed", "tiles", "one expert", "empty"])
@pytest.mark.parametrize(("dim", "width"), [(8, 16), (7, 5), (1, 3), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_accelerators_products(counts, dim, width, dtype):
    """Widths off grouped_mm's 16-byte boundary, transposed matrices, rows that no expert takes."""
    counts = torch.tensor(COUNTS[counts])
    used, num_rows = int(counts.sum()), int(counts.sum()) + 5
    x, grad = torch.randn(num_rows, dim).to(dtype), torch.randn(num_rows, width).to(dtype)
    weight = torch.randn(len(counts), width, dim).to(dtype)
    x[used:] = torch.nan  # unused rows cannot matter
    grad[used:] = torch.nan
    exact = torch.cat(
        [rows @ w.t() for rows, w in zip(x[:used].double().split(counts.tolist()), weight.double(), strict=True)]
    )
    pairs = zip(x[:used].double().split(counts.tolist()), grad[:used].double().split(counts.tolist()), strict=True)
    exact_columns = torch.stack([g.t() @ rows for rows, g in pairs])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for matrices in (weight, transposed, weight.float()):
        for multiply in (_multiply_rows_device, multiply_rows) if matrices.dtype == dtype else (_multiply_rows_device,):
            y = multiply(x, matrices, counts)
            assert y.dtype == dtype
            assert relative_error(y[:used], exact) < tolerance
            assert (y[used:] == 0).all()
    for multiply in (_multiply_columns_device, multiply_columns):
        columns = multiply(grad, x, counts)
        assert columns.dtype == dtype
        assert relative_error(columns, exact_columns) < tolerance
        assert (columns[counts == 0] == 0).all()
    exact_sums = torch.stack([g.sum(0) for g in grad[:used].double().split(counts.tolist())])
    for total in (_sum_rows_device, sum_rows):
        sums = total(grad, counts)
        assert sums.dtype == dtype
        assert relative_error(sums, exact_sums) < tolerance
        assert (sums[counts == 0] == 0).all()


GOOD = {"x": torch.zeros(5, 4), "weight": torch.zeros(3, 2, 4), "counts": torch.tensor([2, 2, 1])}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": torch.zeros(5)}, ValueError, r"x must have shape \[N, D\], got \(5,\)"),
        ({"x": None}, TypeError, r"x must be a tensor \[N, D\], got NoneType"),
        ({"weight": torch.zeros(3, 2, 5)}, ValueError, r"weight must have shape .* \[E, O, 4\], got \(3, 2, 5\)"),
        ({"weight": torch.zeros(3, 2, 4).bfloat16()}, TypeError, r"weight must be torch.float32, got torch.bfloat16"),
        ({"counts": torch.tensor([5, 0])}, ValueError, r"counts must have shape \[E\] = \[3\], got \(2,\)"),
        ({"counts": torch.zeros(3)}, TypeError, r"counts must be torch.int64, got torch.float32"),
        ({"rows": torch.zeros(5, 1, dtype=torch.int64)}, ValueError, r"rows must have shape \[N\], got \(5, 1\)"),
        ({"rows": torch.zeros(5)}, TypeError, r"rows must be torch.int64, got torch.float32"),
        ({"bias": torch.zeros(3, 4)}, ValueError, r"bias must have shape \[E, O\] = \[3, 2\], got \(3, 4\)"),
        ({"bias": torch.zeros(3, 2).double()}, TypeError, r"bias must be torch.float32, got torch.float64"),
        ({"counts": torch.tensor([4, 4, 0])}, ValueError, r"counts must .* at most N = 5, got \[4, 4, 0\]"),
        ({"counts": torch.tensor([-1, 3, 0])}, ValueError, r"counts must be at least 0 .* got \[-1, 3, 0\]"),
        ({"rows": torch.tensor([0, 5, 1, 2, 3])}, ValueError, r"rows must be in 0..4, rows of x, got 5"),
        ({"rows": torch.tensor([0, -1, 1, 2, 3])}, ValueError, r"rows must be in 0..4, rows of x, got -1"),
        (
            {"x": torch.zeros(5, 0), "weight": torch.zeros(3, 2, 0)},
            ValueError,
            r"weight must have .* at least 1",
        ),
        ({"impl": "cuda"}, ValueError, r"impl must be one of 'reference', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(impl, wrong, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(**{**GOOD, "impl": impl, **wrong})
