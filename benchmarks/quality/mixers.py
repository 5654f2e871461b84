"""The models that are compared: alike in everything but what mixes positions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules import Attention, GatedMLP, LinearAttention, RMSNorm, RotaryEmbedding
from coterie.ops import short_conv

NUM_LAYERS, DIM, NUM_HEADS, CONV = 4, 64, 2, 4


@dataclass(frozen=True)
class Mixer:
    """layers: "linear" or "attention" each; settings: of the linear ones."""

    layers: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _linear(rule: str, **settings) -> Mixer:
    return Mixer(("linear",) * NUM_LAYERS, {"rule": rule, **settings})


MIXERS = {
    "attention": Mixer(("attention",) * NUM_LAYERS),
    "linear": _linear("linear"),
    "gla": _linear("gla"),
    "delta": _linear("delta"),
    "delta ±": _linear("delta", allow_negative_eigenvalues=True),
    "gated delta": _linear("gated_delta"),
    "gated delta ±": _linear("gated_delta", allow_negative_eigenvalues=True),
    "kda": _linear("kda"),
    "kda ±": _linear("kda", allow_negative_eigenvalues=True),
    "hybrid 3:1": Mixer(("linear",) * (NUM_LAYERS - 1) + ("attention",), {"rule": "gated_delta"}),
}


class Model(nn.Module):
    """Embedding, layers of short convolution, mixer and MLP, and the embedding as the head: ids [B, L] → logits.

    Every mixer has the convolution before it, as in Zoology: with it, attention need not find out first which token
    came before.
    """

    def __init__(self, vocab_size: int, mixer: Mixer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, DIM)
        self.layers = nn.ModuleList(_Layer(kind, mixer.settings) for kind in mixer.layers)
        nn.init.normal_(self.embedding.weight, std=DIM**-0.5)
        self.norm = RMSNorm(DIM)
        self.rotary = RotaryEmbedding(DIM // NUM_HEADS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        rotary = self.rotary(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x, rotary)
        return F.linear(self.norm(x), self.embedding.weight)


class _Layer(nn.Module):
    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(DIM) for _ in range(3))
        self.conv = nn.Parameter(torch.randn(DIM, CONV) * CONV**-0.5)
        linear = {"short_conv": 0, **settings}
        self.mixer = LinearAttention(DIM, NUM_HEADS, **linear) if kind == "linear" else Attention(DIM, NUM_HEADS)
        self.mlp = GatedMLP(DIM, 2 * DIM)
        for part in (self.mixer, self.mlp):
            part.reset_parameters(DIM**-0.5)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + short_conv(self.norms[0](x), self.conv)[0]
        x = x + self.mixer(self.norms[1](x), rotary)
        return x + self.mlp(self.norms[2](x))
