"""`expert_mlp` by packed matrices, on a CPU, for inference: the same values, at the memory's speed for a few rows."""

import torch
from torch import Tensor

from coterie.ops._arguments import check_tensor
from coterie.ops._autocast import no_autocast
from coterie.ops._layout import lay_out
from coterie.ops._packed import PackedStack, check_packed_input
from coterie.ops._rows import bias_rows, check_ids, sort_rows
from coterie.ops._sums import TokenSum
from coterie.ops.activations import apply_activation

# Routed rows (T·K) up to which each is multiplied by itself: beyond, experts come up more than once.
_SINGLE_ROWS = 32


def packed_expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: PackedStack,
    down_proj: PackedStack,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """As `coterie.ops.expert_mlp`, without gradients."""
    x = check_packed_input(x, gate_up_proj.dtype)
    check_tensor("x", x, (None, gate_up_proj.shape[2]), "[T, D]")
    check_tensor("expert_ids", expert_ids, (x.shape[0], None), "[T, K]", dtype=torch.int64)
    check_tensor("weights", weights, tuple(expert_ids.shape), "[T, K]")
    forward = _forward_unsorted if 0 < weights.numel() <= _SINGLE_ROWS else _forward
    with no_autocast("cpu"):
        return forward(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation)


def _forward(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation) -> Tensor:
    """Chunks of sorted rows, as in `_expert_mlp_cpu.forward`."""
    order, counts = sort_rows(expert_ids, len(gate_up_proj), radix=True)
    layout = lay_out(counts, x.dtype, gate_up_proj.shape[1:], side_by_side=False)
    token = layout.spread(order // expert_ids.shape[1])
    y = TokenSum(x, layout, order, expert_ids.shape[1], weights)
    for chunk in layout.chunks:
        hidden = gate_up_proj.multiply_chunk(chunk, x.index_select(0, token[chunk.rows]))  # [n, 2F]
        if gate_up_bias is not None:
            chunk.add_bias(hidden, gate_up_bias)
        rows = down_proj.multiply_chunk(chunk, apply_activation(hidden, activation), y.room(chunk))
        if down_bias is not None:
            chunk.add_bias(rows, down_bias)
        y.add(chunk, rows)
    return y.result()


def _forward_unsorted(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation) -> Tensor:
    """A handful of rows, each by itself; every microsecond counts."""
    experts = expert_ids.flatten().tolist()
    num_experts, top_k = len(gate_up_proj), expert_ids.shape[1]
    check_ids(min(experts), max(experts), num_experts)
    hidden = gate_up_proj.multiply_each([row for row in x.split(1) for _ in range(top_k)], experts)
    if gate_up_bias is not None:
        hidden += bias_rows(gate_up_bias, experts)
    rows = down_proj.multiply_each(apply_activation(hidden, activation).split(1), experts)
    if down_bias is not None:
        rows += bias_rows(down_bias, experts)
    if unused := [slot for slot, expert in enumerate(experts) if expert == num_experts]:
        rows[unused] = 0
    slots = rows.view(len(x), top_k, -1).float()
    return torch.bmm(weights.float().unsqueeze(1), slots).squeeze(1).to(x.dtype)
