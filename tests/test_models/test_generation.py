from types import SimpleNamespace

import pytest
import torch

from coterie.models import generate


def _ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


class _Fixed(torch.nn.Module):
    """A "model" whose next-token logits are always the same: sampling alone is tested."""

    def __init__(self, logits):
        super().__init__()
        self.fixed = logits

    def new_cache(self, *_):
        return None

    def forward(self, ids, **_):
        return SimpleNamespace(logits=self.fixed.expand(ids.shape[0], 1, -1))


def _frequencies(probabilities, draws=20000, **options):
    model = _Fixed(torch.tensor(probabilities).log())
    prompts = torch.zeros(draws, 1, dtype=torch.int64)
    tokens = generate(model, prompts, 1, temperature=options.pop("temperature", 1.0), seed=0, **options)
    return torch.bincount(tokens[:, 1], minlength=len(probabilities)) / draws


@torch.no_grad()
def test_greedy_takes_the_likeliest_every_time(small_model):
    tokens = _ids(2, 5)
    got = generate(small_model, tokens, 10)
    for _ in range(10):
        tokens = torch.cat((tokens, small_model(tokens).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_and_uncached_give_the_same_tokens(small_model, temperature, padded):
    ids = _ids(3, 8)
    token_mask = torch.arange(8) >= torch.tensor([[0], [3], [7]]) if padded else None
    options = {"temperature": temperature, "seed": 3, "top_k": 20, "top_p": 0.95, "token_mask": token_mask}
    cached = generate(small_model, ids, 20, **options)
    assert torch.equal(cached, generate(small_model, ids, 20, use_cache=False, **options))
    assert cached.shape == (3, 28)
    for chunk in (1, 3, 8, 50):
        assert torch.equal(generate(small_model, ids, 20, prefill_chunk=chunk, **options), cached)


def test_left_padding_changes_no_sequence(small_model):
    prompts = [_ids(1, length, seed=length) for length in (2, 9, 5)]
    batch = torch.full((3, 9), 17)
    token_mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :] = prompt
        token_mask[row, 9 - prompt.shape[1] :] = True
    together = generate(small_model, batch, 15, token_mask=token_mask)
    for row, prompt in enumerate(prompts):
        alone = generate(small_model, prompt, 15)
        assert torch.equal(together[row, 9:], alone[0, prompt.shape[1] :])


def test_a_seed_is_the_call_s_own(small_model):
    ids = _ids(2, 4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(small_model, ids, 12, temperature=1.0, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(generate(small_model, ids, 12, temperature=1.0, seed=7), first)
    assert not torch.equal(generate(small_model, ids, 12, temperature=1.0, seed=8), first)
    torch.manual_seed(0)
    from_global = generate(small_model, ids, 12, temperature=1.0)
    torch.manual_seed(0)
    assert torch.equal(generate(small_model, ids, 12, temperature=1.0), from_global)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.6, 0.4 + 0.3 does
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # 4/7 of what top_k left reaches 0.5 alone
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1e-4}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),  # 0 in float32
        ({"temperature": 1e300}, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_samples_from_the_distribution(options, wanted):
    got = _frequencies([0.1, 0.4, 0.2, 0.3], **options)
    wanted = torch.tensor(wanted, dtype=torch.float32)
    assert (got[wanted == 0] == 0).all()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.015)  # four standard errors of 20,000 draws


def test_every_sequence_finishes_on_its_own(small_model):
    ids = _ids(4, 6)
    free = generate(small_model, ids, 20)[:, 6:]
    stop = free[0, 3].item()
    got = generate(small_model, ids, 20, stop=[stop], pad_token=49)[:, 6:]
    lengths = []
    for row, wanted in zip(got, free, strict=True):
        places = (wanted == stop).nonzero().flatten().tolist()
        end = places[0] + 1 if places else 20
        assert torch.equal(row[:end], wanted[:end])
        assert (row[end:] == 49).all()
        lengths.append(end)
    assert lengths[0] <= 4
    assert got.shape[1] == max(lengths)


def test_stop_sequences_end_with_their_last_token_and_ignore_the_prompt(small_model):
    ids = _ids(1, 6)
    free = generate(small_model, ids, 20)[0]
    sequence = free[10:13].tolist()
    first = next(i for i in range(6, 24) if free[i : i + 3].tolist() == sequence)
    got = generate(small_model, ids, 20, stop=[sequence, (48, 48, 48, 48)])[0]
    assert torch.equal(got, free[: first + 3])
    across = free[5:7].tolist()  # its first half is the prompt's
    if across not in [free[i : i + 2].tolist() for i in range(6, 25)]:
        assert torch.equal(generate(small_model, ids, 20, stop=[across])[0], free)


def test_streams_every_step(small_model):
    ids = _ids(2, 3)
    steps = []
    got = generate(small_model, ids, 7, callback=steps.append)
    assert torch.equal(torch.stack(steps, 1), got[:, 3:])


def test_nothing_new_is_the_prompt_and_grad_mode_is_restored(small_model):
    ids = _ids(2, 3)
    assert torch.equal(generate(small_model, ids, 0), ids)
    assert torch.is_grad_enabled()
    tokens = generate(small_model, ids, 3)
    small_model(tokens).logits.sum().backward()  # an inference tensor would raise here


def test_under_autocast_the_cache_is_in_autocast_s_dtype(small_model):
    dtypes = []
    new_cache = small_model.new_cache
    small_model.new_cache = lambda *args: dtypes.append(args[-1]) or new_cache(*args)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generate(small_model, _ids(1, 4), 6)
    assert dtypes == [torch.bfloat16]
    assert tokens.shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"max_new_tokens": 10**24}, r"max_new_tokens and the prompt must be less than 2\*\*63 tokens, got 1000"),
        ({"max_new_tokens": 2**63 - 3}, "max_new_tokens and the prompt"),  # the prompt has three
        ({"seed": -1}, r"seed must be in 0..2\*\*63 - 1, got -1"),
        ({"seed": 2**63}, "seed must be in .* got 9223372036854775808"),
        ({"temperature": -0.5}, "temperature must be finite and not negative, got -0.5"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, and None without a cache, got 0"),
        ({"prefill_chunk": 2, "use_cache": False}, "prefill_chunk must be .* None without a cache, got 2"),
        ({"stop": [[]]}, "stop must not have an empty sequence"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"input_ids must be \[B, L\] with B and L ≥ 1"),
        ({"token_mask": torch.tensor([[True, True, False]])}, "token_mask must end with a token"),
    ],
)
def test_wrong_arguments_are_named(small_model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model, **{"input_ids": _ids(1, 3), "max_new_tokens": 2, **options})
