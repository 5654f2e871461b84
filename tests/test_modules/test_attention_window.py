"""Attention with a window and with sink logits: what it sees, and a cache that keeps no more than that."""

import pytest
import torch

from _check import relative_error
from coterie.modules import Attention, RotaryEmbedding

WINDOW = 6


def make_layer(**settings):
    torch.manual_seed(0)
    layer = Attention(32, 4, num_kv_heads=2, window=WINDOW, **settings)
    layer.reset_parameters(0.3)
    return layer


def rotary(positions):
    return RotaryEmbedding(8)(positions)


def run(layer, x, start=0, **settings):
    return layer(x, rotary(torch.arange(start, start + x.shape[1])), **settings)


@pytest.mark.parametrize("sink_logits", [False, True])
def test_a_position_sees_its_window_and_no_more(sink_logits):
    layer, x = make_layer(sink_logits=sink_logits), torch.randn(2, 20, 32)
    y = run(layer, x)
    for at in (3, 19):
        changed = x.clone()
        changed[:, : max(at - WINDOW + 1, 0)] = 5.0
        changed[:, at + 1 :] = 5.0
        assert relative_error(run(layer, changed)[:, at], y[:, at]) < 1e-6
    changed = x.clone()
    changed[:, 19 - WINDOW + 1] = 5.0
    assert relative_error(run(layer, changed)[:, 19], y[:, 19]) > 1e-3


def test_a_wide_window_is_none():
    layer, x = make_layer(), torch.randn(2, 20, 32)
    layer.window = 20
    windowed = run(layer, x)
    layer.window = None
    assert relative_error(windowed, run(layer, x)) < 1e-6


def test_a_sink_takes_its_share():
    layer, x = make_layer(sink_logits=True), torch.randn(1, 1, 32)
    with torch.no_grad():
        layer.sink_logits.fill_(-100.0)
        alone = run(layer, x)
        queries, keys, _ = layer._project(x)  # at position 0 the rotary embedding turns nothing
        scores = (queries.view(2, 2, 8) @ keys.view(2, 8, 1)).flatten() * 8**-0.5
        layer.sink_logits.copy_(scores)  # as large as that of the only key: half of everything
        assert relative_error(run(layer, x), alone / 2) < 1e-6


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [4, 1, 9, 6], [15, 5]])
def test_pieces_with_a_cache_are_the_whole(pieces):
    layer, x = make_layer(sink_logits=True), torch.randn(2, 20, 32)
    whole, start, parts = run(layer, x), 0, []
    with torch.no_grad():
        cache = layer.new_cache(2, 100)
        for size in pieces:
            parts.append(run(layer, x[:, start : start + size], start, cache_layer=cache))
            start += size
    assert relative_error(torch.cat(parts, 1), whole) < 1e-6
    assert cache.keys.shape == (2, 2, WINDOW - 1, 8)
    assert cache.nbytes == 2 * (2 * 2 * 5 * 8 * 4) + 2 * 5


def test_a_cache_that_need_not_forget():
    assert make_layer().new_cache(2, WINDOW - 1).keys.shape == (2, 2, WINDOW - 1, 8)
    assert type(make_layer().new_cache(2, WINDOW - 1)).__name__ == "AttentionCache"


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [4, 1, 9, 6]])
def test_padding_pushes_nothing_out_of_the_window(pieces):
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, -1] = True
    layer, x = make_layer(sink_logits=True), torch.randn(2, 20, 32)
    x[~mask] = torch.nan
    turns = rotary((mask.cumsum(1) - 1).clamp(min=0))
    start, parts = 0, []
    with torch.no_grad():
        cache = layer.new_cache(2, 100)
        for size in pieces:
            at = slice(start, start + size)
            own = tuple(t[:, at] for t in turns)
            parts.append(layer(x[:, at], own, token_mask=mask[:, at], cache_layer=cache))
            start += size
    y = torch.cat(parts, 1)
    for row in range(2):
        alone = run(layer, x[row : row + 1, mask[row]])
        assert relative_error(y[row, mask[row]], alone[0]) < 1e-6


@pytest.mark.parametrize("with_mask", [False, True])
def test_rollback(with_mask):
    layer, x = make_layer(), torch.randn(2, 12, 32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = not with_mask
    with torch.no_grad():
        cache = layer.new_cache(2, 100)
        run(layer, x[:, :4], cache_layer=cache)
        snapshot = cache.snapshot()
        first = run(layer, x[:, 4:7], 4, cache_layer=cache, token_mask=mask if with_mask else None)
        run(layer, x[:, 7:], 7, cache_layer=cache)
        cache.rollback(snapshot)
        again = run(layer, x[:, 4:7], 4, cache_layer=cache, token_mask=mask if with_mask else None)
    assert torch.equal(first, again)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="window must be None or at least 1, got 0"):
        Attention(32, 4, window=0)
    layer = make_layer()
    with torch.no_grad(), pytest.raises(ValueError, match="the cache is for a batch of 2, got 1"):
        run(layer, torch.randn(1, 3, 32), cache_layer=layer.new_cache(2, 100))
    with pytest.raises(ValueError, match="a cache carries no gradients"):
        run(layer, torch.randn(2, 3, 32), cache_layer=layer.new_cache(2, 100))
