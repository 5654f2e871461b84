"""The activations of `coterie.ops.activations` and their gradients, in float32. FUNCTION names φ.

NaN stays NaN: comparisons are written so that it fails them.
"""

import triton
import triton.language as tl


@triton.jit
def activate(
    gate,
    up,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """φ(gate) · up; for an activation without a gate φ(gate), `up` being ignored."""
    if GATED:
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = _clamp(up, LIMIT)
        return _function(gate, FUNCTION, ALPHA) * (up + OFFSET)
    else:
        return _function(gate, FUNCTION, ALPHA)


@triton.jit
def activation_and_gradient(
    gate,
    up,
    grad,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """(activated, gradient to gate, gradient to up); without a gate the last is the second again."""
    if GATED:
        inside_gate = 1.0
        inside_up = 1.0
        if LIMIT is not None:
            inside_gate = tl.where(gate <= LIMIT, 1.0, 0.0)
            inside_up = tl.where(tl.abs(up) <= LIMIT, 1.0, 0.0)
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = _clamp(up, LIMIT)
        up += OFFSET
        activated = _function(gate, FUNCTION, ALPHA)
        grad_gate = grad * up * _derivative(gate, FUNCTION, ALPHA) * inside_gate
        return activated * up, grad_gate, grad * activated * inside_up
    else:
        grad_gate = grad * _derivative(gate, FUNCTION, ALPHA)
        return _function(gate, FUNCTION, ALPHA), grad_gate, grad_gate


@triton.jit
def _clamp(x, LIMIT: tl.constexpr):
    x = tl.where(x > LIMIT, LIMIT, x)
    return tl.where(x < -LIMIT, -LIMIT, x)


@triton.jit
def _function(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    if FUNCTION == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif FUNCTION == "gelu":
        return x * _normal(x)
    elif FUNCTION == "gelu_tanh":  # ½ (1 + tanh(u / 2)) = σ(u)
        return x * tl.sigmoid(_gelu_argument(x))
    elif FUNCTION == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(FUNCTION == "relu2")
        x = tl.where(x < 0, 0.0, x)
        return x * x


@triton.jit
def _derivative(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    if FUNCTION == "silu":
        s = tl.sigmoid(ALPHA * x)
        return s * (1 + ALPHA * x * (1 - s))
    elif FUNCTION == "gelu":
        return _normal(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FUNCTION == "gelu_tanh":
        s = tl.sigmoid(_gelu_argument(x))
        return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif FUNCTION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(FUNCTION == "relu2")
        return tl.where(x < 0, 0.0, 2 * x)


@triton.jit
def _normal(x):
    """The normal distribution's Φ."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_argument(x):
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)
