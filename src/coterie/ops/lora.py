"""Low-rank updates beside frozen matrices (LoRA, Hu et al., arXiv:2106.09685), on rows: W + s·B·A is never formed.

Several adapters serve one batch by one sort: rows are sorted by the pair e·M + m of expert and adapter. The frozen
matrices see the rows of an expert, the factors those of a pair, and both are runs of neighbours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.ops import _lora_cpu
from coterie.ops._arguments import check_sizes, check_tensor, choose_impl
from coterie.ops._autocast import autocast_dtype
from coterie.ops._rows import accumulator_dtype, check_slots, sort_rows, sum_slots
from coterie.ops.activations import apply_activation
from coterie.ops.expert_mlp import check_mlp
from coterie.ops.grouped_matmul import grouped_matmul

Factors = tuple[Tensor, Tensor]  # A [M, E or 1, R, I] and B [M, E or 1, O, R] of matrices [E, O, I]


def lora_expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_lora: Factors | None,
    down_lora: Factors | None,
    scales: Sequence[float],
    adapter_ids: Tensor | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "swiglu",
    norm: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    recompute: bool = False,
    impl: str | None = None,
) -> Tensor:
    """`expert_mlp` with W[e] + scales[m] · B[m, e] @ A[m, e] in the place of both W[e], m being the token's adapter.

    The matrices should be frozen. On a CPU one adapter beside frozen matrices is an op of its own; everything else
    is two grouped products for each of theirs, which keep more for backward.

    Args:
        x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, impl: as in `expert_mlp`.
        gate_up_lora: A [M, E, R, D] and B [M, E, 2F, R]; either has 1 in the place of E where the experts share it.
            None: gate_up_proj as it is.
        down_lora: A [M, E, R, F] and B [M, E, D, R], likewise.
        scales: M numbers.
        adapter_ids: [G] int64 in -1..M-1, -1 being none, each for T/G tokens in a row: one a sequence, or one a
            token. None: all tokens take adapter 0.
        activation: a name (see `coterie.ops.activations`), or a function of sorted rows [N, 2F] → [N, F].
        norm: of the experts' outputs, [N, D] → [N, D].
        dropout: the probability with which numbers of what A multiplies become 0.
        recompute: keep x alone for backward, and form the rest again.

    Returns:
        [T, D] in x's dtype (under autocast: in autocast's), in which the factors are multiplied too, whatever theirs.
        Gradients to x, weights, factors, matrices and biases; those that are not asked for are not computed.

    Raises:
        ValueError, TypeError: as `expert_mlp` does; also for factors of another shape than their matrix, and for ids of
            no adapter (on a CPU), or not one a sequence or token.
    """
    impl = choose_impl(impl, x, ("reference", "torch"))
    matrices = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    _check(x, expert_ids, weights, matrices, activation)
    _check_factors("gate_up_lora", gate_up_lora, gate_up_proj, scales)
    _check_factors("down_lora", down_lora, down_proj, scales)
    dtype = _work_dtype(x)
    if autocast_dtype(x.device.type) is None or x.dtype == torch.float64:
        for name, matrix in zip(("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"), matrices, strict=True):
            if matrix is not None and matrix.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype, {x.dtype}, outside autocast; got {matrix.dtype}")
    x = x.to(dtype)
    records = torch.is_grad_enabled()
    frozen = not (records and any(t is not None and t.requires_grad for t in matrices))
    plain = adapter_ids is None and isinstance(activation, str) and norm is None and not dropout
    if impl == "torch" and x.device.type == "cpu" and frozen and plain:
        factors = [f if f is None else f[0] for f in (*(gate_up_lora or (None, None)), *(down_lora or (None, None)))]
        keep = records and not recompute and any(t is not None and t.requires_grad for t in (x, weights, *factors))
        return _torch_op(x, expert_ids, weights, *matrices, *factors, float(scales[0]), activation, keep)[0]
    matrices = [t if t is None else t.to(dtype) for t in matrices]

    def compute(x: Tensor, weights: Tensor) -> Tensor:
        up, down, up_bias, down_bias = matrices
        rows = _sort(expert_ids, up.shape[0], scales, adapter_ids, dtype)
        hidden = _layer(x, up, up_bias, gate_up_lora, rows, rows.token, dropout, impl)  # [N, 2F]
        hidden = apply_activation(hidden, activation) if isinstance(activation, str) else activation(hidden)
        y = _layer(hidden.to(dtype), down, down_bias, down_lora, rows, None, dropout, impl)  # [N, D]
        return sum_slots(y if norm is None else norm(y), rows.order, weights)

    if recompute and records:
        return checkpoint(compute, x, weights, use_reentrant=False)
    return compute(x, weights)


def lora_linear(
    x: Tensor,
    factors: Factors,
    scales: Sequence[float],
    adapter_ids: Tensor | None = None,
    *,
    dropout: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """scales[m] · (x @ A[m]ᵀ) @ B[m]ᵀ, what an adapter adds to a linear layer's output.

    Args:
        x: [..., D].
        factors: A [M, 1, R, D] and B [M, 1, O, R].
        scales, adapter_ids, dropout, impl: as in `lora_expert_mlp`, T being the product of x's leading sizes.

    Returns:
        [..., O] in x's dtype (under autocast: in autocast's).
    """
    x = x.to(_work_dtype(x))
    if adapter_ids is None:
        a, b = (factor[0, 0].to(x.dtype) for factor in factors)
        return F.linear(F.linear(F.dropout(x, dropout), a) * scales[0], b)
    tokens = x.reshape(-1, x.shape[-1])
    one_expert = torch.zeros(len(tokens), 1, dtype=torch.int64, device=x.device)
    rows = _sort(one_expert, 1, scales, adapter_ids, x.dtype)
    y = _update(F.dropout(tokens, dropout), factors, rows, rows.token, impl)
    return torch.empty_like(y).index_copy(0, rows.token, y).view(*x.shape[:-1], y.shape[1])


class _Rows(NamedTuple):
    """N routed rows in the order of the matrices that multiply them."""

    order: Tensor  # [N]: the slot t·K + k of each
    token: Tensor  # [N]: t
    counts: Tensor  # [E]: rows of each expert
    pair_counts: Tensor  # [E·M]: rows of each expert and adapter
    scale: float | Tensor  # [N, 1]: the adapter's, 0 for rows of none


def _sort(
    expert_ids: Tensor, num_experts: int, scales: Sequence[float], adapter_ids: Tensor | None, dtype: torch.dtype
) -> _Rows:
    num_tokens, top_k = expert_ids.shape
    if adapter_ids is None:
        order, counts = sort_rows(expert_ids, num_experts)
        return _Rows(order, order // top_k, counts, counts, scales[0])
    adapter = _adapter_of_tokens(adapter_ids, num_tokens, len(scales))  # [T]
    check_slots(expert_ids, num_experts)
    # Rows without an adapter go with those of adapter 0, times 0; unused slots stay the last.
    num_pairs = num_experts * len(scales)
    pairs = expert_ids * len(scales) + adapter.clamp(min=0).unsqueeze(1)
    order, pair_counts = sort_rows(pairs.clamp(max=num_pairs), num_pairs)
    token = order // top_k
    scale = torch.tensor([*scales, 0.0], dtype=accumulator_dtype(dtype), device=adapter.device)[adapter]  # -1: the last
    return _Rows(order, token, pair_counts.view(num_experts, -1).sum(1), pair_counts, scale[token].unsqueeze(1))


def check_adapter_ids(adapter_ids: Tensor, num_adapters: int) -> None:
    """Raises unless they are [G] int64 in -1..num_adapters-1 (looked at on a CPU only)."""
    check_tensor("adapter_ids", adapter_ids, (None,), "[G]", dtype=torch.int64)
    if adapter_ids.device.type == "cpu" and adapter_ids.numel() and not torch.compiler.is_compiling():
        lowest, highest = (limit.item() for limit in adapter_ids.aminmax())
        if lowest < -1 or highest >= num_adapters:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(f"adapter_ids must be in -1..{num_adapters - 1} (-1 = no adapter), got {wrong}")


def _adapter_of_tokens(adapter_ids: Tensor, num_tokens: int, num_adapters: int) -> Tensor:
    """[T]: each id for T/G tokens in a row."""
    check_adapter_ids(adapter_ids, num_adapters)
    groups = adapter_ids.shape[0]
    if not groups or num_tokens % groups:
        raise ValueError(f"adapter_ids must be one a sequence or one a token, of {num_tokens} tokens; got {groups} ids")
    return adapter_ids.unsqueeze(1).expand(-1, num_tokens // groups).reshape(-1)


def _layer(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    factors: Factors | None,
    rows: _Rows,
    source: Tensor | None,
    dropout: float,
    impl: str | None,
) -> Tensor:
    """x[source[n]] @ matrix[e]ᵀ + bias[e], and the adapter's update; [N, O]."""
    y = grouped_matmul(x, matrix, rows.counts, rows=source, bias=bias, impl=impl)
    return y if factors is None else y + _update(F.dropout(x, dropout), factors, rows, source, impl)


def _update(x: Tensor, factors: Factors, rows: _Rows, source: Tensor | None, impl: str | None) -> Tensor:
    (a, a_counts), (b, b_counts) = (_by_pair(factor.to(x.dtype), rows) for factor in factors)
    low = grouped_matmul(x, a, a_counts, rows=source, impl=impl)  # [N, R]
    return grouped_matmul((low * rows.scale).to(x.dtype), b, b_counts, impl=impl)


def _by_pair(factor: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """[M, E or 1, O, I] → one matrix for every pair of rows.pair_counts, and those; one for all where one is enough."""
    adapters, experts = factor.shape[:2]
    if adapters == experts == 1:
        return factor[0], rows.counts.sum(0, keepdim=True)
    stack = factor.expand(-1, rows.counts.shape[0], -1, -1)
    return stack.transpose(0, 1).flatten(0, 1), rows.pair_counts


def _work_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype


def _check(x, expert_ids, weights, matrices, activation) -> None:
    if isinstance(activation, str):
        check_mlp(x, expert_ids, weights, *matrices, activation)
        return
    check_tensor("x", x, (None, None), "[T, D]")
    check_tensor("expert_ids", expert_ids, (x.shape[0], None), "[T, K]", dtype=torch.int64)
    check_tensor("weights", weights, tuple(expert_ids.shape), "[T, K]")
    check_sizes("expert_ids", expert_ids.shape[1:], "K")
    check_tensor("gate_up_proj", matrices[0], (None, None, x.shape[1]), "[E, 2F, D]")
    check_tensor("down_proj", matrices[1], (len(matrices[0]), x.shape[1], None), "[E, D, F]")


def _check_factors(name: str, factors: Factors | None, matrix: Tensor, scales: Sequence[float]) -> None:
    if factors is None:
        return
    a, b = factors
    num_experts, outputs, inputs = matrix.shape
    check_tensor(f"{name}'s A", a, (len(scales), None, None, inputs), "[M, E or 1, R, I]")
    check_tensor(f"{name}'s B", b, (len(scales), None, outputs, a.shape[2]), "[M, E or 1, O, R]")
    for letter, factor in zip("AB", factors, strict=True):
        if factor.shape[1] not in (1, num_experts):
            raise ValueError(f"{name}'s {letter} must be of {num_experts} experts or of 1, got {factor.shape[1]}")


@torch.library.custom_op("coterie::lora_expert_mlp", mutates_args=())
def _torch_op(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    scale: float,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], and what backward wants: hidden [N, 2F] ([0, 2F] unless kept), order [N], counts [E]."""
    matrices = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    factors = (gate_up_a, gate_up_b, down_a, down_b)
    with torch.autocast("cpu", enabled=False):
        return _lora_cpu.forward(x, expert_ids, weights, matrices, factors, scale, activation, keep_hidden)


@_torch_op.register_fake
def _(x, expert_ids, weights, gate_up_proj, *args):
    num_experts, width, _ = gate_up_proj.shape
    num_rows, keep_hidden = expert_ids.numel(), args[-1]
    hidden = x.new_empty(num_rows if keep_hidden else 0, width)
    return x.new_empty(x.shape), hidden, expert_ids.new_empty(num_rows), expert_ids.new_empty(num_experts)


@torch.library.custom_op("coterie::lora_expert_mlp_backward", mutates_args=())
def _torch_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    matrices: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    hidden: Tensor,
    order: Tensor,
    counts: Tensor,
    scale: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        return _lora_cpu.backward(grad, x, weights, matrices, factors, hidden, order, counts, scale, activation, needs)


@_torch_backward.register_fake
def _(grad, x, weights, matrices, factors, hidden, order, counts, scale, activation, needs):
    inputs = zip((x, weights, *factors), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in inputs)


def _setup_context(ctx, inputs, output):
    x, _, weights, *others, ctx.scale, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weights, *others, *output[1:])


def _backward(ctx, grad, *_):
    x, weights, *others, hidden, order, counts = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 7, 8, 9, 10)]
    grads = _torch_backward(
        grad, x, weights, others[:4], others[4:], hidden, order, counts, ctx.scale, ctx.activation, needs
    )
    grad_x, grad_weights, *factors = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_x, None, grad_weights, None, None, None, None, *factors, None, None, None


_torch_op.register_autograd(_backward, setup_context=_setup_context)
