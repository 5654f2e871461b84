"""A causal convolution of a few tokens, channel by channel, as before linear attention since Mamba (arXiv:2312.00752).

y_t = act(bias + Σ_j weight[:, W−1−j] · x_{t−j}), j = 0 .. W−1, where x_{t−j} is the j-th token before t of its own
sequence: of no other that is packed beside it, and whatever padding stands between. Before the first come those of the
sequence's state, which is the last W − 1 tokens of what went before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops._arguments import check_cu_seqlens, check_tensor, read_cu_seqlens


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every token's output, and the last W − 1 tokens of every sequence.

    Args:
        x: [B, L, channels].
        weight: [channels, W]; the last column is the token's own.
        bias: [channels].
        activation: "silu" or None.
        initial_state: [B, W-1, channels], packed: one per sequence; None: zeros.
        cu_seqlens: [number of sequences + 1] int64, the bounds of sequences packed into L; B must be 1.
        token_mask: [B, L] bool; False is padding, whatever it contains and wherever it stands: it is as if it were not
            there, and its output is 0.

    Returns:
        y [B, L, channels] in x's dtype, summed in float32 or better, and the state [B, W-1, channels] (packed: one per
        sequence) in x's dtype. Gradients to every tensor.

    Raises:
        ValueError: a shape or the activation is wrong; on a CPU also bounds that do not fill L.
        TypeError: a dtype is.
    """
    check_tensor("x", x, (None, None, None), "[B, L, channels]")
    batch, length, channels = x.shape
    check_tensor("weight", weight, (channels, None), "[channels, W]")
    width = weight.shape[1]
    if width < 1:
        raise ValueError("weight must be at least one token wide, got [channels, 0]")
    if bias is not None:
        check_tensor("bias", bias, (channels,), "[channels]")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (batch, length), "[B, L]", dtype=torch.bool)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            read_cu_seqlens(cu_seqlens, length)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, width - 1, channels)
    else:
        check_tensor("initial_state", initial_state, (sequences, width - 1, channels), "[B, W-1, channels]")
        initial_state = initial_state.to(x.dtype)
    if token_mask is None and cu_seqlens is None:
        rows = torch.cat((initial_state, x), 1)
        return _convolve(rows, weight, bias, activation), rows[:, length:]
    if token_mask is None:
        token_mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    places, before, after = _places(token_mask, cu_seqlens, width)
    # One row of sequences, each with its state before it and without its padding, which is all sent to the last place.
    rows = x.new_zeros(batch * length + sequences * (width - 1) + 1, channels)
    rows = rows.index_copy(0, before.flatten(), initial_state.flatten(0, 1))
    padding = ~token_mask.flatten().unsqueeze(-1)
    rows = rows.index_copy(0, places, x.flatten(0, 1).masked_fill(padding, 0))
    y = _convolve(rows.unsqueeze(0), weight, bias, activation).squeeze(0)
    y = y.index_select(0, places - (width - 1)).masked_fill(padding, 0)
    return y.view(batch, length, channels), rows.index_select(0, after.flatten()).view_as(initial_state)


def _places(token_mask: Tensor, cu_seqlens: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where in one row of sequences without padding, W − 1 places for a state before each, everything stands.

    Returns:
        [B·L] of the tokens, and [sequences, W-1] of the states before the first tokens and of those after the last.
    """
    batch, length = token_mask.shape
    device = token_mask.device
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=device) * length
    sequences = torch.arange(len(cu_seqlens) - 1, device=device)
    counts = F.pad(token_mask.flatten().cumsum(0), (1, 0))  # tokens before each position
    sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(batch * length, device=device), right=True)
    places = counts[:-1] + (sequence + 1) * (width - 1)
    last = batch * length + len(sequences) * (width - 1)
    places = places.masked_fill(~token_mask.flatten(), last)
    state = torch.arange(width - 1, device=device) + (sequences * (width - 1)).unsqueeze(-1)
    before, after = (counts[bounds].unsqueeze(-1) + state for bounds in (cu_seqlens[:-1], cu_seqlens[1:]))
    return places, before, after


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """[B, W-1 + L, channels] → [B, L, channels], as sums of shifted products: no channel is moved beside its tokens."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    wide, weight = rows.to(dtype), weight.to(dtype)
    length = rows.shape[1] - weight.shape[1] + 1
    y = wide[:, :length] * weight[:, 0]
    for shift in range(1, weight.shape[1]):
        y = torch.addcmul(y, wide[:, shift : shift + length], weight[:, shift])
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(rows.dtype)
