"""`sparse_attention`: what each query sees, said key by key; and every implementation the same."""

import importlib
from functools import partial
from itertools import pairwise

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from _check import check_op, fuzz, relative_error
from _sparse_attention import make_ids, make_inputs, op
from coterie.ops import _sparse_attention_tiles as tiles
from coterie.ops import merge_by_lse, sparse_attention

op_module = importlib.import_module("coterie.ops.sparse_attention")  # the package has the function by that name


@pytest.fixture(autouse=True)
def _tiles_for_few_keys_too(monkeypatch):
    monkeypatch.setattr(op_module, "_FEW_KEYS", 0)


def literal(q, k, v, sink_logits, *, window=None, sinks=0, block_ids=None, block_size=64, causal=True, softcap=None):
    """Query by query and key by key, in float64."""
    (batch, length, heads, width), (_, num_keys, groups, _) = q.shape, k.shape
    o = torch.zeros(batch, length, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, length, heads), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                group, at, terms, rows = h // (heads // groups), num_keys - length + i, [], []
                for j in range(num_keys):
                    near = (window is None and block_ids is None) or (window is not None and at - j < window)
                    chosen = block_ids is not None and j // block_size in block_ids[b, i, group].tolist()
                    if (near or j < sinks or chosen) and (j <= at or not causal):
                        score = float(q[b, i, h].double() @ k[b, j, group].double()) * width**-0.5
                        terms.append(
                            score if softcap is None else softcap * torch.tensor(score / softcap).tanh().item()
                        )
                        rows.append(v[b, j, group].double())
                sink = [] if sink_logits is None else [float(sink_logits[h])]
                if terms + sink:
                    weights = torch.tensor(terms + sink, dtype=torch.float64)
                    lse[b, i, h] = weights.logsumexp(0)
                    weights = weights.softmax(0)
                for weight, row in zip(weights if terms else (), rows, strict=False):
                    o[b, i, h] += weight * row
    return o, lse


SETTINGS = {
    "full": {},
    "window": {"window": 5},
    "sinks": {"window": 5, "sinks": 3},
    "blocks": {"block_size": 4, "block_ids": make_ids(2, 37, 2, 3, 9)},
    "window and blocks": {"window": 6, "block_size": 4, "block_ids": make_ids(2, 37, 2, 3, 9)},
    "all of them": {"window": 6, "sinks": 5, "block_size": 4, "block_ids": make_ids(2, 37, 2, 3, 9), "softcap": 2.0},
    "nothing": {"window": 0},
    "one block for several": {"block_size": 4, "block_ids": make_ids(2, 10, 2, 3, 9)},
}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sink", [False, True])
def test_every_query_sees_what_it_is_said_to(name, sink, impl):
    q, k, v, sink_logits = (t.detach() for t in make_inputs())
    settings, sink_logits = SETTINGS[name], sink_logits if sink else None
    o, lse = sparse_attention(q, k, v, sink_logits=sink_logits, return_lse=True, impl=impl, **settings)
    if name == "one block for several":
        settings = settings | {"block_ids": settings["block_ids"].repeat_interleave(4, 1)[:, :37]}
    wanted, wanted_lse = literal(q, k, v, sink_logits, **settings)
    torch.testing.assert_close(o.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [1.0, 8.0])
def test_tiles_are_the_dense_softmax(name, dtype, by, monkeypatch):
    """by: 8 for scores that exp would not bear as they are."""
    monkeypatch.setattr(tiles, "_KEYS", 8)
    monkeypatch.setattr(tiles, "_SCORES", 2**11)
    check_op(op, (*make_inputs(dtype=dtype, by=by), SETTINGS[name]), "torch", factor=4)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_the_last_queries_of_more_keys(name, length):
    settings = dict(SETTINGS[name])
    if "block_ids" in settings:
        settings["block_ids"] = make_ids(2, length, 2, 3, 9)
    check_op(op, (*make_inputs(length=length, num_keys=37), settings), "torch", factor=4)
    inputs = [t.detach() for t in make_inputs(length=length, num_keys=37)]
    wanted, _ = literal(*inputs, **settings)
    torch.testing.assert_close(op(*inputs, settings, "torch")[0].double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"block_size": 4, "block_ids": make_ids(2, 20, 2, 3, 9)}])
@pytest.mark.parametrize("length", [2, 20])
def test_cross_attention(settings, length):
    settings = {name: value[:, :length] if name == "block_ids" else value for name, value in settings.items()}
    inputs = make_inputs(length=length, num_keys=13)
    check_op(op, (*inputs, settings | {"causal": False}), "torch", factor=4)
    wanted, _ = literal(*(t.detach() for t in inputs), **settings, causal=False)
    torch.testing.assert_close(
        op(*inputs, settings | {"causal": False}, "torch")[0].double(), wanted, atol=1e-6, rtol=1e-5
    )


@fuzz
@hypothesis.given(
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3)),
    window=st.none() | st.integers(0, 45),
    sinks=st.integers(0, 10),
    block_size=st.integers(1, 9),
    selected=st.none() | st.integers(0, 4),
    keys=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_any_sizes(sizes, window, sinks, block_size, selected, keys, seed):
    batch, length, more, groups, shared = sizes
    inputs = make_inputs(batch, length, length + more, groups * shared, groups, 5, 3)
    settings = {"window": window, "sinks": sinks, "block_size": block_size}
    if selected is not None:
        blocks = -(-(length + more) // block_size)
        settings["block_ids"] = make_ids(batch, length, groups, selected, blocks, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_KEYS", keys)
        patch.setattr(tiles, "_SCORES", 64)
        check_op(op, (*inputs, settings), "torch", factor=6, layouts=["dense"])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["full", "sinks", "all of them"])
def test_gradients(name, impl):
    inputs = [t.double().detach().requires_grad_() for t in make_inputs(1, 9, None, 2, 1, 3, 2)]
    settings = dict(SETTINGS[name])
    if "block_ids" in settings:
        settings["block_ids"] = make_ids(1, 9, 1, 2, 3)
    assert torch.autograd.gradcheck(lambda *a: op(*a, settings, impl), inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_with_the_mask_that_it_means(groups):
    q, k, v, _ = make_inputs(groups=groups, values=8)
    at = torch.arange(37)
    mask = (at <= at.unsqueeze(1)) & ((at > at.unsqueeze(1) - 7) | (at < 2))
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    got = sparse_attention(q, k, v, window=7, sinks=2)
    grad = torch.randn_like(got)
    for a, b in zip(
        (got, *torch.autograd.grad(got, (q, k, v), grad)),
        (wanted, *torch.autograd.grad(wanted, (q, k, v), grad)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


def test_transformers_attention_of_gpt_oss():
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, sink_logits = make_inputs(values=8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, sink_logits
    at = torch.arange(37)
    mask = torch.zeros(37, 37).masked_fill((at > at.unsqueeze(1)) | (at <= at.unsqueeze(1) - 7), -torch.inf)
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    wanted, _ = theirs.eager_attention_forward(module, *rows, mask[None, None], scaling=8**-0.5)
    got = sparse_attention(q, k, v, window=7, sink_logits=sink_logits)
    leaves, grad = (q, k, v, sink_logits), torch.randn_like(got)
    for a, b in zip(
        (got, *torch.autograd.grad(got, leaves, grad)),
        (wanted, *torch.autograd.grad(wanted, leaves, grad)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


def settings_of(name, at):
    return {key: value[:, at] if key == "block_ids" else value for key, value in SETTINGS[name].items()}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["full", "all of them"])
def test_packed_sequences_are_separate_ones(name, impl):
    q, k, v, sink_logits = make_inputs(1)
    ends, ids = [0, 7, 7, 30, 37], make_ids(1, 37, 2, 3, 9)
    settings = SETTINGS[name] | ({"block_ids": ids} if name != "full" else {})
    attend = partial(sparse_attention, sink_logits=sink_logits, impl=impl)
    packed = attend(q, k, v, cu_seqlens=torch.tensor(ends), **settings)
    parts = []
    for start, stop in pairwise(ends):
        own = {key: value[:, start:stop] if key == "block_ids" else value for key, value in settings.items()}
        parts.append(attend(*(t[:, start:stop] for t in (q, k, v)), **own))
    separate, leaves = torch.cat(parts, 1), (q, k, v, sink_logits)
    grad = torch.randn_like(packed)
    for a, b in zip(
        (packed, *torch.autograd.grad(packed, leaves, grad)),
        (separate, *torch.autograd.grad(separate, leaves, grad)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["full", "all of them"])
def test_padding_is_as_if_it_were_not_there(name, impl):
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(3)) < 0.7
    q, k, v, sink_logits = make_inputs()
    with torch.no_grad():
        for t in (q, k, v):
            t[~mask] = torch.nan
    settings = SETTINGS[name]
    o, lse = sparse_attention(q, k, v, sink_logits=sink_logits, token_mask=mask, return_lse=True, impl=impl, **settings)
    grads = torch.autograd.grad(o.sum() + lse[mask].sum(), (q, k, v, sink_logits))
    assert all(g.isfinite().all() for g in grads)
    assert (o[~mask] == 0).all()
    assert (lse[~mask] == -torch.inf).all()
    for row in range(2):
        own = {key: value[row : row + 1, mask[row]] if key == "block_ids" else value for key, value in settings.items()}
        alone = sparse_attention(*(t[row : row + 1, mask[row]] for t in (q, k, v)), sink_logits=sink_logits, **own)
        assert relative_error(o[row, mask[row]], alone[0]) < 1e-6


def test_padding_in_what_came_before():
    q, k, v, _ = make_inputs(length=5, num_keys=12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4], mask[1, 9] = False, False
    o = sparse_attention(q, k, v, window=3, sinks=1, token_mask=mask)
    for row, keys in enumerate(mask):
        alone = sparse_attention(
            q[row : row + 1, keys[7:]], *(t[row : row + 1, keys] for t in (k, v)), window=3, sinks=1, impl="reference"
        )
        assert relative_error(o[row, keys[7:]], alone[0]) < 1e-6
    across = sparse_attention(q, k, v, causal=False, token_mask=mask)
    alone = sparse_attention(q[:1], k[:1, 4:], v[:1, 4:], causal=False)
    assert relative_error(across[:1], alone) < 1e-6


@pytest.mark.parametrize("name", ["full", "sinks", "blocks", "all of them"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_while_decoding(name, length, causal):
    """Every row of the batch has its own padding, one nothing else; the same as many queries at once get."""
    mask = torch.rand(3, 37, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[1], mask[0, -2:] = False, True
    q, k, v, sink_logits = make_inputs(3, length, 37)
    settings = {"causal": causal} | SETTINGS[name]
    if "block_ids" in settings:
        settings["block_ids"] = make_ids(3, length, 2, 3, 9)
    if not causal:
        settings.pop("window", None)
    unseen = mask[:, -length:] if causal else torch.ones(3, length, dtype=torch.bool)
    with torch.no_grad():
        q[~unseen] = torch.nan
        for t in (k, v):
            t[~mask] = torch.nan
    more = (q, k, v), {"sink_logits": sink_logits, "token_mask": mask, "return_lse": True, **settings}
    results = []
    for impl in ("torch", "reference"):
        o, lse = sparse_attention(*more[0], impl=impl, **more[1])
        lse = lse.masked_fill(lse == -torch.inf, 0)
        results.append((o, lse, *torch.autograd.grad(o.sin().sum() + lse.sum(), (q, k, v, sink_logits))))
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got, wanted) < 1e-6


@torch.no_grad()
def test_decoding_takes_queries_however_they_lie():
    k, v, ids = torch.randn(2, 38, 2, 8), torch.randn(2, 38, 2, 8), make_ids(2, 1, 2, 4, 10)
    settings = {"block_ids": ids, "block_size": 4, "window": 3}
    for q in (torch.randn(4, 2, 1, 8).permute(1, 2, 0, 3), torch.randn(2, 1, 8, 4).transpose(2, 3)):
        got, wanted = (sparse_attention(q, k, v, **settings, impl=impl) for impl in ("torch", "reference"))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_decoding_no_sequence_at_all(impl, length, with_sinks):
    q, k, v, sink_logits = make_inputs(0, length, 38)
    settings = {"window": 3, "sink_logits": sink_logits if with_sinks else None, "return_lse": True}
    o, lse = sparse_attention(q, k, v, **settings, impl=impl)
    assert o.shape == (0, length, q.shape[2], v.shape[3])
    assert lse.shape == o.shape[:3]


def test_an_exported_step_takes_keys_however_they_lie():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, ids):
            return sparse_attention(q, k, v, window=3, block_ids=ids, block_size=4, impl="torch")

    q, k, v, _ = (None if t is None else t.detach() for t in make_inputs(1, 1, 38))
    ids = make_ids(1, 1, 2, 4, 10)
    wanted = sparse_attention(q, k, v, window=3, block_ids=ids, block_size=4, impl="reference")
    dynamic = {"q": None, "k": {1: torch.export.Dim("n", min=8, max=500)}, "ids": None}
    program = torch.export.export(Step(), (q, k, v, ids), dynamic_shapes=dynamic | {"v": dynamic["k"]}, strict=False)
    for layout in LAYOUTS.values():
        torch.testing.assert_close(program.module()(q, layout(k), layout(v), ids), wanted)
        more = torch.cat((k, k), 1), torch.cat((v, v), 1)
        longer = sparse_attention(q, *more, window=3, block_ids=ids, block_size=4, impl="reference")
        torch.testing.assert_close(program.module()(q, *(layout(t) for t in more), ids), longer)


LAYOUTS = {
    "as they come": lambda t: t,
    "part of a cache": lambda t: torch.cat((t, t), 1).transpose(1, 2).contiguous()[:, :, : t.shape[1]].transpose(1, 2),
    "behind others": lambda t: torch.cat((t, t), 2)[:, :, t.shape[2] :],
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "wider": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@torch.no_grad()
def test_decoding_gathers_keys_however_they_lie(layout, masked, return_lse):
    """Without gradients, in every layout; the last block is not whole."""
    q, k, v, sink_logits = make_inputs(3, 2, 38)
    mask = torch.rand(3, 38, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    settings = {"token_mask": mask, "block_ids": make_ids(3, 2, 2, 4, 10), "block_size": 4, "return_lse": return_lse}
    for more in ({}, {"window": 3}, {"window": 5, "sinks": 2, "sink_logits": sink_logits}):
        wanted = sparse_attention(q, k, v, **settings, **more, impl="reference")
        got = sparse_attention(q, *(LAYOUTS[layout](t) for t in (k, v)), **settings, **more, impl="torch")
        for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, wanted)), strict=True):
            torch.testing.assert_close(one, other)


def test_merged_parts_are_the_whole():
    """Near and far, each on its own, the way NSA's branches or a cache in pieces are joined."""
    q, k, v, sink_logits = make_inputs()
    ids = torch.arange(10).expand(2, 37, 2, -1)
    far = sparse_attention(q, k, v, block_size=4, block_ids=ids[..., :5], return_lse=True)
    near = sparse_attention(q, k, v, block_size=4, block_ids=ids[..., 5:], sink_logits=sink_logits, return_lse=True)
    merged, lse = merge_by_lse([far, near])
    whole, whole_lse = sparse_attention(q, k, v, sink_logits=sink_logits, return_lse=True, impl="reference")
    leaves, grad = (q, k, v, sink_logits), torch.randn_like(whole)
    torch.testing.assert_close(lse, whole_lse)
    for a, b in zip(
        (merged, *torch.autograd.grad(merged, leaves, grad)),
        (whole, *torch.autograd.grad(whole, leaves, grad)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_no_query_sees_a_later_key(name):
    q, k, v, sink_logits = (t.detach() for t in make_inputs())
    o = op(q, k, v, sink_logits, SETTINGS[name], "torch")[0]
    for t in (3, 20):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, t + 1 :], later_v[:, t + 1 :] = 7.0, 7.0
        assert torch.equal(op(q, later_k, later_v, sink_logits, SETTINGS[name], "torch")[0][:, : t + 1], o[:, : t + 1])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_packed_sequences_without_causality(impl):
    q, k, v, _ = make_inputs(1)
    got = sparse_attention(q, k, v, causal=False, cu_seqlens=torch.tensor([0, 30, 37]), impl=impl)
    parts = [sparse_attention(*(t[:, at] for t in (q, k, v)), causal=False) for at in (slice(30), slice(30, 37))]
    assert relative_error(got, torch.cat(parts, 1)) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_gradient_is_nan_where_no_part_sees_anything(impl):
    q, k, v, _ = make_inputs()
    far = sparse_attention(
        q, k, v, block_size=4, block_ids=torch.ones(2, 37, 2, 1, dtype=torch.int64), return_lse=True, impl=impl
    )
    near = sparse_attention(q, k, v, window=0, return_lse=True, impl=impl)
    merged, lse = merge_by_lse([far, near])
    assert torch.equal(lse[:, :4], torch.full_like(lse[:, :4], -torch.inf))
    torch.testing.assert_close(merged, far[0])
    grads = torch.autograd.grad(merged.sum() + lse[:, 4:].sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad(far[0].sum() + far[1][:, 4:].sum(), (q, k, v))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("length", [2, 6])
def test_no_keys_and_ids_beyond_all_of_them(length, impl):
    q, k, v, _ = make_inputs(length=length, num_keys=0)
    o, lse = sparse_attention(q, k, v, causal=False, block_ids=make_ids(2, length, 2, 3, 1), return_lse=True, impl=impl)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    q, k, v, _ = make_inputs(length=length, num_keys=9)
    far = torch.full((2, length, 2, 1), 2**58)
    assert (sparse_attention(q, k, v, block_ids=far, impl=impl) == 0).all()
    whole = sparse_attention(q, k, v, block_ids=torch.zeros_like(far), block_size=2**20, impl=impl)
    assert relative_error(whole, sparse_attention(q, k, v, impl="reference")) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_sequence_at_all(impl):
    q, k, v, _ = make_inputs(0)
    mask = torch.ones(0, 37, dtype=torch.bool)
    assert sparse_attention(q, k, v, window=3, token_mask=mask, impl=impl).shape == (0, 37, 4, 6)


def test_autocast_changes_nothing(monkeypatch):
    monkeypatch.setattr(tiles, "multiply", torch.mm)  # as where torch's own is the fastest
    inputs = make_inputs()
    wanted = torch.autograd.grad(op(*inputs, SETTINGS["all of them"], "torch")[0].sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(op(*inputs, SETTINGS["all of them"], "torch")[0].sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_all_blocks_are_full_attention():
    q, k, v, _ = make_inputs()
    ids = torch.arange(10).expand(2, 37, 2, -1)
    full = sparse_attention(q, k, v, impl="reference")
    assert relative_error(sparse_attention(q, k, v, block_size=4, block_ids=ids), full) < 1e-6
    assert relative_error(sparse_attention(q, k, v, block_size=4, block_ids=ids, window=11), full) < 1e-6
    assert relative_error(sparse_attention(q, k, v, window=37), full) < 1e-6


def test_few_keys_are_dense(monkeypatch):
    q, k, v, _ = make_inputs()
    ids = make_ids(2, 37, 2, 3, 9)
    by_tiles = sparse_attention(q, k, v, block_ids=ids, block_size=4)
    monkeypatch.setattr(op_module, "_FEW_KEYS", 37)
    monkeypatch.setattr(tiles, "attend", None)
    assert relative_error(sparse_attention(q, k, v, block_ids=ids, block_size=4), by_tiles) < 1e-6


def test_the_same_bits_every_time():
    inputs = make_inputs()
    first, second = (
        torch.autograd.grad(op(*inputs, SETTINGS["all of them"], "torch")[0].sum(), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_kept_grows_with_the_length_alone():
    def kept(length):
        q, k, v, _ = make_inputs(1, length)
        ids = make_ids(1, length, 2, 3, length // 8)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            sparse_attention(q, k, v, window=16, block_size=8, block_ids=ids)
        return sum(sizes)

    assert kept(512) == 4 * kept(128)


def test_opcheck():
    q, k, v, sink_logits = make_inputs(1, 9)
    args = (q, k, v, make_ids(1, 9, 2, 2, 3), sink_logits, 3, 1, 4, True, 0.5, None)
    torch.library.opcheck(torch.ops.coterie.sparse_attention.default, args)
    o, lse = (t.detach() for t in torch.ops.coterie.sparse_attention.default(*args))
    tensors = [t.detach() for t in args[:5]]
    backward = torch.ops.coterie.sparse_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(o), torch.randn_like(lse), *tensors, o, lse, *args[5:]))


def test_compiles_into_one_graph():
    def loss(q, k, v, sink_logits):
        return op(q, k, v, sink_logits, {"window": 5, "sinks": 2}, "torch")[0].square().sum()

    torch.compiler.reset()
    inputs = make_inputs()
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, "window must be None or at least 0"),
        ({"window": 3, "causal": False}, "None where causal=False, got 3"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        (
            {"block_ids": torch.zeros(2, 5, 2, 1, dtype=torch.int64)},
            "must be for all 37 queries or for their 1 blocks of 64",
        ),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must have shape \[H\] = \[4\], got \(3,\)"),
        ({"token_mask": torch.ones(2, 36, dtype=torch.bool)}, r"token_mask must have shape"),
        ({"cu_seqlens": torch.tensor([0, 37])}, "cu_seqlens needs B = 1"),
        ({"impl": "fast"}, "impl must be one of 'reference', 'torch', 'triton', got 'fast'"),
    ],
)
def test_wrong_arguments(change, message):
    q, k, v, _ = make_inputs()
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, **change)


def test_wrong_shapes():
    q, k, v, _ = make_inputs()
    with pytest.raises(ValueError, match="k must have heads that divide q's 3"):
        sparse_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="k must have at least the 37 positions of q where it is causal, got 36"):
        sparse_attention(q, k[:, 1:], v[:, 1:])
    with pytest.raises(TypeError, match=r"block_ids must be torch\.int64"):
        sparse_attention(q, k, v, block_ids=torch.zeros(2, 37, 2, 1))
