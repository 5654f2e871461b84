"""`sparse_attention` in Triton, under its interpreter: the dense softmax in float64, and the laws of what is seen."""

from functools import partial
from itertools import pairwise

import pytest
import torch

import _check
from _check import relative_error
from _sparse_attention import make_ids, make_inputs, op
from coterie.ops import merge_by_lse, selected_mass, sparse_attention
from coterie_kernels import sparse_attention as kernels
from coterie_kernels.proof.count import record
from coterie_kernels.tiles import TILES

# As in test_sparse_attention: tiles' arithmetic is not one softmax's.
check_op = partial(_check.check_op, impl="triton", factor=4, layouts=["dense"])
triton = partial(sparse_attention, impl="triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def blocks(batch, length, groups, num_keys, size=4, selected=3, **more):
    return {"block_ids": make_ids(batch, length, groups, selected, -(-num_keys // size)), "block_size": size, **more}


def results(attend, inputs, **settings):
    """o, and its gradients to every tensor."""
    leaves = [t for t in inputs if t is not None]
    o = attend(*inputs[:3], sink_logits=inputs[3], **settings)
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.dtype)
    return o, *torch.autograd.grad(o, leaves, grad)


def assert_same(got, wanted, bound=3e-6):
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_sinks(dtype, softcap):
    for settings in ({}, {"window": 5}, {"window": 65, "sinks": 3}, {"window": 0}, {"window": 0, "sinks": 4}):
        inputs = make_inputs(1, 70, heads=2, groups=1, dtype=dtype)
        check_op(op, (*inputs, settings | {"softcap": softcap}))
    check_op(op, (*inputs, {"window": 65, "sinks": 3}), layouts=["expanded", "strided"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [{}, {"window": 6}, {"window": 6, "sinks": 5, "softcap": 2.0}])
def test_blocks(dtype, more):
    check_op(op, (*make_inputs(1, 17, heads=2, groups=1, dtype=dtype), blocks(1, 17, 1, 17, **more)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 24)])
def test_mass_of_blocks(groups, size, masked, dtype):
    """Some repeated, some not there; of the last queries of more keys; a part of a cache."""
    q, k, v, _ = make_inputs(2, 9, 30, 4, groups, dtype=dtype)
    q, k, v = (t.detach() for t in (q, k, v))
    k = torch.cat((k, k), 1)[:, :30]
    settings = blocks(2, 9, groups, 30, size)
    mask = torch.rand(2, 30) < 0.7 if masked else None
    _, lse = sparse_attention(q, k, v, **settings, window=3, token_mask=mask, return_lse=True, impl="reference")
    settings |= {"token_mask": mask}
    got = selected_mass(q, k, lse, **settings, impl="triton")
    wanted = selected_mass(q.double(), k.double(), lse.double(), **settings, impl="torch")
    assert got.dtype == torch.float32
    assert wanted.count_nonzero() > 10
    assert relative_error(got, wanted) < (1e-5 if dtype == torch.float32 else 1e-3)
    torch.library.opcheck(
        torch.ops.coterie.selected_mass_triton.default, (q, k, lse, settings["block_ids"], mask, size, 0.3)
    )


def test_mass_of_nothing():
    q, k, _, _ = make_inputs(1, 3, heads=2, groups=1)
    for length, selected in ((3, 0), (0, 2)):
        ids = torch.zeros(1, length, 1, selected, dtype=torch.long)
        lse = torch.zeros(1, length, 2)
        assert selected_mass(q[:, :length], k, lse, ids, block_size=2, impl="triton").shape == ids.shape


@pytest.mark.parametrize("shared", [1, 2, 3, 4, 20])
def test_heads_that_share_keys(shared):
    inputs = make_inputs(1, 7, 12, 2 * shared, 2)
    check_op(op, (*inputs, {"window": 4, "sinks": 1}))
    check_op(op, (*inputs, blocks(1, 7, 2, 12, window=3)))


@pytest.mark.parametrize("widths", [(1, 1), (16, 64), (130, 20), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(widths, dtype):
    inputs = make_inputs(1, 9, 40, 2, 1, *widths, dtype=dtype)
    check_op(op, (*inputs, {"window": 20}))
    check_op(op, (*inputs, blocks(1, 9, 1, 40, 8, window=5)))


@pytest.mark.parametrize("size", [1, 3, 16, 17, 65, 100, 200])
def test_blocks_of_every_size(size):
    """Less than a tile, a few in one, more than one, and beyond the keys."""
    check_op(op, (*make_inputs(1, 5, 150, 2, 1), blocks(1, 5, 1, 150, size, 2, window=9, sinks=5)))


@pytest.mark.parametrize("length", [1, 31, 64, 65])
def test_tiles_of_every_length(length):
    for settings in ({}, {"window": length // 2 + 1, "sinks": 2}):
        check_op(op, (*make_inputs(1, length, heads=1, groups=1), settings))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4, 5, 20])
def test_the_last_queries_of_more_keys(length, monkeypatch):
    """Split by their keys too, four tiles at a time."""
    launched = []
    combine = kernels.combine_kernel
    monkeypatch.setattr(kernels, "combine_kernel", _Told(combine, launched))
    inputs = make_inputs(1, length, 500, 2, 1)
    check_op(op, (*inputs, {}))
    assert launched == [1]
    if length <= 5:
        check_op(op, (*inputs, blocks(1, length, 1, 500, 16, 12, window=70, sinks=20)))
        assert len(launched) == (2 if length <= 4 else 1)


class _Told:
    """A kernel that tells when it is launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(1)
        return self.kernel[grid]


def test_keys_of_a_longer_cache_are_not_copied():
    """A part of each row, and heads before positions."""
    q, k, v, _ = (t.detach() for t in make_inputs(2, 2, 80))
    wanted = triton(q, k, v)
    wide = torch.full((2, 2, 100, 8), torch.nan)
    wide[:, :, :80] = k.transpose(1, 2)
    part = wide[:, :, :80].transpose(1, 2)
    with record() as counted:
        assert torch.equal(triton(q, part, v), wanted)
    assert counted.launches[0].arguments["k_ptr"].num_bytes == wide.nbytes


@pytest.mark.parametrize("length", [2, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention(length, dtype):
    inputs = make_inputs(1, length, 13, 2, 1, dtype=dtype)
    check_op(op, (*inputs, {"causal": False}))
    check_op(op, (*inputs, blocks(1, length, 1, 13, causal=False, sinks=2)))


@pytest.mark.parametrize("kind", ["full", "window", "blocks"])
def test_packed_sequences_are_separate_ones(kind):
    ends, inputs = [0, 7, 7, 8, 24], make_inputs(1, 24, heads=2, groups=1)
    settings = {"full": {}, "window": {"window": 5, "sinks": 2}, "blocks": blocks(1, 24, 1, 24, window=3, sinks=1)}[
        kind
    ]

    def separate(*tensors, sink_logits, **settings):
        parts = []
        for start, stop in pairwise(ends):
            own = {name: t[:, start:stop] if name == "block_ids" else t for name, t in settings.items()}
            sequence = (t[:, start:stop] for t in tensors)
            parts.append(sparse_attention(*sequence, sink_logits=sink_logits, impl="reference", **own))
        return torch.cat(parts, 1)

    got = results(triton, inputs, cu_seqlens=torch.tensor(ends), **settings)
    assert_same(got, results(separate, inputs, **settings))


@pytest.mark.parametrize("kind", ["sinks", "blocks", "packed", "padding"])
def test_keys_that_many_see_have_several_programs(kind, monkeypatch):
    """The first block, and with it the first of three tiles, which all but the first queries select."""
    monkeypatch.setitem(TILES["sm_90"]["float32 attention_key_gradients"], 32, (16, 16, 4, 1))
    monkeypatch.setattr(kernels, "_share", lambda usual: 15)
    tables, launched = [], []
    make = kernels.work_table
    monkeypatch.setattr(kernels, "work_table", lambda *a: tables.append(make(*a)) or tables[0])
    monkeypatch.setattr(kernels, "sum_parts_kernel", _Told(kernels.sum_parts_kernel, launched))
    settings = {"window": 3, "sinks": 2}
    if kind != "sinks":
        settings |= {"block_ids": torch.tensor([0, 0, 1]).expand(1, 40, 1, -1), "block_size": 4}
    settings |= {"cu_seqlens": torch.tensor([0, 4, 40])} if kind == "packed" else {}
    settings |= {"token_mask": torch.arange(40)[None] % 15 != 2} if kind == "padding" else {}
    inputs = make_inputs(1, 40, heads=2, groups=1)
    got = results(triton, inputs, **settings)
    assert launched == [1, 1]
    assert tables[0][..., 7].max() > 1
    assert_same(got, results(partial(sparse_attention, impl="reference"), inputs, **settings))


def test_packed_sequences_without_causality():
    inputs = make_inputs(1, 37)
    settings = {"causal": False, "cu_seqlens": torch.tensor([0, 30, 37])}
    attend = partial(sparse_attention, impl="reference")
    assert_same(results(triton, inputs, **settings), results(attend, inputs, **settings))


@pytest.mark.parametrize("kind", ["full", "window", "blocks"])
@pytest.mark.parametrize("num_keys", [9, 25])
def test_padding_is_as_if_it_were_not_there(kind, num_keys):
    """Anywhere, whatever it contains, in what came before the queries too; packed in one row too."""
    settings = {"full": {}, "window": {"window": 5, "sinks": 2}, "blocks": blocks(2, 9, 1, 9, window=3, sinks=1)}[kind]
    mask = torch.rand(2, num_keys, generator=torch.Generator().manual_seed(3)) < 0.6
    is_query = mask[:, num_keys - 9 :]
    inputs = make_inputs(2, 9, num_keys, 2, 1)
    with torch.no_grad():
        inputs[0][~is_query] = torch.nan
        for t in inputs[1:3]:
            t[~mask] = torch.nan
    for packed in (None, [0, 5, 9]) if num_keys == 9 else (None,):
        tensors = [t if packed is None or t.dim() == 1 else t[:1].detach().requires_grad_() for t in inputs]
        own = {name: t[:1] if packed and name == "block_ids" else t for name, t in settings.items()}
        own |= {"token_mask": mask if packed is None else mask[:1]}
        own |= {} if packed is None else {"cu_seqlens": torch.tensor(packed)}
        got = results(triton, tensors, **own)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        assert_same(got, results(partial(sparse_attention, impl="reference"), exact, **own))
        assert all(t.isfinite().all() for t in got)
        _, lse = triton(*tensors[:3], sink_logits=tensors[3], return_lse=True, **own)
        assert (lse[~is_query[: len(lse)]] == -torch.inf).all()


def test_padding_without_causality():
    inputs, mask = make_inputs(2, 5, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4], mask[1, 9] = False, False
    settings = {"causal": False, "token_mask": mask}
    attend = partial(sparse_attention, impl="reference")
    assert_same(results(triton, inputs, **settings), results(attend, inputs, **settings))
    mask[:] = False
    assert not triton(*inputs[:3], **settings).any()


def test_all_blocks_are_full_attention():
    inputs = make_inputs(1, 17, heads=2, groups=1)
    ids = torch.arange(5).expand(1, 17, 1, -1)
    wanted = results(partial(sparse_attention, impl="reference"), inputs)
    assert_same(results(triton, inputs, block_size=4, block_ids=ids), wanted)
    assert_same(results(triton, inputs, block_size=4, block_ids=ids, window=6), wanted)
    assert_same(results(triton, inputs, window=17), wanted)


def test_no_gradient_is_nan_where_no_part_sees_anything():
    q, k, v, _ = make_inputs(1, 13, heads=2, groups=1)
    ids = torch.ones(1, 13, 1, 1, dtype=torch.int64)
    far = triton(q, k, v, block_size=4, block_ids=ids, return_lse=True)
    near = triton(q, k, v, window=0, return_lse=True)
    merged, lse = merge_by_lse([far, near])
    assert (lse[:, :4] == -torch.inf).all()
    torch.testing.assert_close(merged, far[0])
    grads = torch.autograd.grad(merged.sum() + lse[:, 4:].sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad(far[0].sum() + far[1][:, 4:].sum(), (q, k, v))
    assert_same(grads, wanted)


def test_ids_beyond_all_keys_and_no_keys():
    q, k, v, _ = make_inputs(1, 6, 9)
    far = torch.full((1, 6, 2, 1), 2**58)
    assert not triton(q, k, v, block_ids=far).any()
    whole = triton(q, k, v, block_ids=torch.zeros_like(far), block_size=2**20)
    assert relative_error(whole, sparse_attention(q, k, v, impl="reference")) < 1e-6
    nothing = triton(q, k, v, block_ids=far[..., :0])
    assert not nothing.any()
    o, lse = triton(q, k[:, :0], v[:, :0], causal=False, return_lse=True)
    assert not o.any()
    assert (lse == -torch.inf).all()
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert not grad.any()


def test_no_query_at_all():
    for inputs in (make_inputs(0, 5), make_inputs(1, 0, 7)):
        o, *grads = results(triton, inputs, window=3, sinks=1)
        assert o.shape == (*inputs[0].shape[:3], 6)
        assert not any(grad.any() for grad in grads)


def test_no_query_sees_a_later_key():
    q, k, v, sink_logits = (t.detach() for t in make_inputs(1, 20, heads=2, groups=1))
    settings = blocks(1, 20, 1, 20, window=5, sinks=2)
    o = triton(q, k, v, sink_logits=sink_logits, **settings)
    for t in (3, 12):
        later = [torch.cat((x[:, : t + 1], torch.full_like(x[:, t + 1 :], 7.0)), 1) for x in (k, v)]
        assert torch.equal(triton(q, *later, sink_logits=sink_logits, **settings)[:, : t + 1], o[:, : t + 1])


def test_scores_that_exp_would_not_bear():
    for dtype in DTYPES:
        check_op(op, (*make_inputs(1, 40, by=8.0, dtype=dtype), {"window": 20, "sinks": 2}))


def test_the_same_bits_every_time():
    inputs = make_inputs(1, 14, heads=2, groups=1, dtype=torch.bfloat16)
    settings = blocks(1, 14, 1, 14, window=5, sinks=2)
    first, second = (results(triton, inputs, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 9)
    wanted = results(triton, inputs, window=4)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(triton, inputs, window=4)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    q, k, v, sink_logits = make_inputs(1, 6, heads=2, groups=1)
    layout = (torch.tensor([0, 4, 6]), torch.arange(6)[None] != 2) if packed else (None, None)
    args = (q, k, v, make_ids(1, 6, 1, 2, 3), None if packed else sink_logits, *layout, 3, 1, 4, True, 0.5, None)
    torch.library.opcheck(torch.ops.coterie.sparse_attention_triton.default, args)
    o, lse = (t.detach() for t in torch.ops.coterie.sparse_attention_triton.default(*args))
    tensors = [t if t is None else t.detach() for t in args[:7]]
    backward = torch.ops.coterie.sparse_attention_triton_backward.default
    torch.library.opcheck(backward, (torch.randn_like(o), torch.randn_like(lse), *tensors, o, lse, *args[7:]))


def test_compiles_into_one_graph():
    """With padding and packed sequences too, which no other impl can."""
    ends, mask = torch.tensor([0, 9, 20]), torch.arange(20)[None] != 3

    def loss(q, k, v, sink_logits):
        settings = {"window": 5, "sinks": 2, "cu_seqlens": ends, "token_mask": mask}
        return op(q, k, v, sink_logits, settings, "triton")[0].square().sum()

    torch.compiler.reset()
    inputs = make_inputs(1, 20)
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_bytes_kept_for_backward():
    """The arguments, the output and log Z."""
    inputs, saved = make_inputs(1, 40, dtype=torch.bfloat16), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = triton(*inputs[:3], sink_logits=inputs[3], window=16)
    assert sum(saved.values()) == sum(t.nbytes for t in (*inputs, o)) + 40 * 4 * 4


def test_what_it_does_not_take_is_told():
    with pytest.raises(ValueError, match="keys and values may have 256 channels at most, got 257"):
        triton(*make_inputs(1, 3, width=257)[:3])
    with pytest.raises(TypeError, match=r"impl='triton' computes in float16, bfloat16, float32, got torch.float64"):
        triton(*(t.double() for t in make_inputs(1, 3)[:3]))


def test_padding_in_front_that_chose_no_block():
    """Of a first row whose padding has nothing before it: no key is read there, and nothing comes out."""
    q, k, v, _ = make_inputs(2, 12, heads=2, groups=1, values=8)
    mask = torch.arange(12) >= torch.tensor([[3], [0]])
    with torch.no_grad():
        for t in (q, k, v):
            t[~mask] = torch.nan
    ids = torch.full((2, 12, 1, 3), -1)
    ids[:, 6:, :, 0] = 0
    results = []
    for impl in ("triton", "reference"):
        o, lse = sparse_attention(q, k, v, block_ids=ids, block_size=4, token_mask=mask, return_lse=True, impl=impl)
        grads = torch.autograd.grad(o.sin().sum() + lse[mask & (lse[..., 0] > -torch.inf)].sum(), (q, k, v))
        assert (o[~mask] == 0).all()
        assert (lse[~mask] == -torch.inf).all()
        results.append((o, *grads))
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got, wanted) < 1e-5
