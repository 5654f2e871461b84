"""Whole models: the config, the transformer, its cache, generation, saved files and presets."""

from coterie.models.cache import CacheSnapshot, KVCache
from coterie.models.config import TransformerConfig
from coterie.models.generation import generate
from coterie.models.lora import load_lora, save_lora
from coterie.models.presets import PRESETS, attention_twin, dense_twin, preset
from coterie.models.transformer import Transformer, TransformerOutput

__all__ = [
    "PRESETS",
    "CacheSnapshot",
    "KVCache",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "attention_twin",
    "dense_twin",
    "generate",
    "load_lora",
    "preset",
    "save_lora",
]
