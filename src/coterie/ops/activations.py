"""The activation between an MLP's two layers, named by a string so that configs and custom ops can hold it.

A gated activation takes [.., 2F] (gate first, then up) to φ(gate) · up, [.., F]; the others take [.., F] to φ(h).

| name | gated | φ |
|---|---|---|
| swiglu | yes | silu(g) = g · σ(g) |
| geglu, geglu_tanh | yes | gelu, exact or by tanh |
| reglu | yes | relu |
| silu, gelu, gelu_tanh, relu | no | |
| relu2 | no | relu(h)² |

Parameters stand in brackets. alpha: g · σ(alpha · g) instead of silu; limit: gate clamped to ≤ limit and up to
±limit; up_offset: added to up after that. gpt-oss is "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)".
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops._spec import parse_spec

_FUNCTIONS = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "reglu": ("relu", True),
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "relu": ("relu", False),
    "relu2": ("relu2", False),
}


@dataclass(frozen=True)
class Activation:
    """A parsed activation; `parse_activation` makes it."""

    function: str
    gated: bool
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


def parse_activation(text: str) -> Activation:
    """Reads "swiglu" or "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)"."""
    if text not in _PARSED:  # a plain dict: torch.compile traces it, unlike lru_cache
        _PARSED[text] = _parse(text)
    return _PARSED[text]


def _parse(text: str) -> Activation:
    name = text.partition("(")[0]
    if name not in _FUNCTIONS:
        raise ValueError(f"activation must be one of {', '.join(_FUNCTIONS)}, got {text!r}")
    function, gated = _FUNCTIONS[name]
    _, parameters = parse_spec(text, "activation", "swiglu(alpha=1.702, limit=7.0)")
    accepted = {"alpha", "limit", "up_offset"} if gated else {"alpha"}
    if function != "silu":
        accepted -= {"alpha"}
    if unknown := set(parameters) - accepted:
        raise ValueError(f"activation {name!r} takes {sorted(accepted) or 'no parameters'}, got {sorted(unknown)}")
    return Activation(function, gated, **parameters)


# All plain names at once: a compiled graph is guarded by this dict, and compiled again when it changes.
_PARSED: dict[str, Activation] = {name: _parse(name) for name in _FUNCTIONS}


def activation_is_gated(activation: str) -> bool:
    """Whether the first layer must give 2F outputs (gate, then up) for F hidden units."""
    return parse_activation(activation).gated


def apply_activation(hidden: Tensor, activation: str) -> Tensor:
    """[.., 2F] → [.., F] if gated, else [.., F] → [.., F]; plain differentiable torch."""
    act = parse_activation(activation)
    if not act.gated:
        return _function(act, hidden)
    gate, up = hidden.chunk(2, dim=-1)
    if act.limit is not None:
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    if act.up_offset:
        up = up + act.up_offset
    return _function(act, gate) * up


def _function(act: Activation, x: Tensor) -> Tensor:
    if act.function == "silu":
        return F.silu(x) if act.alpha == 1.0 else x * torch.sigmoid(act.alpha * x)
    if act.function == "relu2":
        return F.relu(x).square()
    if act.function == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if act.function == "gelu_tanh" else "none")


def activation_and_gradient(hidden: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation's output [n, F], formed again, and the gradient to `hidden`; no autograd, one fresh tensor each.

    For backward passes inside custom ops, where autograd is switched off.
    """
    act = parse_activation(activation)
    if not act.gated:
        return _function(act, hidden), _function_gradient(act, hidden, grad)
    gate, up = hidden.chunk(2, dim=-1)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    inside_gate = inside_up = None
    if act.limit is not None:
        inside_gate, inside_up = gate <= act.limit, up.abs() <= act.limit
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    if act.up_offset:
        up = up + act.up_offset
    activated = _function(act, gate)
    torch.mul(grad, activated, out=grad_up)
    grad_gate.copy_(_function_gradient(act, gate, grad * up))
    if act.limit is not None:
        grad_gate.mul_(inside_gate)
        grad_up.mul_(inside_up)
    return activated.mul_(up), grad_hidden


def _function_gradient(act: Activation, x: Tensor, grad: Tensor) -> Tensor:
    if act.function == "silu":
        return torch.ops.aten.silu_backward(grad, x if act.alpha == 1.0 else act.alpha * x)
    if act.function == "relu2":
        return 2 * F.relu(x) * grad
    if act.function == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if act.function == "gelu_tanh" else "none")
