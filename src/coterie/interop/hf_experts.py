"""coterie's experts inside transformers' models: a name for their experts interface.

    coterie.interop.register_hf()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="coterie")

One function serves every family on the interface. Where its experts are a gated MLP of a known activation, or one
without a gate, they go through `expert_mlp`. Where they have something of their own between the layers or after them
(a custom gate, interleaved gate and up, a norm), the two products are `grouped_matmul` and the rest is theirs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from coterie.modules.packed import Packed
from coterie.ops._autocast import autocast_dtype
from coterie.ops._expert_mlp_packed import packed_expert_mlp
from coterie.ops._packed import PackedStack, packed_grouped_matmul
from coterie.ops._rows import sort_rows, sum_slots
from coterie.ops.expert_mlp import expert_mlp
from coterie.ops.grouped_matmul import grouped_matmul

NAME = "coterie"

# transformers' activations by their names there, and ours: with a gate, and without.
_ACTIVATIONS = {
    "silu": ("swiglu", "silu"),
    "gelu": ("geglu", "gelu"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "relu": ("reglu", "relu"),
    "relu2": (None, "relu2"),
}
# Filled by `register_hf`, so that a forward imports and instantiates nothing: those names by activation module, and
# what gates when a family has no gate of its own.
_NAMES: dict[type, tuple[str | None, str]] = {}
_PLAIN_GATES: set[Callable] = set()


def register_hf() -> None:
    """Make coterie known to transformers; calling it again changes nothing.

    After it, `from_pretrained(..., experts_implementation="coterie")` and
    `model.set_experts_implementation("coterie")` work, in training and inference, on any device coterie has; and
    `AutoModelForCausalLM.from_pretrained` takes the folder of a coterie model, see `CoterieForCausalLM`.

    Raises:
        ImportError: transformers 5 is not installed (pip install 'coterie[hf]').
    """
    try:
        from transformers.activations import ACT2FN
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

        from coterie.interop.hf_model import register_hf_model
    except ImportError as error:
        raise ImportError("register_hf needs transformers 5 or later: pip install 'coterie[hf]'") from error
    _NAMES.update({type(ACT2FN[name]): ours for name, ours in _ACTIVATIONS.items()})
    _PLAIN_GATES.add(_default_apply_gate)
    ALL_EXPERTS_FUNCTIONS.register(NAME, hf_experts_forward)
    register_hf_model()


def hf_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a transformers experts module `self`.

    Args:
        hidden_states: [T, D].
        top_k_index: [T, K]; ids of num_experts and more are slots of other ranks, which are not computed.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        ValueError: the module's weights are not what the interface says, or are quantized; the module is named.
    """
    up, down, up_bias, down_bias = _packed_weights(self) if isinstance(self, Packed) else _weights(self)
    x = hidden_states if autocast_dtype(hidden_states.device.type) else hidden_states.to(up.dtype)
    expert_ids = top_k_index.to(torch.int64)
    weights = top_k_weights
    if self._is_expert_parallel:
        weights = weights.masked_fill(expert_ids >= self.num_experts, 0.0)
        expert_ids = expert_ids.clamp(max=self.num_experts)
    activation = _activation(self)
    lora = getattr(self, "lora", None)  # `add_lora` gives it
    if lora is not None and lora.applies:
        gate = activation or (self._apply_gate if self.has_gate else self.act_fn)
        norm = self.post_expert_norm if self.has_post_expert_norm else None
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        y = lora(x, expert_ids, weights, up, down, **biases, activation=gate, norm=norm)
    elif activation is not None:
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        forward = packed_expert_mlp if isinstance(self, Packed) else expert_mlp
        y = forward(x, expert_ids, weights, up, down, **biases, activation=activation)
    else:
        y = _by_their_own_gate(self, x, expert_ids, weights, up, down, up_bias, down_bias)
    return y.to(hidden_states.dtype)


def _weights(self: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """up [E, 2F or F, D], down [E, D, F] and their biases [E, ..] or None."""
    first = "gate_up_proj" if self.has_gate else "up_proj"
    names = [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if self.has_bias else [])
    found = [getattr(self, name, None) for name in names]
    for name, t, dims in zip(names, found, (3, 3, 2, 2), strict=False):
        if not isinstance(t, Tensor) or t.dim() != dims or not t.is_floating_point() or t.element_size() < 2:
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"experts_implementation 'coterie' cannot serve {type(self).__name__}: its {name} must be a tensor of "
                f"{dims} dimensions in floating point of 16 bits or more, got {got}"
            )
    up, down = (t.mT for t in found[:2]) if self.is_transposed else found[:2]
    return up, down, *(found[2:] or (None, None))


def _packed_weights(self: Packed) -> tuple[PackedStack, PackedStack, Tensor | None, Tensor | None]:
    first = "gate_up_proj" if self.has_gate else "up_proj"
    biases = (self.get_parameter(f"{name}_bias") if self.has_bias else None for name in (first, "down_proj"))
    return self.packed[first], self.packed["down_proj"], *biases


def _activation(self: nn.Module) -> str | None:
    """What `expert_mlp` calls this module's activation; None where it does something else than that."""
    plain = type(self)._apply_gate in _PLAIN_GATES and self.is_concatenated
    if self.has_post_expert_norm or (self.has_gate and not plain):
        return None
    gated, ungated = _NAMES.get(type(getattr(self, "act_fn", None)), (None, None))
    return gated if self.has_gate else ungated


def _by_their_own_gate(self, x, expert_ids, weights, up, down, up_bias, down_bias) -> Tensor:
    order, counts = sort_rows(expert_ids, self.num_experts)
    token = order // expert_ids.shape[1]
    if dtype := autocast_dtype(x.device.type):
        tensors = (x, up, down, up_bias, down_bias)
        x, up, down, up_bias, down_bias = (t.to(dtype) if isinstance(t, Tensor) else t for t in tensors)
    multiply = packed_grouped_matmul if isinstance(self, Packed) else grouped_matmul
    hidden = multiply(x, up, counts, rows=token, bias=up_bias)  # [N, 2F]
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    rows = multiply(hidden.to(down.dtype), down, counts, bias=down_bias)  # [N, D]
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return sum_slots(rows, order, weights)
