"""Mends Triton's interpreter where it computes bfloat16 otherwise than any GPU does.

It holds bfloat16 as the bits in a uint16. Up to 3.9 it multiplies those integers in `tl.dot`, cuts float32 off instead
of rounding to nearest even, and loses a carry into the exponent. Dots of 16-bit operands are also taken to float32
first, which is exact and lets numpy call its BLAS.

Half of its time went into what has no effect. A call of a device function looks through all names of the language for
what its kernel's launch has patched already; and sums of integers are formed twice, to see whether they overflow, but
nobody is told, as asserts are off.

Triton 3.6 makes a range's bounds of arrays with one element, which numpy 2.4 no longer takes for numbers.
"""

from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    """Of this process, for good; a second call changes nothing."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow


def _convert(data, source, target, rounding_mode):
    """What `_convert_float` does, in the two conversions that it does wrong; the caller views bits as `target`."""
    if source == tl.bfloat16 and target == tl.float32:
        return data.astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return _convert_float(data, source, target, rounding_mode)


def _patch_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _check_overflow(*operands):
    semantic = interpreter.interpreter_semantic
    if semantic.builder.options.debug:
        type(semantic).binary_op_sanitize_overflow_impl(semantic, *operands)


def _call_device_function(self, *args, **kwargs):
    languages = _languages(self.fn)
    if not languages or any(tl.core.is_builtin(language.load) for language in languages):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@cache
def _languages(fn):
    """`tl` and `tl.core`, where they are visible from within `fn`: what the launch of a kernel patches by name."""
    return {module for module in fn.__globals__.values() if module is tl or module is tl.core}


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = (_widened(handle) for handle in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _widened(handle):
    kind = handle.dtype.scalar
    if kind == tl.bfloat16:
        return _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    if kind.is_floating() and kind.primitive_bitwidth == 8:
        return _convert_float(handle.data, kind, tl.float16, None).view(np.float16).astype(np.float32)
    return handle.data.astype(np.float32) if kind == tl.float16 else handle.data
