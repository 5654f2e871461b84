"""`expert_mlp`: every implementation and every path through it, against the reference in float64."""

import sys
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from _check import check_op, fuzz
from coterie.ops import _expert_mlp_cpu, _expert_mlp_device, _layout, _products, expert_mlp
from coterie.ops.grouped_matmul import _multiply_columns_device, _multiply_rows_device

# Two biases are two more roundings than the five that DESIGN.md's 5e-3 allows: × √(7 / 5).
WITH_BIASES = {
    torch.float32: None,
    torch.float64: None,
    torch.float16: (8.3e-4, 1.8e-3),
    torch.bfloat16: (6e-3, 1.2e-2),
}

OP = sys.modules["coterie.ops.expert_mlp"]  # the package's attribute of that name is the function
FLOAT32_ONLY = (torch.float32, torch.float64)
GPT_OSS = "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)"
ACTIVATIONS = ["swiglu", "geglu", "geglu_tanh", "reglu", GPT_OSS, "silu", "gelu", "gelu_tanh", "relu", "relu2"]
PATHS = ["reference", "converted", "native", "onednn", "device", "triton"]
if not torch.backends.mkldnn.is_available():
    PATHS.remove("onednn")


def take_path(patch: pytest.MonkeyPatch, path: str) -> str:
    """Forces one way through the op, and returns the `impl` to ask for.

    converted: a CPU without bfloat16 instructions, which multiplies it as float32. native: one that has them; also in
    many small chunks. onednn: one that multiplies float32 by oneDNN, rows padded. device: what an accelerator runs
    without Triton. triton: its kernels in their interpreter.
    """
    if path in ("reference", "triton"):
        return path
    patch.setattr(OP, "_SINGLE_ROWS", -1)
    patch.setattr(_products, "multiplies_natively", lambda dtype: path != "converted" or dtype in FLOAT32_ONLY)
    patch.setattr(_products, "float32_by_onednn", lambda: path == "onednn")
    if path == "native":
        patch.setattr(_layout, "_CHUNK_NUMBERS", 400)
    if path == "device":
        patch.setattr(OP, "_executor", lambda x, impl: _expert_mlp_device)
        patch.setattr(_expert_mlp_device, "multiply_rows", _multiply_rows_device)
        patch.setattr(_expert_mlp_device, "multiply_columns", _multiply_columns_device)
    return "torch"


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    return request.param, take_path(monkeypatch, request.param)


def choose_experts(how, num_tokens, num_experts, top_k):
    ids = torch.rand(num_tokens, num_experts).topk(top_k).indices
    if how == "unused":
        return ids.masked_fill(torch.rand(num_tokens, top_k) < 0.4, num_experts)
    if how == "skewed":  # most tokens on a few, some experts with a row or two, some with none
        return (num_experts * torch.rand(num_tokens, top_k) ** 4).long()
    if how == "one":
        return torch.full_like(ids, num_experts // 2)
    if how == "nobody":
        return torch.full_like(ids, num_experts)
    return ids


def make_inputs(
    tokens, dim, hidden, experts, top_k, *, how="random", dtype=torch.float32, activation="swiglu", bias=False
):
    """Arguments in `expert_mlp`'s order, all requiring gradients, of size one throughout."""
    ids = choose_experts(how, tokens, experts, top_k)
    weights = torch.rand(tokens, top_k).masked_fill(ids == experts, 0.0)
    weights = weights if dtype != torch.float64 else weights.double()
    width = hidden if activation.split("(")[0] in ("silu", "gelu", "gelu_tanh", "relu", "relu2") else 2 * hidden
    tensors = [
        torch.randn(tokens, dim),
        torch.randn(experts, width, dim) / dim**0.5,
        torch.randn(experts, dim, hidden) / hidden**0.5,
        torch.randn(experts, width) / 4 if bias else None,
        torch.randn(experts, dim) / 4 if bias else None,
    ]
    x, *matrices = (t if t is None else t.to(dtype).requires_grad_() for t in tensors)
    return x, ids, weights.requires_grad_(), *matrices


def op(
    x, ids, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, impl, activation="swiglu", recompute=False
):
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    settings = {"activation": activation, "recompute": recompute, "impl": impl}
    return expert_mlp(x, ids, weights, gate_up, down, **biases, **settings)


# T, D, F, E, K, and how the experts are chosen.
CASES = {
    "usual": (130, 64, 48, 6, 2, "random"),
    "odd": (131, 37, 25, 7, 3, "random"),
    "unused slots": (150, 24, 18, 5, 3, "unused"),
    "skewed": (150, 24, 18, 12, 2, "skewed"),
    "few-row neighbours": (40, 16, 12, 16, 2, "random"),
    "all to one": (60, 15, 13, 4, 1, "one"),
    "all to one, twice": (30, 15, 13, 4, 2, "one"),
    "every expert": (12, 18, 14, 5, 5, "random"),
    "one token": (1, 18, 14, 6, 2, "random"),
    "one row": (1, 18, 14, 6, 1, "random"),
    "no token": (0, 8, 4, 6, 2, "random"),
    "nobody": (9, 8, 4, 6, 2, "nobody"),
    "one expert": (20, 18, 14, 1, 1, "random"),
    "width one": (10, 1, 1, 3, 2, "random"),
}


def _combinations():
    for path in PATHS:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for case in CASES:
                if dtype == torch.float16 and (path not in ("reference", "converted", "triton") or case == "nobody"):
                    continue  # few CPUs have instructions for it
                if path in ("device", "triton") and dtype == torch.float64:
                    continue  # neither grouped_mm nor the kernels have it
                if case in ("one token", "one row", "width one") and dtype.itemsize == 2:
                    continue  # too few values for an error in norm: one cancellation decides
                yield path, dtype, case


@pytest.mark.parametrize(("path", "dtype", "case"), list(_combinations()), indirect=["path"])
def test_values_and_gradients(case, dtype, path):
    *sizes, how = CASES[case]
    inputs = make_inputs(*sizes, how=how, dtype=dtype, bias=True)
    for recompute in (False, True):
        check_op(partial(op, recompute=recompute), inputs, path[1], tolerances=WITH_BIASES[dtype])
    check_op(op, (*inputs[:5], None, None), path[1], layouts=["dense"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(activation, dtype, path):
    inputs = make_inputs(130, 20, 16, 4, 2, how="unused", dtype=dtype, activation=activation, bias=True)
    if activation == GPT_OSS:
        with torch.no_grad():
            inputs[3].mul_(4)  # beyond the clamps
    # A value rounded across a kink or a clamp has another gradient: there only plain torch is the measure.
    smooth = activation.rstrip("2") in ("swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh")
    tolerances = WITH_BIASES[dtype] if smooth or dtype == torch.float32 else (6e-3, 0.1)
    for recompute in (False, True):
        run = partial(op, activation=activation, recompute=recompute)
        check_op(run, inputs, path[1], layouts=["dense"], tolerances=tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["one", "skewed"])
def test_more_than_a_tile_of_one_expert(how, dtype, path):
    inputs = make_inputs(2500, 16, 12, 3, 1, how=how, dtype=dtype, bias=True)
    check_op(op, inputs, path[1], layouts=["dense"], tolerances=WITH_BIASES[dtype])


@given(
    st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 9),
    st.sampled_from(["random", "unused", "skewed", "one", "nobody"]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(PATHS[1:]),
)
@fuzz
def test_any_shape(sizes, top_k, how, activation, bias, recompute, path):
    inputs = make_inputs(*sizes, min(top_k, sizes[3]), how=how, activation=activation, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        impl = take_path(patch, path)
        check_op(partial(op, activation=activation, recompute=recompute), inputs, impl)


def test_memory_of_any_order(path):
    x, ids, weights, gate_up, down, *biases = make_inputs(30, 8, 6, 4, 2, bias=True)

    def reordered(t):  # the same values, the last dimension outermost in memory
        return t.detach().permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))

    def strided(t):  # every other element
        return torch.stack((t.detach(), t.detach()), -1)[..., 0]

    def expanded(t):  # one row, repeated
        return t.detach()[:1].expand(t.shape)

    tensors = (x, weights, gate_up, down, *biases)
    for change in (reordered, strided, expanded):
        x, weights, *rest = (change(t).requires_grad_() for t in tensors)
        assert not x.is_contiguous()
        assert not rest[0].is_contiguous()
        check_op(op, (x, ids.t().contiguous().t(), weights, *rest), path[1])


@pytest.mark.parametrize(
    "wanted", ["x", "weights", "gate_up", "down", "gate_up_bias", "down_bias", "router", "adapters"]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_is_asked_for(wanted, recompute, path):
    names = ["x", "ids", "weights", "gate_up", "down", "gate_up_bias", "down_bias"]
    asked = {"router": ("x", "weights"), "adapters": ("gate_up", "down_bias")}.get(wanted, (wanted,))
    inputs = make_inputs(130, 24, 16, 5, 2, how="unused", dtype=torch.bfloat16, bias=True)
    for name, t in zip(names, inputs, strict=True):
        if name != "ids":
            t.requires_grad_(name in asked)
    run = partial(op, recompute=recompute)
    check_op(run, inputs, path[1], layouts=["dense"], tolerances=WITH_BIASES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients(dtype, path):
    """Also the handful of rows that are multiplied one by one, with and without grad mode."""
    for tokens, top_k, how in (
        (1, 2, "random"),
        (4, 4, "unused"),
        (1, 1, "nobody"),
        (0, 2, "random"),
        (30, 2, "unused"),
    ):
        inputs = make_inputs(tokens, 8, 6, 5, top_k, how=how, dtype=dtype, bias=True)
        detached = [t.detach() if t.is_floating_point() else t for t in inputs]
        check_op(op, detached, path[1], tolerances=WITH_BIASES[dtype])
        with torch.no_grad():
            check_op(op, inputs, path[1], layouts=[], tolerances=WITH_BIASES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("native", [True, False])
def test_a_handful_of_rows(dtype, threads, native, monkeypatch):
    """At most _SINGLE_ROWS routed rows and nothing to record: a matrix-vector product each."""
    if native and (dtype == torch.float16 or not torch.backends.mkldnn.is_available()):
        native = False
    monkeypatch.setattr(_products, "multiplies_natively", lambda dtype: native or dtype in FLOAT32_ONLY)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    called = []
    forward = _expert_mlp_cpu.forward_unsorted
    monkeypatch.setattr(_expert_mlp_cpu, "forward_unsorted", lambda *args: called.append(1) or forward(*args))
    sizes = ((1, 2, "random"), (4, 4, "unused"), (8, 2, "one"), (1, 1, "nobody"), (0, 2, "random"))
    for tokens, top_k, how in sizes:
        for activation in ("swiglu", GPT_OSS, "relu2"):
            inputs = make_inputs(tokens, 7, 6, 5, top_k, how=how, dtype=dtype, activation=activation, bias=True)
            inputs = [t.detach() if t.is_floating_point() else t for t in inputs]
            check_op(partial(op, activation=activation), inputs, "torch")
            transposed = [t.mT.contiguous().mT if t.dim() == 3 else t for t in inputs]
            check_op(partial(op, activation=activation), transposed, "torch")
    assert len(called) == 2 * 3 * (len(sizes) - 1)  # none for no token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["all", "addend", "nothing"])
def test_addend(wanted, dtype, path):
    inputs = make_inputs(60, 24, 16, 5, 2, how="unused", dtype=dtype, bias=True)
    addend = torch.randn(24, 60).t().to(dtype).requires_grad_()
    for t in (*inputs, addend):
        if t.is_floating_point():
            t.requires_grad_(wanted == "all" or (wanted == "addend" and t is addend))

    def run(*args, impl):
        *args, addend = args
        x, ids, weights, up, down, up_bias, down_bias = args
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        return expert_mlp(x, ids, weights, up, down, **biases, addend=addend, impl=impl)

    check_op(run, (*inputs, addend), path[1], layouts=["dense"], tolerances=WITH_BIASES[dtype])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("device", "triton")], indirect=True)
def test_gradcheck(recompute, path):
    x, ids, *tensors = make_inputs(5, 3, 2, 4, 2, how="unused", dtype=torch.float64, bias=True)

    def y(x, *tensors):
        return op(x, ids, *tensors, impl=path[1], recompute=recompute)

    assert torch.autograd.gradcheck(y, (x, *tensors))
    if path[1] == "reference" and not recompute:
        assert torch.autograd.gradgradcheck(y, (x, *tensors))


@pytest.mark.parametrize("recompute", [False, True])
def test_under_autocast(recompute, path):
    """float32 parameters, bfloat16 arithmetic; gradients in float32."""
    for bias in (False, True):
        inputs = make_inputs(130, 32, 24, 8, 2, how="unused", bias=bias)
        with torch.no_grad():  # values that bfloat16 holds, so that only the arithmetic errs
            inputs = [
                t.bfloat16().float().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
                for t in inputs
            ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = op(*inputs, impl=path[1], recompute=recompute)
        assert y.dtype == torch.bfloat16
        layouts = ["dense", "expanded"]
        tolerances = WITH_BIASES[torch.bfloat16] if bias else None
        run = partial(op, recompute=recompute)
        check_op(run, inputs, path[1], autocast=torch.bfloat16, layouts=layouts, tolerances=tolerances)


def test_weights_beyond_float16(monkeypatch):
    """A weight is held in two numbers of the rows' dtype, the first of which must not overflow."""
    take_path(monkeypatch, "converted")
    x, ids, weights, *matrices = make_inputs(30, 8, 6, 4, 2, dtype=torch.float16)
    matrices = [m if m is None else m.detach() / 10 for m in matrices]
    weights = weights.detach() * 1e5
    assert (weights > 65504).any()
    y = op(x, ids, weights, *matrices, impl="torch")
    wanted = op(x.float(), ids, weights, *(m if m is None else m.float() for m in matrices), impl="reference")
    assert y.isfinite().all()
    assert (y.float() - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
def test_forward_mode_is_the_references_alone():
    """And never a derivative of zero without a word."""
    x, ids, weights, *matrices = (
        t.detach() if torch.is_tensor(t) and t.is_floating_point() else t for t in make_inputs(5, 4, 3, 6, 2)
    )
    tangent = torch.randn_like(x)

    def y(x, impl):
        return op(x, ids, weights, *matrices, impl=impl)

    _, got = torch.func.jvp(lambda x: y(x, "reference"), (x,), (tangent,))
    step = 1e-3
    wanted = (y(x + step * tangent, "reference") - y(x - step * tangent, "reference")) / (2 * step)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3)
    grad = torch.func.grad(lambda x: y(x, "reference").sum())(x)
    torch.testing.assert_close(grad, torch.autograd.grad(y(x.requires_grad_(), "reference").sum(), x)[0])
    x = x.detach()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reference"):
        y(torch.autograd.forward_ad.make_dual(x, tangent), "torch")
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError):
            transform(lambda x: y(x, "torch").sum())(x)


def test_autocast_reaches_no_product_inside(monkeypatch):
    """On a CPU without bfloat16 instructions they run in float32, which autocast would undo; in backward too."""
    seen = []

    def watch(product):
        def watched(a, b, out=None):
            y = product(a, b, out)
            seen.append((a.dtype, b.dtype))
            return y

        return watched

    for name in ("multiply", "multiply_batch"):
        monkeypatch.setattr(_layout, name, watch(getattr(_layout, name)))
    monkeypatch.setattr(_products, "multiplies_natively", lambda dtype: dtype in FLOAT32_ONLY)
    for tokens in (40, 700):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = make_inputs(tokens, 8, 6, 3, 2, bias=True)
            op(*inputs, impl="torch").sum().backward()
            with torch.no_grad():
                op(*inputs, impl="torch")
        assert set(seen) == {(torch.float32, torch.float32)}
