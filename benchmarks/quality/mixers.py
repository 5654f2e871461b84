"""The models that are compared: alike in everything but what mixes positions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules import Attention, LinearAttention, RMSNorm, RotaryEmbedding, SparseAttention
from coterie.ops import short_conv

DIM, NUM_HEADS, CONV, WINDOW = 64, 2, 4, 8
SPARSE = {"scorer": "nsa", "window": WINDOW, "block_size": 16, "num_blocks": 6}


@dataclass(frozen=True)
class Mixer:
    """layers: "linear", "attention", "window" and "sparse" ones, repeated. settings: of the linear ones."""

    layers: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _linear(rule: str, **settings) -> Mixer:
    return Mixer(("linear",), {"rule": rule, **settings})


DEEP_ATTENTION, HYBRID = "attention, 4 layers", "hybrid 3:1, 4 layers"
WINDOWED, HYBRIDS = f"window of {WINDOW}", ("gated delta, attention", "gated delta, sparse")
MIXERS = {
    "attention": Mixer(("attention",)),
    "linear": _linear("linear"),
    "gla": _linear("gla"),
    "delta": _linear("delta"),
    "delta ±": _linear("delta", allow_negative_eigenvalues=True),
    "gated delta": _linear("gated_delta"),
    "gated delta ±": _linear("gated_delta", allow_negative_eigenvalues=True),
    "kda": _linear("kda"),
    "kda ±": _linear("kda", allow_negative_eigenvalues=True),
    DEEP_ATTENTION: Mixer(("attention",) * 4),
    HYBRID: Mixer(("linear",) * 3 + ("attention",), {"rule": "gated_delta"}),
    WINDOWED: Mixer(("window",)),
    HYBRIDS[0]: Mixer(("linear", "attention"), {"rule": "gated_delta"}),
    HYBRIDS[1]: Mixer(("linear", "sparse"), {"rule": "gated_delta"}),
}


class Model(nn.Module):
    """Embedding, mixers one after another, and the embedding as the head: ids [B, L] → logits.

    There are no MLPs: what is learned, mixers learn. All of them see the last tokens through a short convolution:
    linear attention through its own, attention through one before it, so that it need not find out first which token
    came before. Mixers begin with hardly any output, beside which the embedding is of size 1.

    Without `rotary` that is all attention knows of positions, and it has q/k norms: a rotary embedding is lost at
    distances that it was not trained at.
    """

    def __init__(self, vocab_size: int, mixer: Mixer, num_layers: int, *, rotary: bool = True) -> None:
        super().__init__()
        kinds = mixer.layers * max(1, num_layers // len(mixer.layers))
        self.embedding = nn.Embedding(vocab_size, DIM)
        nn.init.normal_(self.embedding.weight, std=DIM**-0.5)
        self.layers = nn.ModuleList(_Layer(kind, mixer.settings, None if rotary else "head") for kind in kinds)
        self.norm = RMSNorm(DIM)
        self.rotary = RotaryEmbedding(DIM // NUM_HEADS)
        self.has_rotary = rotary

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * DIM**0.5
        positions = torch.arange(ids.shape[1])
        rotary = self.rotary(positions if self.has_rotary else positions.zero_())
        for layer in self.layers:
            x = layer(x, rotary)
        return F.linear(self.norm(x), self.embedding.weight)


class _Layer(nn.Module):
    def __init__(self, kind: str, settings: Mapping[str, Any], qk_norm: str | None) -> None:
        super().__init__()
        self.norm, self.conv, self.conv_norm = RMSNorm(DIM), None, None
        if kind == "linear":
            self.mixer = LinearAttention(DIM, NUM_HEADS, short_conv=CONV, **settings)
        else:
            if kind == "sparse":
                self.mixer = SparseAttention(DIM, NUM_HEADS, qk_norm=qk_norm, **SPARSE)
            else:
                self.mixer = Attention(DIM, NUM_HEADS, qk_norm=qk_norm, window=WINDOW if kind == "window" else None)
            self.conv, self.conv_norm = nn.Parameter(torch.randn(DIM, CONV) * CONV**-0.5), RMSNorm(DIM)
        self.mixer.reset_parameters(DIM**-0.5, output_std=0.1 * DIM**-0.5)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.conv is not None:
            x = x + short_conv(self.conv_norm(x), self.conv)[0]
        return x + self.mixer(self.norm(x), rotary)
