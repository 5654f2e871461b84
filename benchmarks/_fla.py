"""flash-linear-attention's kernels in Triton's interpreter."""

import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def interpreted(module: str, name: str) -> Callable[..., Any] | None:
    """The function of that name, its kernels ready to be interpreted; None if it is not there, or does not import."""
    import triton.language as tl
    from triton.runtime import autotuner

    import coterie_kernels  # noqa: F401 (mends the interpreter)

    # Configurations are not timed, there being nothing to time them on: the first of equals is taken.
    autotuner.Autotuner._bench = lambda self, *args, config, **meta: [1.0, 1.0, 1.0]
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception:
        return None

    def tensors_of_range(*bounds: Any) -> Iterator[Any]:
        """As a compiler has it: numbers that `.to` can be asked of."""
        for i in builtins.range(*map(int, bounds)):
            yield tl.full((), i, tl.int32)

    for own, loaded in list(sys.modules.items()):
        if own.startswith("fla.ops") and hasattr(loaded, "tl"):
            loaded.range = tensors_of_range
    return function
