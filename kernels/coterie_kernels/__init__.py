"""Triton kernels: tensors in, tensors out. No autograd, no fallback, no nn.Module.

`coterie.ops` imports from here lazily, inside its triton branch; nothing here imports coterie.
"""
