"""Other people's models: coterie's experts inside transformers' models."""

from coterie.interop.hf_experts import register_hf

__all__ = ["register_hf"]
