import pytest
import torch


def _ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def _in_pieces(model, ids, token_mask, splits):
    cache = model.new_cache(ids.shape[0], ids.shape[1])
    logits, start = [], 0
    for length in splits:
        at = slice(start, start + length)
        step_mask = None if token_mask is None else token_mask[:, at]
        logits.append(model(ids[:, at], token_mask=step_mask, cache=cache).logits)
        start += length
        assert cache.length == start
    return torch.cat(logits, 1)


@pytest.mark.parametrize("splits", [(20,), (1,) * 20, (13, 1, 1, 1, 4), (1, 18, 1)])
@pytest.mark.parametrize("padding", ["none", "left", "anywhere"])
@torch.no_grad()
def test_cached_equals_uncached(small_model, splits, padding):
    ids = _ids(3, 20)
    token_mask = None
    if padding == "left":
        token_mask = torch.arange(20) >= torch.tensor([[0], [4], [15]])
    elif padding == "anywhere":
        token_mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    kept = slice(None) if token_mask is None else token_mask
    got, wanted = _in_pieces(small_model, ids, token_mask, splits), small_model(ids, token_mask=token_mask).logits
    torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_may_come_late_and_leave_again(small_model):
    ids = _ids(2, 12)
    token_mask = torch.ones(2, 12, dtype=torch.bool)
    token_mask[0, 5:7] = False
    cache = small_model.new_cache(2, 12)
    parts = [
        small_model(ids[:, :4], cache=cache).logits,
        small_model(ids[:, 4:8], token_mask=token_mask[:, 4:8], cache=cache).logits,
        small_model(ids[:, 8:], cache=cache).logits,
    ]
    wanted = small_model(ids, token_mask=token_mask).logits
    torch.testing.assert_close(torch.cat(parts, 1)[token_mask], wanted[token_mask], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_is_taken_once_and_counted(small_model, small_config):
    cache = small_model.new_cache(3, 10)
    keys_and_values = 2 * small_config.num_kv_heads * small_config.head_dim
    latents = small_config.kv_rank + small_config.rotary_dim
    wanted = 3 * 10 * (2 * keys_and_values + 2 * latents) * 4  # of two layers each
    assert cache.nbytes == wanted
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(10):
        small_model(_ids(3, 1), cache=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert cache.nbytes == wanted
    assert small_model.new_cache(3, 10, dtype=torch.bfloat16).nbytes == wanted // 2
    assert small_model.new_cache(1).max_length == small_config.max_length


@torch.no_grad()
def test_a_full_cache_says_so_and_stays_whole(small_model):
    ids = _ids(1, 9)
    cache = small_model.new_cache(1, 9)
    small_model(ids[:, :6], cache=cache)
    with pytest.raises(ValueError, match=r"cache is full: it holds 6 of at most 9 positions, and 4 more came"):
        small_model(_ids(1, 4), cache=cache)
    rest = small_model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(rest, small_model(ids).logits[:, 6:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bf16_cache_in_a_float32_model_is_close(small_model):
    ids = _ids(2, 12)
    cache = small_model.new_cache(2, 12, dtype=torch.bfloat16)
    parts = [small_model(ids[:, at : at + 4], cache=cache).logits for at in (0, 4, 8)]
    wanted = small_model(ids).logits
    assert (torch.cat(parts, 1) - wanted).norm() / wanted.norm() < 2e-2


def test_a_cache_refuses_to_cut_gradients_and_other_batches(small_model):
    with pytest.raises(ValueError, match="no_grad"):
        small_model(_ids(1, 3), cache=small_model.new_cache(1, 5))
    with torch.no_grad(), pytest.raises(ValueError, match="batch of 2, got 1"):
        small_model(_ids(1, 3), cache=small_model.new_cache(2, 5))
    with pytest.raises(ValueError, match="batch_size and max_length"):
        small_model.new_cache(0, 5)
