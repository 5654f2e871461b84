"""`SparseAttention`: each scorer as its paper has it, whole as in steps, and what its parts learn from."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from _check import fuzz, relative_error
from coterie.modules import Attention, RotaryEmbedding, SparseAttention
from coterie.ops import add_to_blocks, indexer_loss, select_blocks, selected_mass, sparse_attention

ROTARY = RotaryEmbedding(8)
KINDS = {
    "window": {"scorer": "window", "sinks": 2},
    "moba": {"scorer": "moba", "sinks": 1},
    "moba without a window": {"scorer": "moba", "window": 0},
    "nsa": {"scorer": "nsa"},
    "nsa, learned": {"scorer": "nsa", "compression": "learned"},
    "indexer": {"scorer": "indexer", "indexer_heads": 3},
    "indexer, sink logits": {"scorer": "indexer", "sink_logits": True, "window": 3},
}
LENGTH = 50


def make_layer(name, dtype=torch.float64, **changed):
    torch.manual_seed(0)
    settings = {"num_kv_heads": 2, "head_dim": 8, "window": 6, "block_size": 4, "num_blocks": 4, "qk_norm": "head"}
    layer = SparseAttention(24, 4, **(settings | KINDS[name] | changed)).to(dtype)
    layer.reset_parameters(0.5)
    if layer.compress_weight is not None:
        torch.nn.init.uniform_(layer.compress_weight)
    return layer


def make_x(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def rotary(length=LENGTH):
    return ROTARY(torch.arange(length))


def in_steps(layer, x, turns, cache, token_mask=None, sizes=(7, 1, 1, 12, 1, 3, 1, 1, 1, 22)):
    parts, start = [], 0
    with torch.no_grad():
        for size in sizes:
            at = slice(start, start + size)
            mask = None if token_mask is None else token_mask[:, at]
            own = tuple(t[..., at, :] for t in turns)
            parts.append(layer(x[:, at], own, token_mask=mask, cache_layer=cache))
            start += size
    return torch.cat(parts, 1)


# --- laws ---


@pytest.mark.parametrize("name", KINDS)
def test_in_steps_as_whole(name, monkeypatch):
    layer, x = make_layer(name), make_x()
    whole = layer(x, rotary())
    monkeypatch.setattr("coterie.modules.sparse_attention._SCORES", 2**9)
    torch.testing.assert_close(layer(x, rotary()), whole)  # scores of a few queries at a time
    cache = layer.new_cache(2, LENGTH)
    torch.testing.assert_close(in_steps(layer, x, rotary(), cache), whole)


@pytest.mark.parametrize("name", KINDS)
def test_padding_is_as_if_it_were_not_there(name):
    layer, x = make_layer(name), make_x()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
    turns = ROTARY((mask.cumsum(1) - 1).clamp(min=0))
    x[~mask] = torch.nan
    whole = layer(x, turns, token_mask=mask)
    assert whole.isfinite().all()
    for row in range(2):
        alone = layer(x[row : row + 1, mask[row]], rotary(int(mask[row].sum())))
        torch.testing.assert_close(whole[row, mask[row]], alone[0])
    steps = in_steps(layer, x, turns, layer.new_cache(2, LENGTH), mask)
    torch.testing.assert_close(steps[mask], whole[mask])


@pytest.mark.parametrize("name", KINDS)
def test_padding_reads_nothing_and_no_token_is_an_empty_output(name):
    layer, x = make_layer(name), make_x()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
    if layer.sink_logits is None:
        y = layer(x, ROTARY((mask.cumsum(1) - 1).clamp(min=0)), token_mask=mask)
        assert (y[~mask] == 0).all()
    assert layer(x[:, :0], rotary(0)).shape == (2, 0, 24)
    with torch.no_grad():
        cache = layer.new_cache(2, LENGTH)
        layer(x[:, :9], rotary(9), cache_layer=cache)
        assert layer(x[:, :0], rotary(0), cache_layer=cache).shape == (2, 0, 24)


@pytest.mark.parametrize("name", ["nsa, learned", "indexer"])
def test_a_cache_carries_no_gradients(name):
    layer, x = make_layer(name), make_x()
    learned = layer.compress_weight if layer.indexer is None else layer.indexer.k_proj.weight
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter is learned)
    with pytest.raises(ValueError, match="a cache carries no gradients"):
        layer(x, rotary(), cache_layer=layer.new_cache(2, LENGTH))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_rollback(name, padded):
    layer, x = make_layer(name), make_x()
    mask = None
    if padded:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, :5] = mask[1, 9:12] = False
    cache = layer.new_cache(2, LENGTH)
    positions = torch.arange(LENGTH) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    turns = ROTARY(positions)
    before, after = ([17], [9, 1]), slice(17, 27)
    in_steps(layer, x, turns, cache, mask, before[0])
    snapshot = cache.snapshot()
    later = x[:, after], tuple(t[..., after, :] for t in turns), cache, None if mask is None else mask[:, after]
    wanted = in_steps(layer, *later, before[1])
    cache.rollback(snapshot)
    wrong = torch.randn_like(x[:, after]), *later[1:]
    in_steps(layer, *wrong, [10])
    cache.rollback(snapshot)
    assert torch.equal(in_steps(layer, *later, before[1]), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_no_position_sees_a_later_one(name):
    layer, x = make_layer(name), make_x()
    before = layer(x, rotary())
    for t in (3, 16, 30):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn_like(changed[:, t + 1 :])
        assert torch.equal(layer(changed, rotary())[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("name", ["window", "moba", "indexer"])
def test_enough_of_all_is_full_attention(name):
    enough = {"num_blocks": 13} if name != "window" else {"window": LENGTH}
    layer, x = make_layer(name, sinks=0, **enough), make_x()
    full = Attention(24, 4, num_kv_heads=2, head_dim=8, qk_norm="head").double()
    full.load_state_dict({key: t for key, t in layer.state_dict().items() if not key.startswith("indexer")})
    torch.testing.assert_close(layer(x, rotary()), full(x, rotary()))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_with_scores_computed_again(name, monkeypatch):
    results = []
    for scores in (2**19, 2**9):
        monkeypatch.setattr("coterie.modules.sparse_attention._SCORES", scores)
        layer, x = make_layer(name), make_x().requires_grad_()
        y, selection = layer(x, rotary(), return_selection=True)
        loss = y.sin().sum()
        if selection is not None and selection.scores is not None:
            loss = loss + indexer_loss(selection)
        loss.backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for once, again in zip(*results, strict=True):
        assert again.abs().sum() > 0
        torch.testing.assert_close(again, once)


# --- the papers ---


def test_moba_chooses_head_by_head():
    """Its paper's words, query by query: the own block, and those before it whose means fit best."""
    layer, x = make_layer("moba without a window", num_kv_heads=4, qk_norm=None), make_x(1)
    _, selection = layer(x, rotary(), return_selection=True)
    q, k = (t.detach() for t in layer._heads(x, rotary())[:2])
    for t in range(LENGTH):
        for head in range(4):
            own = t // 4
            scores = [float(q[0, head, t] @ k[0, head, b * 4 : b * 4 + 4].mean(0)) for b in range(own)]
            best = {own, *sorted(range(own), key=lambda b: -scores[b])[:3]}
            assert {b for b in selection.block_ids[0, t, head].tolist() if b >= 0} == best


def test_nsa_of_flash_linear_attention():
    """Its branches one by one, by fla's plain references, which were written by others."""
    naive = pytest.importorskip("fla.ops.nsa.naive", exc_type=ImportError)
    layer, x = make_layer("nsa", torch.float32, num_kv_heads=1, num_blocks=6), make_x(2, dtype=torch.float32)
    y, selection = layer(x, rotary(), return_selection=True)
    q, k, v, _ = layer._heads(x, rotary())
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    means = [t[:, : LENGTH // 4 * 4].unflatten(1, (-1, 4)).mean(2) for t in (k, v)]
    compressed, _ = naive.naive_nsa_compression(q, *means, 4, 8**-0.5)
    chosen = naive.naive_nsa_selection(q, k, v, selection.block_ids, block_size=4, scale=8**-0.5)
    near = sparse_attention(q, k, v, window=6, impl="reference")
    gates = layer.branch_proj(x).sigmoid().unflatten(-1, (3, 4, 1)).unbind(2)
    mixed = sum(gate * part for gate, part in zip(gates, (compressed, chosen, near), strict=True))
    assert relative_error(y, layer.o_proj(mixed.flatten(2))) < 1e-5


def test_nsa_scores_by_the_compressed_attention_of_a_group():
    layer, x = make_layer("nsa"), make_x(1)
    _, selection = layer(x, rotary(), return_selection=True)
    q, k, _, _ = layer._heads(x, rotary())
    for t in (20, 33, 49):
        for group in range(2):
            means = k[0, group, : (t + 1) // 4 * 4].unflatten(0, (-1, 4)).mean(1)
            scores = (q[0, 2 * group : 2 * group + 2, t] @ means.mT * 8**-0.5).softmax(-1).sum(0)
            always = {0, t // 4, t // 4 - 1}
            others = [b for b in scores.argsort(descending=True).tolist() if b not in always]
            assert {*selection.block_ids[0, t, group].tolist()} == always | {*others[: 4 - len(always)]}


def test_the_indexer_scores_as_the_lightning_indexer():
    """fla's plain reference of DSA ranks keys; here a block's mean key takes a key's place."""
    naive = pytest.importorskip("fla.ops.dsa.naive", exc_type=ImportError)
    layer, x = (
        make_layer("indexer", torch.float32, window=0, block_size=1, num_blocks=8),
        make_x(2, dtype=torch.float32),
    )
    _, selection = layer(x, rotary(), return_selection=True)
    q, k, weights = layer.indexer(x, rotary())
    wanted = naive.naive_dsa_indexer(q, k.squeeze(2), weights, topk=LENGTH, activation="relu")
    scores = layer.indexer.scores(q, k, weights).squeeze(2)
    for t in range(8, LENGTH):
        for row in range(2):
            best = [s for s in wanted[row, t].tolist() if s not in (-1, t)][:7]
            own = selection.block_ids[row, t, 0].tolist()
            assert t in own
            own.remove(t)  # always chosen
            # Scores rather than keys: many are 0, and theirs breaks such ties as it comes.
            torch.testing.assert_close(scores[row, t, own].sort().values, scores[row, t, best].sort().values)
    assert torch.equal(selection.block_ids[:, :, 0], selection.block_ids[:, :, 1])


# --- selection ---


def test_select_blocks():
    scores = torch.tensor([[1.0, 5.0, 5.0, -torch.inf, 2.0, -0.0]]).expand(1, 1, 1, 6)

    def chosen(position, number, **settings):
        settings = {"local": 1} | settings
        ids = select_blocks(scores, torch.tensor([[position]]), number, 4, **settings)
        assert ids.shape == (1, 1, 1, number)
        alone = select_blocks(scores, position, number, 4, **settings)
        assert torch.equal(alone.sort().values, ids.sort().values)
        return ids.flatten().tolist()

    assert sorted(chosen(25, 3)) == [1, 2, 6]  # the own block, 6, is not among the scores
    assert sorted(chosen(25, 2)) == [1, 6]  # the lower one of two as good
    assert sorted(chosen(25, 4, first=1)) == [0, 1, 2, 6]
    assert sorted(chosen(25, 3, local=3)) == [4, 5, 6]
    assert sorted(chosen(25, 3, local=0, window=16)) == [0, 1, 2]  # 3 is the first that the window has whole
    assert sorted(chosen(25, 3, local=0, window=19)) == [-1, 0, 1]
    assert sorted(chosen(2, 3)) == [-1, -1, 0]
    assert sorted(chosen(2, 7)) == [-1] * 6 + [0]
    with pytest.raises(ValueError, match=r"num_blocks must be at least 1 and first \+ local = 3, .* got 2"):
        chosen(2, 2, first=1, local=2)


@fuzz
@hypothesis.given(
    position=st.integers(0, 60),
    number=st.integers(1, 8),
    size=st.integers(1, 5),
    window=st.integers(0, 20),
    first=st.integers(0, 2),
    local=st.integers(0, 2),
)
def test_one_query_chooses_as_many_do(position, number, size, window, first, local):
    hypothesis.assume(first + local <= number)
    generator = torch.Generator().manual_seed(position)
    scores = torch.randint(-2, 3, (2, 61, 3, 61), generator=generator).float()  # many as good
    settings = {"window": window, "first": first, "local": local}
    many = select_blocks(scores, 0, number, size, **settings)
    one = select_blocks(scores[:, position : position + 1], position, number, size, **settings)
    assert torch.equal(one.sort().values, many[:, position : position + 1].sort().values)


def test_mass_of_blocks():
    layer, x = make_layer("indexer"), make_x()
    q, k, v, _ = layer._heads(x, rotary())
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    ids = torch.randint(-1, 13, (2, LENGTH, 2, 3), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.8
    for token_mask in (None, mask):
        _, lse = sparse_attention(
            q, k, v, window=6, block_ids=ids, block_size=4, token_mask=token_mask, return_lse=True
        )
        mass = selected_mass(q, k, lse, ids, block_size=4, token_mask=token_mask)
        for row in range(2):
            kept = torch.arange(LENGTH) if token_mask is None else token_mask[row].nonzero().flatten()
            weights = torch.einsum("lhp,khp->hlk", q[row, kept], k[row, kept].repeat_interleave(2, 1)) * 8**-0.5
            weights = (weights - lse[row, kept].T.unsqueeze(-1)).exp().tril().unflatten(0, (2, 2)).sum(1)
            for t, at in enumerate(kept.tolist()):
                for group in range(2):
                    told = set()
                    for slot, block in enumerate(ids[row, at, group].tolist()):
                        wanted = (
                            0.0 if block < 0 or block in told else weights[group, t, block * 4 : block * 4 + 4].sum()
                        )
                        told.add(block)
                        torch.testing.assert_close(mass[row, at, group, slot], torch.as_tensor(wanted).double())


def test_the_indexer_learns_to_find_what_attention_looks_at():
    """From its loss alone, of a layer that is not trained."""
    layer, x = make_layer("indexer", torch.float32, window=0, num_blocks=13), make_x(8, dtype=torch.float32)
    layer.indexer.reset_parameters(0.1)
    optimizer = torch.optim.Adam(layer.indexer.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        _, selection = layer(x, rotary(), return_selection=True)
        losses.append(indexer_loss(selection))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for name, p in layer.named_parameters() if not name.startswith("indexer"))


def test_the_loss_is_a_divergence():
    layer, x = make_layer("indexer"), make_x()
    _, selection = layer(x, rotary(), return_selection=True)
    exact = selection._replace(scores=selection.mass.log().masked_fill(selection.scores == -torch.inf, -torch.inf))
    torch.testing.assert_close(indexer_loss(exact), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert indexer_loss(selection) > 0.01
    nothing = selection._replace(scores=torch.full_like(selection.scores, -torch.inf).requires_grad_())
    indexer_loss(nothing).backward()
    assert indexer_loss(nothing) == 0
    assert (nothing.scores.grad == 0).all()
    with pytest.raises(ValueError, match="selection must have scores"):
        indexer_loss(layer.eval()(x, rotary(), return_selection=True)[1])


def test_given_blocks_are_those_of_another_layer():
    chooser, taker = make_layer("moba"), make_layer("moba", scorer=None)
    assert taker.state_dict().keys() == chooser.state_dict().keys()
    taker.load_state_dict(chooser.state_dict())
    y, selection = chooser(make_x(), rotary(), return_selection=True)
    assert torch.equal(taker(make_x(), rotary(), block_ids=selection.block_ids), y)
    with pytest.raises(ValueError, match="block_ids must be given for the scorer None"):
        taker(make_x(), rotary())
    with pytest.raises(ValueError, match="block_ids must be given for the scorer None"):
        chooser(make_x(), rotary(), block_ids=selection.block_ids)


def test_compiles_into_one_graph():
    for name in ("moba", "nsa", "indexer"):
        layer, x = make_layer(name, torch.float32).eval(), make_x(dtype=torch.float32)
        torch.testing.assert_close(
            torch.compile(layer, fullgraph=True, backend="aot_eager")(x, rotary()), layer(x, rotary())
        )


@pytest.mark.parametrize("name", ["moba", "nsa, learned", "indexer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, dtype):
    layer, x = make_layer(name, torch.float32, num_blocks=13), make_x(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.to(dtype), rotary())
    assert relative_error(y.float(), layer(x, rotary())) < 0.05


def test_learned_compression_is_summed_in_float32():
    x, weights = torch.randn(1, 12, 2, 8).bfloat16(), torch.rand(4, 2, 8).bfloat16()
    wanted = (x.double().unflatten(1, (3, 4)) * weights.double()).sum(2)
    for positions in (0, torch.arange(12).unsqueeze(0)):
        blocks = torch.zeros(1, 3, 2, 8)
        add_to_blocks(blocks, x, weights, positions)
        assert relative_error(blocks, wanted) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "best"}, "scorer must be None or one of 'window', 'moba', 'nsa', 'indexer', got 'best'"),
        ({"compression": "learned"}, "compression must be .* 'mean' but for 'nsa', got 'learned' for 'moba'"),
        ({"indexer_heads": 2}, "indexer_heads must be .* None but for 'indexer', got 2 for 'moba'"),
        ({"scorer": "nsa", "num_blocks": 2}, "num_blocks must be at least 3 for 'nsa', got 2"),
        ({"scorer": "nsa", "window": 0}, "window must be at least 1 for 'nsa', got 0"),
        ({"scorer": "nsa", "sinks": 1}, "sinks and sink_logits are not of 'nsa'"),
        ({"block_size": 0}, "block_size must be at least 1 for 'moba', got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseAttention(16, 2, **settings)


def test_an_indexer_narrower_than_what_turns():
    layer = make_layer("indexer", indexer_dim=4)
    with pytest.raises(ValueError, match="indexer_dim must be at least the 8 channels that turn, got 4"):
        layer(make_x(), rotary())
