"""What all layers remember of the past, kept between the steps of generation."""

from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from coterie.modules.attention_cache import AttentionCache, WindowCache
from coterie.modules.linear_attention import LinearAttentionCache


@dataclass(frozen=True, eq=False)
class CacheSnapshot:
    """A point of a cache's past; `KVCache.snapshot` makes it.

    Attributes:
        length: positions filled then.
        layers: what each layer needs to go back: a length for keys and values, copies of what is written over.
        counts: [B] tokens seen then, or None.
    """

    length: int
    layers: tuple[int | tuple[Tensor | int | bool, ...], ...]
    counts: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes copied."""
        copies = (value for layer in self.layers if isinstance(layer, tuple) for value in layer)
        return sum(value.nbytes for value in copies if isinstance(value, Tensor))


class KVCache:
    """What a model remembers of the positions it has seen, in memory that is taken once.

    Attention keeps keys and values of every position, or of its window, linear attention a state of one size.
    `Transformer.new_cache` makes the cache, `Transformer.forward(..., cache=cache)` fills it: every call appends its
    positions. One that would not fit raises ValueError and leaves the cache as it was.

    Attributes:
        layers: one cache a layer, as its mixer made it.
        length: positions filled, padding included.
        max_length: positions there is room for.
    """

    def __init__(self, layers: list[AttentionCache | WindowCache | LinearAttentionCache], max_length: int) -> None:
        self.layers = layers
        self.max_length = max_length
        self.length = 0
        self._counts: Tensor | None = None  # [B] tokens seen, without padding; None: no padding so far
        self._snapshots: WeakSet[CacheSnapshot] = WeakSet()  # whose positions still stand

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, filled or not."""
        return sum(layer.nbytes for layer in self.layers)

    def snapshot(self) -> CacheSnapshot:
        """A point to come back to, as speculation does when its guesses were wrong.

        Copied are what is of one size at any length, states of linear attention and windows. Other keys and values are
        not: they stay where they are until others are written there.
        """
        snapshot = CacheSnapshot(self.length, tuple(layer.snapshot() for layer in self.layers), self._counts)
        self._snapshots.add(snapshot)
        return snapshot

    def rollback(self, snapshot: CacheSnapshot) -> None:
        """Be as at the snapshot again; it may be used several times.

        Raises:
            ValueError: it is another cache's, or later than one that was rolled back to since: its keys and values may
                have been written over.
        """
        if snapshot not in self._snapshots:
            raise ValueError(
                f"the snapshot at length {snapshot.length} is not of this cache, or later than one rolled back to since"
            )
        for layer, own in zip(self.layers, snapshot.layers, strict=True):
            layer.rollback(own)
        self.length, self._counts = snapshot.length, snapshot.counts
        for later in [other for other in self._snapshots if other.length > self.length]:
            self._snapshots.discard(later)

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
