"""Models and corpora small enough that a training step takes milliseconds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coterie.models.config import TransformerConfig
from coterie.models.transformer import Transformer
from coterie.training import Batches, TrainConfig

SMALL = {
    "steps": 6,
    "batch_size": 4,
    "length": 16,
    "warmup_steps": 2,
    "eval_every": 3,
    "eval_batches": 2,
    "checkpoint_every": 3,
    "precision": "float32",  # whatever the machine multiplies natively: compared with plain float32
}


@pytest.fixture
def corpus():
    """About 6 kB of text with something to learn."""
    words = [b"router", b"expert", b"token", b"weight", b"sparse", b"dense"]
    order = np.random.default_rng(0).integers(len(words), size=1000)
    return np.frombuffer(b" ".join(words[i] for i in order), dtype=np.uint8)


@pytest.fixture
def valid(corpus):
    return corpus[::-1].copy()[:700]


@pytest.fixture
def make_model():
    """make_model(seed, dropout=, dtype=, **config): two MoE layers of four experts unless told otherwise."""

    def make(seed=0, *, dropout=0.0, dtype=None, **changes):
        fields = {
            "vocab_size": 256,
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_experts": 4,
            "top_k": 2,
            "expert_hidden_dim": 8,
            **changes,
        }
        if fields.get("feed_forwards") == ("mlp",):
            fields |= {"hidden_dim": 16, "num_experts": 0, "top_k": 0, "expert_hidden_dim": 0}
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(**fields), dtype=dtype)
        if dropout:
            model.embedding.register_forward_hook(lambda m, _, out: F.dropout(out, dropout, training=m.training))
        return model

    return make


@pytest.fixture
def make_config():
    return lambda **changes: TrainConfig(**{**SMALL, **changes})


@pytest.fixture
def make_batches(corpus):
    return lambda config, seed=0: Batches(corpus, config.batch_size, config.length, seed=seed)
