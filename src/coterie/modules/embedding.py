"""The embedding of tokens that is also the head."""

import torch.nn.functional as F
from torch import Tensor, nn


class TiedEmbedding(nn.Embedding):
    """Tokens to vectors, and by the same matrix vectors to logits."""

    def logits(self, x: Tensor) -> Tensor:
        """[.., D] → [.., vocab]."""
        return F.linear(x, self.weight)
