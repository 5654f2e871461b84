"""Linear attention: a state of one size, whatever the length, in place of all keys and values; and its cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._heads import divide_heads
from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules._wide import wide
from coterie.modules.decay import ConstantDecay, SigmoidDecay, SoftplusDecay
from coterie.modules.norm import RMSNorm, unit_norm
from coterie.ops.delta_rule import delta_rule
from coterie.ops.linear_attention import delta_product
from coterie.ops.short_conv import short_conv


@dataclass(frozen=True)
class Rule:
    """How one linear attention edits its state.

    Attributes:
        decay: makes the layer's decay from (dim, heads, key width); None: nothing decays.
        erases: what stands at a key is read, and corrected by a share β = σ(..) of the difference, before the next.
        unit_keys: queries and keys have length 1 unless told otherwise.
        features: what queries and keys become, where the paper has a feature map.
        steps: values are multiplied by the decay's steps dt, and reach the output too, by a weight per head.
        scale: of queries; None: P^-0.5.
        gate: the output gate's activation.
    """

    decay: Callable[..., nn.Module] | None = None
    erases: bool = False
    unit_keys: bool = False
    features: Callable[[Tensor], Tensor] | None = None
    steps: bool = False
    scale: float | None = None
    gate: Callable[[Tensor], Tensor] = F.silu


def _per_head(dim: int, num_heads: int, head_dim: int, **place) -> nn.Module:
    return SoftplusDecay(dim, num_heads, **place)


def _per_channel(dim: int, num_heads: int, head_dim: int, **place) -> nn.Module:
    return SoftplusDecay(dim, num_heads, channels=head_dim, rank=head_dim, **place)


def _by_sigmoid(dim: int, num_heads: int, head_dim: int, **place) -> nn.Module:
    return SigmoidDecay(dim, num_heads, channels=head_dim, **place)


def _constant(dim: int, num_heads: int, head_dim: int, **place) -> nn.Module:
    return ConstantDecay(num_heads)


RULES = {
    "linear": Rule(features=lambda x: F.elu(x) + 1),
    "retention": Rule(decay=_constant),
    "gla": Rule(decay=_by_sigmoid),
    "ssd": Rule(decay=_per_head, steps=True, scale=1.0),
    "delta": Rule(erases=True, unit_keys=True),
    "gated_delta": Rule(decay=_per_head, erases=True, unit_keys=True),
    "kda": Rule(decay=_per_channel, erases=True, unit_keys=True, gate=torch.sigmoid),
    "delta_product": Rule(decay=_per_head, erases=True, unit_keys=True),
}


class LinearAttention(nn.Module):
    """Every position writes to a state S [P, V] of each head, and reads it; nothing else is kept of the past.

    1. q, k, v = silu(short convolution(projections of x)); k and v for every edit of a token
    2. q, k = q / ‖q‖, k / ‖k‖ with `qk_norm`, or the rule's feature map of them
    3. g = the rule's decay of x; β = σ(projection of x), twice that with `allow_negative_eigenvalues`
    4. S ← exp(g) S, S ← S + k (βv − βkᵀ S) for every edit, y = scale · Sᵀ q (`coterie.ops.delta_rule`)
    5. y = RMSNorm(y) of every head, times act(projection of x) with `output_gate`
    6. output projection of the heads side by side

    | rule | decay g | edits | source |
    |---|---|---|---|
    | "linear" | none | S + φ(k) vᵀ, φ = elu + 1 | arXiv:2006.16236 |
    | "retention" | a constant per head | S + k vᵀ | arXiv:2307.08621 |
    | "gla" | per channel, `SigmoidDecay` | S + k vᵀ | arXiv:2312.06635 |
    | "ssd" | per head, `SoftplusDecay` | S + k (dt · v)ᵀ, scale 1; y + d · v | arXiv:2405.21060 (Mamba-2) |
    | "delta" | none | corrects by β | arXiv:2406.06484 |
    | "gated_delta" | per head, `SoftplusDecay` | corrects by β | arXiv:2412.06464 |
    | "kda" | per channel, `SoftplusDecay` | corrects by β; its gate is σ, not silu | arXiv:2510.26692 |
    | "delta_product" | per head, `SoftplusDecay` | corrects by β, `num_edits` times | arXiv:2502.10297 |

    Where a paper divides by a sum of keys ("linear"), rotates queries and keys ("retention") or gates before its norm
    ("ssd"), this layer does as all the others: a norm of every head, the convolution for positions, and norm first.

    Args:
        dim: D.
        num_heads: H, heads of values, each with a state.
        head_dim: P, the width of queries and keys; None: D / H.
        value_dim: V; None: P.
        num_key_heads: heads of queries and keys, which divides H: H / num_key_heads consecutive heads share one;
            None: H.
        rule: of the table.
        short_conv: W, the tokens that the convolution sees, its own included; 0: no convolution and no silu.
        qk_norm: queries and keys of length 1; None: where the rule erases.
        allow_negative_eigenvalues: β in 0..2, so that an edit may turn a direction round (arXiv:2411.12537), which
            counting and state tracking need. Where the rule erases.
        num_edits: of "delta_product"; None: 2.
        output_gate: gate the normed output.
        norm_eps: of the output's norm.

    Raises:
        ValueError: a setting is out of range, or not the rule's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_key_heads: int | None = None,
        rule: str = "gated_delta",
        short_conv: int = 4,
        qk_norm: bool | None = None,
        allow_negative_eigenvalues: bool = False,
        num_edits: int | None = None,
        output_gate: bool = True,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
        num_key_heads, head_dim = divide_heads(dim, num_heads, num_key_heads, head_dim, name="num_key_heads")
        value_dim = head_dim if value_dim is None else value_dim
        if num_edits is not None and rule != "delta_product":
            raise ValueError(f"num_edits is of 'delta_product' alone, got {num_edits} for {rule!r}")
        if allow_negative_eigenvalues and not RULES[rule].erases:
            erasing = ", ".join(repr(name) for name, each in RULES.items() if each.erases)
            raise ValueError(f"allow_negative_eigenvalues is of rules that erase, {erasing}; got {rule!r}")
        edits = (2 if num_edits is None else num_edits) if rule == "delta_product" else 1
        for name, size in (("head_dim", head_dim), ("value_dim", value_dim), ("num_edits", edits)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if short_conv < 0:
            raise ValueError(f"short_conv must be at least 1, or 0 for none, got {short_conv}")
        self.rule = rule
        self.num_heads = num_heads
        self.num_key_heads = num_key_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.num_edits = edits
        self.qk_norm = RULES[rule].unit_keys if qk_norm is None else qk_norm
        self.allow_negative_eigenvalues = allow_negative_eigenvalues
        place = {"device": device, "dtype": dtype}
        widths = num_key_heads * head_dim, edits * num_key_heads * head_dim, edits * num_heads * value_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=False, **place) for width in widths)
        # [channels of q, k and v side by side, 1, W], as torch's Conv1d has a convolution of single channels.
        self.conv_weight = nn.Parameter(torch.empty(sum(widths), 1, short_conv, **place)) if short_conv else None
        make_decay = RULES[rule].decay
        self.decay = None if make_decay is None else make_decay(dim, num_heads, head_dim, **place)
        self.beta_proj = nn.Linear(dim, edits * num_heads, bias=False, **place) if RULES[rule].erases else None
        self.skip = nn.Parameter(torch.empty(num_heads, **place)) if RULES[rule].steps else None
        self.norm = RMSNorm(value_dim, norm_eps, **place)
        self.gate_proj = nn.Linear(dim, num_heads * value_dim, bias=False, **place) if output_gate else None
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=False, **place)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None) -> None:
        """Weights normal(0, std), the output projection's normal(0, output_std or std), norm and skip 1.

        The convolution's are uniform in ±W^-0.5, as torch's and Mamba's; the decay's as its class says.
        """
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.beta_proj, self.gate_proj):
            if linear is not None:
                init_normal(linear.weight, std)
        init_normal(self.o_proj.weight, std if output_std is None else output_std)
        if self.conv_weight is not None and self.conv_weight.device.type != "meta":
            bound = self.conv_weight.shape[-1] ** -0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.decay is not None:
            self.decay.reset_parameters(std)
        if self.skip is not None:
            nn.init.ones_(self.skip)
        self.norm.reset_parameters()

    def new_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LinearAttentionCache":
        """The state before the first token, on the weights' device; it has room for any length.

        Args:
            max_length: of no effect; here so that all mixers are asked alike.
            dtype: of the convolution's tail; None: the weights'.
        """
        weight, conv = self.q_proj.weight, self.conv_weight
        return LinearAttentionCache(
            (batch_size, self.num_heads, self.head_dim, self.value_dim),
            (batch_size, 0, 0) if conv is None else (batch_size, conv.shape[2] - 1, conv.shape[0]),
            state_dtype=torch.promote_types(torch.float32, weight.dtype),
            device=device or weight.device,
            dtype=dtype or weight.dtype,
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        *,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache_layer: "LinearAttentionCache | None" = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D].

        Args:
            x: [B, L, D].
            rotary: not used: the order of edits is the position. Here so that all mixers are called alike.
            token_mask: [B, L] bool, False = padding, anywhere in a sequence. It is as if it were not there, whatever it
                contains, NaN included; the output there is zero.
            cu_seqlens: [number of sequences + 1] int64, the bounds of sequences packed into L; B must be 1.
            cache_layer: what came before x, which is moved on by x. No gradients through it.
        """
        if cu_seqlens is not None and cache_layer is not None:
            raise ValueError("cu_seqlens and cache_layer exclude each other: packed sequences begin here")
        if token_mask is not None:
            x = without_padding(x, token_mask)
        rule, where = RULES[self.rule], {"cu_seqlens": cu_seqlens, "token_mask": token_mask}
        state = tail = None
        if cache_layer is not None:
            state, tail = cache_layer.read(len(x))

        q, k, v, tail = self._project(x, tail, where)
        if self.qk_norm:
            q, k = unit_norm(q), unit_norm(k)
        if rule.features is not None:
            q, k = rule.features(q), rule.features(k)

        g, steps = (None, None) if self.decay is None else self.decay(x)
        beta = None if self.beta_proj is None else self._beta(x)

        written = v * steps.unsqueeze(-1).to(v.dtype) if rule.steps else v
        settings = {"beta": beta, "scale": rule.scale, "initial_state": state, **where}
        if self.num_edits == 1:
            y, state = delta_rule(q, k, written, g, **settings)
        else:
            y, state = delta_product(q, k, written, g, num_edits=self.num_edits, output_final_state=True, **settings)
        if self.skip is not None:
            y = y + self.skip.to(y.dtype).unsqueeze(-1) * v
        if cache_layer is not None:
            cache_layer.write(state, tail)

        y = self.norm(y)
        if self.gate_proj is not None:
            y = y * rule.gate(self.gate_proj(x)).view_as(y)
        return self.o_proj(y.flatten(2))

    def _project(self, x: Tensor, tail: Tensor | None, where: dict[str, Tensor | None]) -> Sequence[Tensor | None]:
        """q [B, L, H', P], k [B, L·edits, H', P], v [B, L·edits, H, V], and the tail after x."""
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv_weight is not None:
            y, tail = short_conv(
                torch.cat(parts, -1), self.conv_weight.squeeze(1), activation="silu", initial_state=tail, **where
            )
            parts = y.split([part.shape[-1] for part in parts], dim=-1)
        batch, length, _ = x.shape
        q = parts[0].reshape(batch, length, self.num_key_heads, self.head_dim)
        k = parts[1].reshape(batch, length * self.num_edits, self.num_key_heads, self.head_dim)
        v = parts[2].reshape(batch, length * self.num_edits, self.num_heads, self.value_dim)
        return q, k, v, tail

    def _beta(self, x: Tensor) -> Tensor:
        """[B, L·edits, H] in float32 or better."""
        batch, length, _ = x.shape
        beta = wide(self.beta_proj(x)).sigmoid().reshape(batch, length * self.num_edits, self.num_heads)
        return 2 * beta if self.allow_negative_eigenvalues else beta

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, heads={self.num_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"


class LinearAttentionCache:
    """One linear attention's past, of one size whatever its length; of use under `torch.no_grad()`.

    Args:
        state_shape: [B, H, P, V].
        tail_shape: [B, W-1, channels].
        state_dtype: of the state.
        dtype: of the tail.

    Attributes:
        state: [B, H, P, V] float32, what the tokens so far have written.
        tail: [B, W-1, channels], the last tokens that the convolution has still to see.
    """

    def __init__(
        self,
        state_shape: tuple[int, ...],
        tail_shape: tuple[int, ...],
        *,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if state_shape[0] < 1:
            raise ValueError(f"a cache needs batch_size ≥ 1, got {state_shape[0]}")
        self.state = torch.zeros(state_shape, device=device, dtype=state_dtype)
        self.tail = torch.zeros(tail_shape, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.state.nbytes + self.tail.nbytes

    def read(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """State and tail, before the tokens of so many sequences."""
        if batch_size != len(self.state):
            raise ValueError(f"the cache is for a batch of {len(self.state)}, got {batch_size}")
        return self.state, self.tail

    def write(self, state: Tensor, tail: Tensor) -> None:
        """State and tail, after them."""
        if state.requires_grad or tail.requires_grad:
            raise ValueError("a cache carries no gradients: call under torch.no_grad()")
        self.state.copy_(state)
        self.tail.copy_(tail)

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Copies of state and tail, for `rollback`."""
        return self.state.clone(), self.tail.clone()

    def rollback(self, snapshot: tuple[Tensor, Tensor]) -> None:
        """Be as at the snapshot again."""
        self.write(*snapshot)
