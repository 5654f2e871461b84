"""Tensors of 2³¹ elements and more: the last rows, columns, experts and sequences come out as they do alone.

Memory that nobody touches costs nothing: operands are allocated whole, only their ends are filled, and of each launch
only the last programs run. The watched interpreter refuses every address outside of a tensor, such as those that 32
bits make of its end.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from coterie_kernels import combine, delta_rule, expert_mlp, grouped_matmul, routing, sparse_attention
from coterie_kernels.proof.count import record

LIMIT = 2**31
_ROUNDINGS = {"rtol": 0.02, "atol": 0.02}  # tiles of other heights are summed in another order
M = 20  # rows at the end that are compared
_SILU, _RELU2 = expert_mlp.Activation("silu", True), expert_mlp.Activation("relu2", False)


@pytest.fixture(autouse=True)
def _untouched_memory(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@contextmanager
def _last_programs(numbers: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]]) -> Iterator[None]:
    """numbers: of a kernel, grid → how many of its last programs run along the first axes."""
    chosen, whole = [], []

    def call(original, executor, *args, **kwargs):
        whole[:] = (*executor.grid, 1, 1)[:3]
        counts = (*numbers[executor.fn.__name__](executor.grid), 1, 1)[:3]
        axes = [range(max(0, size - count), size) for size, count in zip(whole, counts, strict=True)]
        chosen[:] = product(*axes)
        executor.grid = (len(chosen),)
        original(executor, *args, **kwargs)

    def wrap(owner, name, wrapper):
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        wrap(GridExecutor, "__call__", call)
        wrap(InterpreterBuilder, "set_grid_dim", lambda original, builder, *grid: original(builder, *whole))
        wrap(InterpreterBuilder, "set_grid_idx", lambda original, builder, i, *rest: original(builder, *chosen[i]))
        yield


def _ending_in(end: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...], untouched but for its last rows."""
    whole = torch.empty(num_rows, *end.shape[1:], dtype=end.dtype)
    whole[-len(end) :] = end
    return whole


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def _last_tile(a: Tensor, b: Tensor, outer: int, inner: int) -> Tensor:
    """The gradient's last corner [1, outer, inner]."""
    sides = a[:, -outer:].contiguous(), b[:, -inner:].contiguous()
    return grouped_matmul.multiply_columns(*sides, torch.tensor([len(a)]), bias=False)[0]


def _all_columns(grid):
    return 4, grid[1]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dim", "outer"), [(512, 24), (24, 512)])
def test_rows_of_a_product(dim, outer, transposed, gathered):
    num_rows = LIMIT // 512 + 2 * M
    counts = torch.tensor([num_rows - 2 * M, M])  # the last M belong to none
    x, weight = _randn(2 * M, dim), _randn(2, dim, outer) if transposed else _randn(2, outer, dim)
    rows = torch.arange(num_rows) if gathered else None
    with record(), _last_programs({"_multiply_rows": _all_columns}):
        y = grouped_matmul.multiply_rows(
            _ending_in(x, num_rows), weight, counts, rows=rows, transposed=transposed, bias=None
        )
    assert y.numel() >= LIMIT or num_rows * dim >= LIMIT
    alone = grouped_matmul.multiply_rows(x, weight, torch.tensor([0, M]), transposed=transposed)
    torch.testing.assert_close(y[-2 * M :], alone)
    assert not y[-M:].any()


def test_matrices_of_a_product():
    experts, width = 33, 8192  # 8192² · 33
    weight, x = _ending_in(_randn(1, width, width), experts), _randn(M, width)
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[-1] = M
    with record(), _last_programs({"_multiply_rows": lambda grid: (grid[0], 1)}):
        y = grouped_matmul.multiply_rows(x, weight, counts)
    alone = grouped_matmul.multiply_rows(x, weight[-1:, -128:], counts[-1:])
    torch.testing.assert_close(y[:, -128:], alone)
    grad = _randn(M, width)
    with record(), _last_programs({"_multiply_columns": lambda grid: (2,)}):
        grads, _ = grouped_matmul.multiply_columns(grad, x, counts, bias=False)
    alone = _last_tile(grad, x, 128, 256)
    torch.testing.assert_close(grads[-1:, -128:, -256:], alone)


@pytest.mark.parametrize("gathered", [False, True])
def test_columns_of_a_product(gathered):
    num_rows, dim = LIMIT // 8192 + M, 8192
    a, b = _randn(M, dim), _randn(M, dim)
    counts = torch.tensor([num_rows - M, M])
    rows = torch.arange(num_rows) if gathered else None
    with record(), _last_programs({"_multiply_columns": lambda grid: (1,)}):
        grad, _ = grouped_matmul.multiply_columns(
            _ending_in(a, num_rows), _ending_in(b, num_rows), counts, rows=rows, bias=False
        )
    alone = _last_tile(a, b, 128, 128)
    torch.testing.assert_close(grad[-1:, -128:, -128:], alone)


def _mlp(x, ids, grad, up, down, bias, weights, activation):
    """The results and the hidden layer; bias [E, D] is down_proj's."""
    y, *kept = expert_mlp.forward(x, ids, weights, up, down, None, bias, x, activation, True)
    needs = [True] * 4 + [False] * 2
    return (y, *expert_mlp.backward(grad, x, weights, up, down, None, bias, *kept, activation, needs)[:4]), kept[0]


_LAST = {
    "forward_kernel": _all_columns,
    "backward_kernel": _all_columns,
    "_multiply_rows": _all_columns,
    "_combine": lambda grid: (M, grid[1]),
}


# N · F, N · 2F and N · D; narrow experts in one launch, wide ones in one for each matrix.
@pytest.mark.parametrize(("hidden", "activation"), [(256, _SILU), (520, _SILU), (520, _RELU2)])
def test_rows_of_the_mlp(hidden, activation, monkeypatch):
    num_rows, dim, width = LIMIT // 512 + M, 512, 2 * hidden if activation.gated else hidden
    ids = torch.zeros(num_rows, 1, dtype=torch.int64)
    ids[-M:] = 1
    rows = torch.arange(num_rows + num_rows % 4, dtype=torch.int32)
    places, counts = torch.stack([rows, rows]), torch.tensor([num_rows - M, M])
    x, grad, weights, bias = _randn(M, dim), _randn(M, dim), torch.rand(M, 1), _randn(2, dim)
    up, down = _randn(2, width, dim) / dim**0.5, _randn(2, dim, hidden) / hidden**0.5
    big_x, big_grad, big_weights = (_ending_in(end, num_rows) for end in (x, grad, weights))
    of_last_expert = {"multiply_mlp_columns": lambda grid: (grid[0] // 2,)}
    with monkeypatch.context() as patch, record(), _last_programs(_LAST | of_last_expert):
        # It is sorted already, and the sort, which has no large offsets, takes long.
        patch.setattr(expert_mlp, "sort_slots", lambda *_: (places, counts))
        results, kept = _mlp(big_x, ids, big_grad, up, down, bias, big_weights, activation)
    assert min(kept.numel(), results[0].numel()) >= LIMIT
    alone, _ = _mlp(x, ids[:M], grad, up[1:], down[1:], bias[1:], weights, activation)
    for got, wanted in zip(results, alone, strict=True):
        torch.testing.assert_close(got[-len(wanted) :], wanted, **_ROUNDINGS)


def test_matrices_of_the_mlp():
    experts, dim, hidden = 4097, 1024, 256
    up, down, bias = _randn(1, 2 * hidden, dim) / dim**0.5, _randn(1, dim, hidden) / hidden**0.5, _randn(1, dim)
    x, grad, weights = _randn(M, dim), _randn(M, dim), torch.rand(M, 1)
    ids = torch.full((M, 1), experts - 1)
    every = dict.fromkeys(("_count", "_place", *_LAST), lambda grid: grid)
    of_last_expert = {"multiply_mlp_columns": lambda grid: (grid[0] // experts,)}
    matrices = [_ending_in(end, experts) for end in (up, down, bias)]
    assert matrices[0].numel() >= LIMIT
    with record(), _last_programs(every | of_last_expert):
        results, _ = _mlp(x, ids, grad, *matrices, weights, _SILU)
    alone, _ = _mlp(x, torch.zeros_like(ids), grad, up, down, bias, weights, _SILU)
    for got, wanted in zip(results, alone, strict=True):
        torch.testing.assert_close(got[-len(wanted) :], wanted, **_ROUNDINGS)


def test_ragged_sums():
    num_rows, dim = LIMIT // 8192 + M, 8192
    rows = _randn(M, dim)
    token = torch.arange(num_rows)
    token[-M:] -= token[-M:] % 2
    with record(), _last_programs({"_combine_ragged": lambda grid: (M, grid[1])}):
        y = combine.combine_ragged(_ending_in(rows, num_rows), token, num_rows)
    alone = combine.combine_ragged(rows, token[-M:] - token[-M], M)
    torch.testing.assert_close(y[-M:], alone)


def test_logits():
    num_tokens, experts = LIMIT // 1024 + M, 1024
    logits, grad = _randn(M, experts), torch.randn(M, 2)
    settings = ("softmax", "before", True, 1.0)
    last = {"forward_kernel": lambda grid: (M,), "backward_kernel": lambda grid: (M,)}
    with record(), _last_programs(last):
        big = _ending_in(logits, num_tokens)
        weights, ids = routing.route_topk(big, None, None, 2, *settings, 1, 1, "max")
        grads = routing.route_topk_backward(_ending_in(grad, num_tokens), big, ids, *settings)
    alone = routing.route_topk(logits, None, None, 2, *settings, 1, 1, "max")
    torch.testing.assert_close((weights[-M:], ids[-M:]), alone)
    torch.testing.assert_close(grads[-M:], routing.route_topk_backward(grad, logits, alone[1], *settings))


@pytest.mark.parametrize("decay", ["heads", "channels"])
def test_sequences_of_the_delta_rule(decay):
    """Packed, the last with M tokens: of its only chunk, and of its state's two tiles."""
    width, chunk = 64, 64
    num_tokens = LIMIT // width + M
    tensors = [_randn(M, 1, width) for _ in "qkv"]
    tensors.append(-torch.rand(M, 1, width) if decay == "channels" else -torch.rand(M, 1))
    tensors += [_randn(M, 1, width) / width, None]
    grad, state, grad_state = _randn(M, 1, width), torch.randn(1, 1, width, width), torch.randn(1, 1, width, width)

    def run(grad, tensors, state, grad_state, ends):
        o, after, *kept = delta_rule.forward(*tensors, state, ends, 1.0)
        return o, after, *delta_rule.backward(grad, grad_state, *tensors, state, ends, *kept, 1.0)

    alone = run(grad, tensors, state, grad_state, torch.tensor([0, M]))
    big = [t if t is None else _ending_in(t, num_tokens) for t in tensors]
    states = [t.expand(2, -1, -1, -1).contiguous() for t in (state, grad_state)]
    ends = torch.tensor([0, num_tokens - M, num_tokens])
    by_chunk = ("prepare_kernel", "prepare_channels_kernel", "gradients_kernel", "channel_gradients_kernel")
    last = dict.fromkeys(by_chunk, lambda grid: (1,))
    last |= dict.fromkeys(("forward_kernel", "backward_kernel"), lambda grid: (grid[0] // 2,))
    assert delta_rule.num_slots(num_tokens, 2, True, chunk) * width**2 >= LIMIT
    with record(), _last_programs(last):
        results = run(_ending_in(grad, num_tokens), big, *states, ends)
    for got, wanted in zip(results, alone, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got[-len(wanted) :], wanted)


def test_rows_of_sparse_attention():
    """The last of many rows of a batch: windows, sinks and blocks, of its queries and of its keys."""
    heads, groups, width = 2, 1, 128
    rows = LIMIT // (M * groups * width) + 2
    q, grad = _randn(1, M, heads, width), _randn(1, M, heads, width)
    k, v = _randn(1, M, groups, width), _randn(1, M, groups, width)
    ids = torch.randint(5, (1, M, groups, 1))
    seen = sparse_attention.Seen(5, 2, 4, True, width**-0.5, None)

    def run(q, k, v, ids, grad, grad_lse):
        o, lse = sparse_attention.forward(q, k, v, ids, None, None, None, seen)
        return o, lse, *sparse_attention.backward(grad, grad_lse, q, k, v, ids, None, None, None, o, lse, seen)[:3]

    alone = run(q, k, v, ids, grad, torch.ones(1, M, heads))
    assert rows * k.numel() >= LIMIT
    kernels = ("forward_kernel", "query_gradients_kernel", "key_gradients_kernel")
    big = [_ending_in(t, rows) for t in (q, k, v)]
    ids = torch.cat((torch.full((rows - 1, *ids.shape[1:]), -1), ids))
    with record(), _last_programs(dict.fromkeys(kernels, lambda grid: (grid[0] // rows,))):
        results = run(*big, ids, _ending_in(grad, rows), torch.ones(rows, M, heads))
    for got, wanted in zip(results, alone, strict=True):
        torch.testing.assert_close(got[-1:], wanted)
