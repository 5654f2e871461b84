"""Linear attentions by name: each is `delta_rule` with other arguments, in the argument conventions of the field.

| name | erases | decays | source |
|---|---|---|---|
| `linear_attention` | | | Katharopoulos 2020, arXiv:2006.16236 |
| `retention` | | a constant per head | Sun 2023, arXiv:2307.08621 |
| `gated_linear_attention` | | per channel | Yang 2023, arXiv:2312.06635 |
| `ssd` | | per head | Dao 2024, arXiv:2405.21060 (Mamba-2) |
| `gated_delta_rule` | βk | none, per head or per channel | arXiv:2406.06484, arXiv:2412.06464, arXiv:2510.26692 (KDA) |
| `delta_product` | βk, several times a token | per head or per channel | Siems 2025, arXiv:2502.10297 |

All return (o [B, L, H, V], the final state [B, H, P, V] or None), and take as keywords:

    scale: of q; None is P^-0.5 (of `ssd`: 1).
    initial_state: [B, H, P, V], or one per packed sequence.
    output_final_state: whether the state is wanted.
    cu_seqlens, token_mask, chunk_size, impl: as in `delta_rule`.

They raise as `delta_rule` does.
"""

import torch
from torch import Tensor

from coterie.ops._arguments import check_tensor
from coterie.ops.delta_rule import delta_rule


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, output_final_state: bool = False, **settings):
    """S += k vᵀ. q, k [B, L, H', P], v [B, L, H, V]; feature maps are the caller's, and no sum normalises."""
    return delta_rule(q, k, v, return_state=output_final_state, **settings)


def retention(q: Tensor, k: Tensor, v: Tensor, *, output_final_state: bool = False, **settings):
    """S ← γ_h S + k vᵀ with γ_h of `retention_decay`. q, k [B, L, H', P], v [B, L, H, V]."""
    g = retention_decay(v.shape[2], device=v.device).to(torch.promote_types(v.dtype, torch.float32))
    return delta_rule(q, k, v, g.expand(v.shape[:3]), return_state=output_final_state, **settings)


def retention_decay(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """log γ_h = log(1 − 2^(−5−h)), the paper's equation 8: [H] float64."""
    heads = torch.arange(num_heads, device=device, dtype=torch.float64)
    return torch.log1p(-torch.exp2(-5 - heads))


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, output_final_state: bool = False, **settings):
    """S ← diag(exp g) S + k vᵀ. q, k [B, L, H', P], v [B, L, H, V], g [B, L, H, P] or [B, L, H], logs of decays."""
    return delta_rule(q, k, v, g, return_state=output_final_state, **settings)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, *, output_final_state: bool = False, **settings
):
    """S ← D (I − β k kᵀ) S + β k vᵀ with D = diag(exp g) taken first.

    q, k [B, L, H', P], k of norm 1; v [B, L, H, V]; g [B, L, H], [B, L, H, P] (KDA) or None (DeltaNet);
    beta [B, L, H] in 0..1, or in 0..2 for eigenvalues that may be negative (Grazzi 2024, arXiv:2411.12537).
    """
    return delta_rule(q, k, v, g, beta=beta, return_state=output_final_state, **settings)


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    scale: float = 1.0,
    output_final_state: bool = False,
    **settings,
):
    """Mamba-2's state space duality: S ← exp(dt·a) S + dt · b xᵀ, y = Sᵀ c + d · x.

    x [B, L, H, V], dt [B, L, H] ≥ 0 (after softplus), a [H] < 0, b and c [B, L, groups, P], d [H] or None.
    """
    check_tensor("x", x, (None, None, None, None), "[B, L, H, V]")
    check_tensor("dt", dt, tuple(x.shape[:3]), "[B, L, H]")
    check_tensor("a", a, (x.shape[2],), "[H]")
    o, state = delta_rule(
        c, b, x * dt.unsqueeze(-1).to(x.dtype), dt * a, scale=scale, return_state=output_final_state, **settings
    )
    return o if d is None else o + d.to(x.dtype).unsqueeze(-1) * x, state


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    num_edits: int,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    output_final_state: bool = False,
    **settings,
):
    """`gated_delta_rule` with n = num_edits edits a token, a product of n Householder matrices (for β = 2).

    q [B, L, H', P], g [B, L, H] or [B, L, H, P] or None; k [B, L·n, H', P], v [B, L·n, H, V], beta [B, L·n, H]: the
    edits of a token in turn. The state decays before a token's first edit and is read after its last.
    """
    check_tensor("q", q, (None, None, None, None), "[B, L, H', P]")
    if num_edits < 1 or k.shape[1] != q.shape[1] * num_edits:
        raise ValueError(f"k must have L · num_edits = {q.shape[1]} · {num_edits} tokens, got {k.shape[1]}")
    o, state = delta_rule(
        _spread(q, num_edits, -1),
        k,
        v,
        None if g is None else _spread(g, num_edits, 0),
        beta=beta,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens * num_edits,
        token_mask=None if token_mask is None else token_mask.repeat_interleave(num_edits, 1),
        return_state=output_final_state,
        **settings,
    )
    return o[:, num_edits - 1 :: num_edits], state


def _spread(t: Tensor, times: int, place: int) -> Tensor:
    """[B, L, ..] → [B, L·times, ..], zero but at every token's `place`."""
    spread = t.new_zeros(t.shape[0], t.shape[1], times, *t.shape[2:])
    index = torch.tensor([place % times], device=t.device)
    return spread.index_copy(2, index, t.unsqueeze(2)).flatten(1, 2)
