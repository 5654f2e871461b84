"""What attention remembers between the steps of decoding: keys and values of all positions, blocks, or a window."""

from collections.abc import Sequence

import torch
from torch import Tensor


class AttentionCache:
    """One attention layer's keys and values, in memory that is taken once; of use under `torch.no_grad()`.

    Args:
        batch_size, num_kv_heads, max_length, head_dim: B, G, positions to make room for, P.
        value_dim: V; None: P. 0 where values are channels of the keys, as in latent attention.

    Attributes:
        keys: [B, G, max_length, P]; the first `length` positions are filled.
        values: [B, G, max_length, V], likewise.
        token_mask: [B, max_length] bool, or None as long as nothing appended was masked.
        length: positions filled.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"a cache needs batch_size and max_length ≥ 1, got {batch_size} and {max_length}")
        shape = (batch_size, num_kv_heads, max_length)
        self.keys = torch.empty(*shape, head_dim, device=device, dtype=dtype)
        self.values = torch.empty(*shape, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        self.token_mask: Tensor | None = None
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, self.token_mask) if tensor is not None)

    def append(
        self, keys: Tensor, values: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add L positions; get views of all so far.

        Args:
            keys, values: [B, G, L, P] and [B, G, L, V]; cast to the cache's dtype.
            token_mask: [B, L] bool; None: no padding among them.

        Returns:
            keys [B, G, length, P] and values [B, G, length, V] in the dtype they came in, and token_mask [B, length] or
            None.
        """
        batch_size, _, added, _ = keys.shape
        start, end = self.length, self.length + added
        if batch_size != self.keys.shape[0]:
            raise ValueError(f"the cache is for a batch of {self.keys.shape[0]}, got {batch_size}")
        if end > self.max_length:
            raise ValueError(
                f"the cache is full: it holds {start} of at most {self.max_length} positions, and {added} more came; "
                "make it with a larger max_length"
            )
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError("a cache carries no gradients: call under torch.no_grad()")
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        if token_mask is not None and self.token_mask is None:
            shape = (batch_size, self.max_length)
            self.token_mask = torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        if self.token_mask is not None:
            self.token_mask[:, start:end] = True if token_mask is None else token_mask
        self.length = end
        seen = None if self.token_mask is None else self.token_mask[:, :end]
        return self.keys[:, :, :end].to(keys.dtype), self.values[:, :, :end].to(values.dtype), seen

    def snapshot(self) -> int:
        """What `rollback` needs: the length alone, for what comes later is written behind it."""
        return self.length

    def rollback(self, snapshot: int) -> None:
        """Forget what came after the snapshot."""
        self.length = snapshot


class BlockCache(AttentionCache):
    """Keys and values of all positions, and of every block of them what stands for it (`coterie.SparseAttention`).

    A token is added to its block when it comes, so a step's work does not grow with the length.

    Args:
        batch_size, num_kv_heads, max_length, head_dim: B, G, positions to make room for, P.
        block_size: Q.
        blocks: (heads, width) of each thing that stands for blocks.

    Attributes:
        blocks: [B, ⌈max_length / Q⌉, heads, width] each, float32; a block is complete when all its tokens have come.
        counts: [B] tokens that have come, or None as long as nothing appended was masked: `length` of them.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        block_size: int,
        blocks: Sequence[tuple[int, int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, device=device, dtype=dtype)
        self.block_size = block_size
        place = {"device": device, "dtype": torch.promote_types(self.keys.dtype, torch.float32)}
        self.blocks = tuple(torch.zeros(batch_size, -(-max_length // block_size), *each, **place) for each in blocks)
        self.counts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return super().nbytes + sum(blocks.nbytes for blocks in self.blocks)

    def positions(self, added: int, token_mask: Tensor | None) -> int | Tensor:
        """Of the next tokens: [B, L] if there is or was padding, else the first one."""
        if token_mask is None and self.counts is None:
            return self.length
        counts = self.length if self.counts is None else self.counts.unsqueeze(-1)
        if token_mask is None:
            return counts + torch.arange(added, device=self.keys.device)
        return (token_mask.cumsum(-1) - 1 + counts).clamp(min=0)

    def append(
        self, keys: Tensor, values: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `AttentionCache.append`; what stands for blocks is for the layer to add to."""
        before = self.length
        result = super().append(keys, values, token_mask)
        if token_mask is not None and self.counts is None:
            self.counts = torch.full((len(keys),), before, device=self.keys.device)
        if self.counts is not None:
            self.counts = self.counts + (keys.shape[2] if token_mask is None else token_mask.sum(-1))
        return result

    def snapshot(self) -> tuple[int | Tensor | None, ...]:
        """The length, and copies of the blocks that are not complete."""
        at = self._block_in_work()
        row = torch.arange(len(at), device=at.device)
        return self.length, self.counts, *(blocks[row, at] for blocks in self.blocks)

    def rollback(self, snapshot: tuple[int | Tensor | None, ...]) -> None:
        """Be as at the snapshot again."""
        self.length, self.counts, *then = snapshot
        at = self._block_in_work()
        for blocks, own in zip(self.blocks, then, strict=True):
            later = torch.arange(blocks.shape[1], device=at.device) > at.unsqueeze(-1)
            blocks.masked_fill_(later[:, :, None, None], 0)
            blocks[torch.arange(len(at), device=at.device), at] = own

    def _block_in_work(self) -> Tensor:
        """[B], the last one where the cache is full."""
        counts = self.counts
        if counts is None:
            counts = torch.full((len(self.keys),), self.length, device=self.keys.device)
        return (counts // self.block_size).clamp(max=-(-self.max_length // self.block_size) - 1)


class WindowCache:
    """What a window of W positions needs of the past, W - 1 keys and values; of use under `torch.no_grad()`.

    Args:
        batch_size, num_kv_heads, window, head_dim: B, G, W, P.
        sinks: how many of the first keys and values are kept besides.

    Attributes:
        keys, values: [B, G, sinks + W-1, P], the first and the last ones, the newest behind.
        is_token: [B, sinks + W-1] bool, False where there is none yet: in the front.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        window: int,
        head_dim: int,
        *,
        sinks: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or window < 1:
            raise ValueError(f"a cache needs batch_size and window ≥ 1, got {batch_size} and {window}")
        self.window, self.sinks = window, sinks
        room = sinks + window - 1
        shape = (batch_size, num_kv_heads, room, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.is_token = torch.zeros(batch_size, room, dtype=torch.bool, device=device)
        self.length = 0  # positions that have come
        self._has_padding = False

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return self.keys.nbytes + self.values.nbytes + self.is_token.nbytes

    def append(
        self, keys: Tensor, values: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add L positions; get them behind those that they may see: sinks, and what their windows reach.

        Args:
            keys, values: [B, G, L, P]; kept in the cache's dtype.
            token_mask: [B, L] bool; None: no padding among them.

        Returns:
            keys and values [B, G, n + L, P], n ≤ sinks + W - 1, and the mask of all, or None where it has no False.
        """
        if keys.shape[0] != self.keys.shape[0]:
            raise ValueError(f"the cache is for a batch of {self.keys.shape[0]}, got {keys.shape[0]}")
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError("a cache carries no gradients: call under torch.no_grad()")
        room = self.keys.shape[2]
        self._has_padding |= token_mask is not None
        # Without padding there are as many as have come: no mask is needed.
        first = 0 if self._has_padding else room - min(self.length, room)
        if token_mask is None:
            token_mask = self.is_token.new_ones(keys.shape[0], keys.shape[2])
        all_keys, all_values = (
            torch.cat((own[:, :, first:].to(new.dtype), new), 2)
            for own, new in ((self.keys, keys), (self.values, values))
        )
        mask = torch.cat((self.is_token[:, first:], token_mask), 1)
        self._keep(all_keys, all_values, mask)
        self.length += keys.shape[2]
        return all_keys, all_values, mask if self._has_padding else None

    def _keep(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """The first tokens and the last W-1, which padding does not push out."""
        kept = min(mask.shape[1], self.keys.shape[2])
        if not kept:
            return
        if self._has_padding:
            rank, last = mask.cumsum(1), mask.sum(1, keepdim=True) - (self.window - 1)
            mask = mask & ((rank <= self.sinks) | (rank > last))
            order = mask.byte().argsort(stable=True, dim=1)[:, -kept:]  # what is not kept to the front
            mask = mask.gather(1, order)
            where = order[:, None, :, None].expand(-1, *keys.shape[1:2], -1, keys.shape[3])
            keys, values = (t.gather(2, where) for t in (keys, values))
        sinks = max(kept - (self.window - 1), 0)
        for own, new in ((self.keys, keys), (self.values, values), (self.is_token[:, None], mask[:, None])):
            own = own[:, :, own.shape[2] - kept :]
            own[:, :, :sinks] = new[:, :, :sinks]
            own[:, :, sinks:] = new[:, :, new.shape[2] - (kept - sinks) :]

    def snapshot(self) -> tuple[Tensor | int | bool, ...]:
        """Copies of all that is kept, for `rollback`."""
        return self.keys.clone(), self.values.clone(), self.is_token.clone(), self.length, self._has_padding

    def rollback(self, snapshot: tuple[Tensor | int | bool, ...]) -> None:
        """Be as at the snapshot again."""
        *tensors, self.length, self._has_padding = snapshot
        for own, then in zip((self.keys, self.values, self.is_token), tensors, strict=True):
            own.copy_(then)
