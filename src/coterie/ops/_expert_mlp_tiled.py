"""`expert_mlp` on a CPU: a few experts at a time, on row tiles that stay in cache.

No tensor of N rows is made but the hidden layer, when it is kept for backward: rows are gathered into a small
buffer and results added to their tokens at once, in float32 and in a fixed order. Experts with few rows are taken
together, so that the cores work side by side instead of sharing one small product. Products run in a dtype the CPU
has instructions for (float32 for bfloat16 on AVX2), converting one tile's weights at a time.
"""

from torch import Tensor

from coterie.ops._rows import accumulator_dtype, sort_rows
from coterie.ops._tiles import Tile, WeightGradient, lay_out
from coterie.ops.activations import activation_and_gradient, apply_activation


def forward(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], hidden [N, 2F] ([0, 2F] unless kept), order [N], counts [E]."""
    order, counts = sort_rows(expert_ids, gate_up_proj.shape[0])
    hidden = x.new_empty(order.numel() if keep_hidden else 0, gate_up_proj.shape[1])
    y = x.new_zeros(x.shape, dtype=accumulator_dtype(x.dtype))

    layout = lay_out(counts, x.dtype, max(gate_up_proj.shape[1:]))
    token = layout.spread(order // expert_ids.shape[1])
    scale = layout.spread_zero(weights.reshape(-1, 1)[order])
    for tile in layout.tiles:
        rows = slice(tile.start, tile.stop)
        tile_scale = scale[rows].to(tile.dtype)
        tile_x = x.index_select(0, token[rows]).to(tile.dtype)
        tile_hidden = tile.multiply(tile_x, tile.matrices(gate_up_proj).mT)  # [n, 2F]
        if gate_up_bias is not None:
            tile.batch(tile_hidden).add_(_bias(tile, gate_up_bias))
        if keep_hidden:
            hidden[tile.first_row : tile.last_row] = layout.real_rows(tile, tile_hidden)
        activated = apply_activation(tile_hidden, activation).mul_(tile_scale)
        tile_y = tile.multiply(activated, tile.matrices(down_proj).mT)
        if down_bias is not None:
            tile.batch(tile_y).addcmul_(tile.batch(tile_scale), _bias(tile, down_bias))
        y.index_add_(0, token[rows], tile_y.to(y.dtype))
    return y.to(x.dtype), hidden, order, counts


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor,
    order: Tensor,
    counts: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the tensors of `forward` but expert_ids, as MATH.md §1 derives them; empty where `needs` says no.

    `hidden` is what forward kept, or [0, 2F] to form it again.
    """
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    grad_x = x.new_zeros(x.shape if needs_x else 0, dtype=accumulator_dtype(x.dtype))
    grad_weights = weights.new_zeros(order.numel() if needs_weights else 0)  # zero in unused slots
    grad_up = WeightGradient(gate_up_proj.shape, gate_up_proj.dtype, counts) if needs_up else None
    grad_down = WeightGradient(down_proj.shape, down_proj.dtype, counts) if needs_down else None
    # An expert's tiles are summed as y's rows are, and rounded once.
    grad_up_bias = grad_x.new_zeros(gate_up_bias.shape if needs_up_bias else 0)
    grad_down_bias = grad_x.new_zeros(down_bias.shape if needs_down_bias else 0)

    layout = lay_out(counts, x.dtype, max(gate_up_proj.shape[1:]))
    token = layout.spread(order // weights.shape[1])
    scale = layout.spread_zero(weights.reshape(-1, 1)[order])
    for tile in layout.tiles:
        rows = slice(tile.start, tile.stop)
        tile_scale = scale[rows].to(tile.dtype)
        tile_grad = grad.index_select(0, token[rows]).to(tile.dtype)  # [n, D]
        up_matrix, down_matrix = tile.matrices(gate_up_proj), tile.matrices(down_proj)
        if needs_up or not len(hidden):
            tile_x = x.index_select(0, token[rows]).to(tile.dtype)
        if len(hidden):
            source = slice(tile.first_row, tile.last_row) if layout.source is None else layout.source[rows]
            tile_hidden = hidden[source].to(tile.dtype)
        else:
            tile_hidden = tile.multiply(tile_x, up_matrix.mT)
            if gate_up_bias is not None:
                tile.batch(tile_hidden).add_(_bias(tile, gate_up_bias))

        grad_activated = tile.multiply(tile_grad, down_matrix)  # [n, F], before the routing weight
        activated, grad_hidden = activation_and_gradient(tile_hidden, grad_activated * tile_scale, activation)
        if needs_weights:
            tile_grad_weights = (grad_activated * activated).sum(1, dtype=grad_x.dtype)
            if down_bias is not None:
                products = tile.batch(tile_grad) * _bias(tile, down_bias)
                tile_grad_weights += products.sum(-1, dtype=grad_x.dtype).flatten()
            slots = order[tile.first_row : tile.last_row]
            grad_weights[slots] = layout.real_rows(tile, tile_grad_weights).to(weights.dtype)
        if needs_down:
            grad_down.add(tile, tile_grad, activated.mul_(tile_scale))
        if needs_up:
            grad_up.add(tile, grad_hidden, tile_x)
        if needs_down_bias:
            _add_bias_gradient(grad_down_bias, tile, tile_grad * tile_scale)
        if needs_up_bias:
            _add_bias_gradient(grad_up_bias, tile, grad_hidden)
        if needs_x:
            grad_x.index_add_(0, token[rows], tile.multiply(grad_hidden, up_matrix).to(grad_x.dtype))
    return (
        grad_x.to(x.dtype),
        grad_weights.view(weights.shape) if needs_weights else x.new_empty(0),
        grad_up.gradient if needs_up else x.new_empty(0),
        grad_down.gradient if needs_down else x.new_empty(0),
        grad_up_bias.to(gate_up_bias.dtype if needs_up_bias else x.dtype),
        grad_down_bias.to(down_bias.dtype if needs_down_bias else x.dtype),
    )


def _bias(tile: Tile, bias: Tensor) -> Tensor:
    """The biases of the tile's experts, against rows as `Tile.batch` shapes them."""
    return tile.matrices(bias) if tile.num_experts == 1 else tile.matrices(bias).unsqueeze(1)


def _add_bias_gradient(total: Tensor, tile: Tile, rows: Tensor) -> None:
    sums = rows.unflatten(0, (tile.num_experts, -1)).sum(1, dtype=total.dtype)
    total[tile.first_expert : tile.first_expert + tile.num_experts] += sums
