"""Proves kernels without a GPU: run in Triton's interpreter, counted, checked, shuffled; and compiled ahead of time.

A new kernel joins by one entry in `catalog`.
"""
