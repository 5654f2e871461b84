"""Other people's models, and their tools.

`register_hf`: transformers' models with coterie's experts inside, and coterie's models inside transformers
(`CoterieForCausalLM`). `from_hf`, `to_hf`: its checkpoints as coterie's models. `to_gguf`, `to_onnx`: files for
llama.cpp and onnxruntime. `HubTransformer`: the Hub.
"""

from importlib import import_module
from typing import Any

from coterie.interop.gguf_export import to_gguf
from coterie.interop.hf_checkpoint import from_hf, to_hf
from coterie.interop.hf_experts import register_hf
from coterie.interop.hub import HubTransformer
from coterie.interop.onnx_export import to_onnx

# What derives from transformers' classes, and so imports it: when it is asked for.
_LAZY = {"CoterieConfig": "hf_model", "CoterieForCausalLM": "hf_model"}

__all__ = [
    "CoterieConfig",
    "CoterieForCausalLM",
    "HubTransformer",
    "from_hf",
    "register_hf",
    "to_gguf",
    "to_hf",
    "to_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_LAZY[name]}")
    except ImportError as error:
        raise ImportError(f"{name} needs transformers 5 or later: pip install 'coterie[hf]'") from error
    return getattr(module, name)
