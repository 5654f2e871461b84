import pytest
import torch

from coterie.models import generate


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
    growing = 3 * 10 * (4 * keys_and_values + 2 * latents) * 4  # of two layers each, sparse attention's too
    growing += 3 * 5 * keys_and_values // 2 * 4  # the means of blocks of 2, of one layer: the other takes its choice
    states = 2 * 3 * 6 * 9 * 5 * 4
    windows, masks = 2 * 3 * 4 * keys_and_values * 4, 2 * 3 * 4
    tails = 2 * 3 * (3 - 1) * (2 * 3 * 9 + 6 * 5) * 4
    wanted = growing + states + tails + windows + masks
    assert cache.nbytes == wanted
    assert small_model.new_cache(3, 20).nbytes == wanted + growing
    places = [(layer.keys if hasattr(layer, "keys") else layer.state).data_ptr() for layer in cache.layers]
    for _ in range(10):
        small_model(_ids(3, 1), cache=cache)
    assert [(layer.keys if hasattr(layer, "keys") else layer.state).data_ptr() for layer in cache.layers] == places
    assert cache.nbytes == wanted
    assert (
        small_model.new_cache(3, 10, dtype=torch.bfloat16).nbytes == states + masks + (growing + tails + windows) // 2
    )
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


# --- going back


@pytest.mark.parametrize("padding", ["none", "before", "between"])
@torch.no_grad()
def test_what_comes_after_a_rollback_is_as_if_nothing_had_been_between(small_model, padding):
    ids, guess = _ids(2, 12), _ids(2, 5, seed=2)
    masks = {"between": torch.tensor([[True, False, True, True, True], [True] * 5])}
    first = torch.arange(6) >= torch.tensor([[2], [0]]) if padding == "before" else None
    cache = small_model.new_cache(2, 12)
    small_model(ids[:, :6], token_mask=first, cache=cache)
    snapshot = cache.snapshot()
    wanted = [small_model(ids[:, 6:10], cache=cache).logits, small_model(ids[:, 10:], cache=cache).logits]
    for _ in range(2):
        cache.rollback(snapshot)
        assert cache.length == 6
        small_model(guess, token_mask=masks.get(padding), cache=cache)
    cache.rollback(snapshot)
    for at, logits in zip((slice(6, 10), slice(10, 12)), wanted, strict=True):
        got = small_model(ids[:, at], cache=cache).logits
        if padding == "between":  # there is a mask from then on, and torch takes another path with one
            torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, logits)


@torch.no_grad()
def test_greedy_generation_through_guesses_is_plain_generation(small_model):
    """As speculation goes: several guesses at once, of which the right ones stay."""
    prompt = _ids(1, 7)
    wanted = generate(small_model, prompt, 24)[0]
    cache = small_model.new_cache(1, 40)
    small_model(prompt[:, :-1], cache=cache)
    tokens, rollbacks = prompt[0].tolist(), 0
    random = torch.Generator().manual_seed(0)
    while len(tokens) < 31:
        guesses = [
            (wanted[i].item() + (torch.rand(1, generator=random) < 0.3).int().item()) % 50
            for i in range(len(tokens), min(len(tokens) + 4, 31))
        ]
        snapshot = cache.snapshot()
        chosen = small_model(torch.tensor([[tokens[-1], *guesses]]), cache=cache).logits[0].argmax(-1).tolist()
        right = next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))
        accepted = [tokens[-1], *guesses[:right]]
        if right < len(guesses):
            rollbacks += 1
            cache.rollback(snapshot)
            small_model(torch.tensor([accepted]), cache=cache)
        tokens += [*guesses[:right], chosen[right]]
    assert tokens[:31] == wanted.tolist()
    assert rollbacks > 2


@torch.no_grad()
def test_a_snapshot_copies_states_and_windows_alone(small_model):
    sizes = []
    for max_length in (10, 1000):
        cache = small_model.new_cache(3, max_length)
        small_model(_ids(3, 5), cache=cache)
        sizes.append(cache.snapshot().nbytes)
    windows, states = cache.layers[2:4], cache.layers[8:]
    block = 3 * 2 * 8 * 4  # the one that is not complete
    assert sizes == [sum(layer.nbytes for layer in (*windows, *states)) + block] * 2


@torch.no_grad()
def test_a_snapshot_whose_positions_may_be_gone_is_refused(small_model):
    cache = small_model.new_cache(1, 20)
    early = cache.snapshot()
    small_model(_ids(1, 5), cache=cache)
    late = cache.snapshot()
    cache.rollback(late)
    cache.rollback(early)
    small_model(_ids(1, 9, seed=3), cache=cache)
    with pytest.raises(ValueError, match="snapshot at length 5 is not of this cache, or later than one rolled back to"):
        cache.rollback(late)
    with pytest.raises(ValueError, match="is not of this cache"):
        small_model.new_cache(1, 20).rollback(early)
    cache.rollback(early)
    assert cache.length == 0
