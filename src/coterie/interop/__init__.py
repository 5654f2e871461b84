"""Other people's models: transformers' with coterie's experts inside, and its checkpoints as coterie's models."""

from coterie.interop.hf_checkpoint import from_hf, to_hf
from coterie.interop.hf_experts import register_hf

__all__ = ["from_hf", "register_hf", "to_hf"]
