"""Triton kernels: tensors in, tensors out. No autograd, no fallback, no nn.Module.

`coterie.ops` imports from here lazily, inside its triton branch; nothing here imports coterie. Under TRITON_INTERPRET=1
the same launchers take CPU tensors.
"""

import triton

if triton.knobs.runtime.interpret:
    from coterie_kernels import _interpreter

    _interpreter.mend()
