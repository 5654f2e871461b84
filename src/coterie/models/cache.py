"""The keys and values of all layers, kept between the steps of generation."""

import torch
from torch import Tensor

from coterie.modules.attention import AttentionCache


class KVCache:
    """What a model remembers of the positions it has seen, in memory that is taken once.

    `Transformer.new_cache` makes it, `Transformer.forward(..., cache=cache)` fills it: every call appends its
    positions. One that would not fit raises ValueError and leaves the cache as it was.

    Attributes:
        layers: one cache a layer, as its mixer made it.
        length: positions filled, padding included.
        max_length: positions there is room for.
    """

    def __init__(self, layers: list[AttentionCache], max_length: int) -> None:
        self.layers = layers
        self.max_length = max_length
        self.length = 0
        self._counts: Tensor | None = None  # [B] tokens seen, without padding; None: no padding so far

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, filled or not."""
        return sum(layer.nbytes for layer in self.layers)

    def positions(self, input_ids: Tensor, token_mask: Tensor | None) -> Tensor:
        """Where the next tokens stand: [L] if no sequence has padding so far, else [B, L]."""
        return token_positions(input_ids, token_mask, self.length if self._counts is None else self._counts)

    def advance(self, input_ids: Tensor, token_mask: Tensor | None) -> None:
        """Count [B, L] tokens that every layer has appended."""
        batch_size, added = input_ids.shape
        if token_mask is not None and self._counts is None:
            self._counts = torch.full((batch_size,), self.length, device=input_ids.device)
        if self._counts is not None:
            self._counts = self._counts + (added if token_mask is None else token_mask.sum(-1))
        self.length += added


def token_positions(input_ids: Tensor, token_mask: Tensor | None, start: int | Tensor = 0) -> Tensor:
    """Positions counted over tokens alone, so that padding, wherever it stands, moves nothing.

    Args:
        input_ids: [B, L].
        token_mask: [B, L] bool, False = padding, or None.
        start: tokens that came before: a number, or [B].

    Returns:
        [L], or [B, L] where the sequences differ. A padding position has its predecessor's (at least 0).
    """
    if token_mask is None:
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        return steps + (start.unsqueeze(-1) if isinstance(start, Tensor) else start)
    start = start.unsqueeze(-1) if isinstance(start, Tensor) else start
    return (token_mask.cumsum(-1) - 1 + start).clamp(min=0)
