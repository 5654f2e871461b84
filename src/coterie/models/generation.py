"""Generation: one token after another, from a prompt or a batch of them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coterie.models.transformer import Transformer
from coterie.ops._autocast import autocast_dtype


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[int | Sequence[int]] = (),
    pad_token: int = 0,
    token_mask: Tensor | None = None,
    callback: Callable[[Tensor], object] | None = None,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Continue every sequence of a batch until it meets a stop or has `max_new_tokens` more.

    Args:
        model: the model; its training mode is left as it is.
        input_ids: [B, L] prompts, L ≥ 1. Prompts of different lengths are padded on the left; see token_mask.
        max_new_tokens: at most so many tokens more.
        temperature: 0 takes the likeliest token; else logits / temperature are sampled.
        top_k: sample among the k likeliest only.
        top_p: sample among the fewest likeliest whose probabilities reach p (nucleus sampling, arXiv:1904.09751),
            of what top_k and temperature left.
        seed: of a random generator for this call alone, 0 ≤ seed < 2**63; None: the global random state.
        stop: tokens, or sequences of tokens, after which a sequence is finished. A stop is part of the output; a
            sequence counts only if wholly generated.
        pad_token: what follows in a finished sequence, while others go on.
        token_mask: [B, L] bool, False = padding. The last position must be a token.
        callback: called with every step's [B] tokens as soon as they are chosen, for streaming.
        use_cache: keep keys and values; False computes everything again for every token, the same tokens slowly.
        prefill_chunk: take prompts in by so many tokens at a time, in the memory that those need; None: all at once.

    Returns:
        [B, L + n] int64, prompts included; n ≤ max_new_tokens, less if all finished early.
    """
    _check(input_ids, max_new_tokens, temperature, top_k, top_p, seed, token_mask)
    if prefill_chunk is not None and (prefill_chunk < 1 or not use_cache):
        raise ValueError(f"prefill_chunk must be at least 1, and None without a cache, got {prefill_chunk}")
    device = input_ids.device
    stops = [torch.tensor([entry] if isinstance(entry, int) else list(entry), device=device) for entry in stop]
    if not all(map(len, stops)):
        raise ValueError("stop must not have an empty sequence: it would match at once")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    batch_size, prompt_length = input_ids.shape
    # Keys and values come in autocast's dtype where it is on: kept in another, all would be cast at every step.
    dtype = autocast_dtype(device.type)
    cache = model.new_cache(batch_size, prompt_length + max_new_tokens, dtype) if use_cache else None
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    tokens, mask = input_ids.long(), token_mask
    fresh = prompt_length
    for _ in range(max_new_tokens):
        size = prefill_chunk or fresh
        masks = [None] * -(-fresh // size) if mask is None else mask[:, -fresh:].split(size, 1)
        for part, part_mask in zip(tokens[:, -fresh:].split(size, 1), masks, strict=True):
            logits = model(part, token_mask=part_mask, cache=cache, num_logits=1).logits[:, -1]
        chosen = _sample(logits.float(), temperature, top_k, top_p, generator)  # [B]
        if stops:
            chosen = chosen.masked_fill(finished, pad_token)
        tokens = torch.cat((tokens, chosen.unsqueeze(-1)), dim=-1)
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=-1)
        if callback is not None:
            callback(chosen)
        for entry in stops:
            if tokens.shape[1] - prompt_length >= len(entry):
                finished |= (tokens[:, -len(entry) :] == entry).all(-1)
        if stops and finished.all():
            break
        fresh = 1 if use_cache else tokens.shape[1]
    return tokens


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """[B, vocab] float32 → [B] int64."""
    if temperature == 0:
        return logits.argmax(-1)
    # The likeliest is 0 before the division, so that nothing overflows upwards; float32 has no smaller divisor.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits = logits[:, :top_k]
    probabilities = logits.softmax(-1)
    if top_p is not None:
        # A token stays if those before it have not reached p yet; so the first always does.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
        probabilities[:, 0].clamp_(min=torch.finfo(probabilities.dtype).tiny)
    places = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, places).squeeze(-1)


def _check(
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    token_mask: Tensor | None,
) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be [B, L] with B and L ≥ 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if input_ids.shape[1] + max_new_tokens >= 2**63:
        raise ValueError(f"max_new_tokens and the prompt must be less than 2**63 tokens, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in 0..2**63 - 1, got {seed}")
    if token_mask is not None and not token_mask[:, -1].all():
        raise ValueError("token_mask must end with a token in every sequence: pad prompts on the left")
