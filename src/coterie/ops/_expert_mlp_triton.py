"""`expert_mlp` by the Triton kernels. Signatures as in `_expert_mlp_cpu`, but for what backward finds its rows by."""

import torch
from torch import Tensor

from coterie.ops._rows import check_slots
from coterie.ops.activations import parse_activation


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
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, hidden, places [2, ≥ N] int32 (the slot of each sorted row, and the row of each slot), counts [E]."""
    from coterie_kernels import expert_mlp

    check_slots(expert_ids, gate_up_proj.shape[0])
    matrices = _in_dtype(x.dtype, gate_up_proj, down_proj, gate_up_bias, down_bias)
    addend = addend if addend is None else addend.contiguous()
    return expert_mlp.forward(
        x.contiguous(), expert_ids, weights.contiguous(), *matrices, addend, _activation(activation), keep_hidden
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor,
    places: Tensor,
    counts: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from coterie_kernels import expert_mlp

    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    grads = expert_mlp.backward(
        grad.contiguous(),
        x.contiguous(),
        weights.contiguous(),
        *_in_dtype(x.dtype, *parameters),
        hidden,
        places,
        counts,
        _activation(activation),
        needs,
    )
    dtypes = (x.dtype, weights.dtype, *(t if t is None else t.dtype for t in parameters))
    # Outputs of a custom op may not alias, hence one empty tensor each.
    return tuple(x.new_empty(0) if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def num_places(num_slots: int) -> int:
    """How long the rows of `places` are: both begin on the boundaries that wide loads want."""
    return -(-num_slots // 4) * 4


def _activation(activation: str):
    from coterie_kernels.expert_mlp import Activation

    return Activation(**vars(parse_activation(activation)))


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.to(dtype).contiguous() for t in tensors)
