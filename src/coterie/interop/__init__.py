"""Other people's models and runtimes: coterie's experts inside transformers, its checkpoints, GGUF and ONNX files."""

from coterie.interop.gguf_export import to_gguf
from coterie.interop.hf_checkpoint import from_hf, to_hf
from coterie.interop.hf_experts import register_hf
from coterie.interop.onnx_export import to_onnx

__all__ = ["from_hf", "register_hf", "to_gguf", "to_hf", "to_onnx"]
