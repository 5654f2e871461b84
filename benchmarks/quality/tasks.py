"""Small synthetic tasks that tell apart what token mixers can learn; each makes its data as it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that is in no loss and no score


@dataclass(frozen=True)
class Task:
    """sample: (batch size, length, generator) → ids and targets, both [B, L].

    Attributes:
        vocab_size: of the ids and the targets.
        length: trained at.
        layers: of the models, but for those that are to have more.
        tests: what is scored → its length; of positions from the trained length on, where there are such.
        steps: of training, at most.
        source: where the task comes from.
    """

    vocab_size: int
    length: int
    layers: int
    tests: Mapping[str, int]
    steps: int
    sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    source: str


def recall_many(
    batch: int, length: int, generator: torch.Generator, *, pairs: int, vocab: int
) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then the keys again among random values: what was the value?

    Keys are of the lower half of the vocabulary, values of the upper. Random keys would ask and tell, too.
    """
    half, told = vocab // 2, 2 * pairs
    ids = torch.randint(half, vocab, (batch, length), generator=generator)
    targets = torch.full_like(ids, IGNORED)
    keys = torch.rand(batch, half, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(half, vocab, (batch, pairs), generator=generator)
    ids[:, 0:told:2], ids[:, 1:told:2] = keys, values
    places = (length - told) // 2
    asked = told + 2 * torch.rand(batch, places, generator=generator).argsort(1)[:, :pairs]
    return ids.scatter(1, asked, keys), targets.scatter(1, asked, values)


def recall_noisily(
    batch: int, length: int, generator: torch.Generator, *, keys: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Keys, each followed by its value in this sequence, again and again, and pairs of noise tokens in between.

    ids: keys, as many values, as many noise tokens. Asked is at every key that was there before.
    """
    places = length // 2
    value_of = torch.randint(keys, 2 * keys, (batch, keys), generator=generator)
    key = torch.randint(keys, (batch, places), generator=generator)
    is_noise = torch.rand(batch, places, generator=generator) < noise
    pairs = torch.stack((key, value_of.gather(1, key)), -1)
    noises = torch.randint(2 * keys, 3 * keys, pairs.shape, generator=generator)
    ids = torch.where(is_noise.unsqueeze(-1), noises, pairs).flatten(1)
    same = (key.unsqueeze(2) == key.unsqueeze(1)) & ~is_noise.unsqueeze(1)
    known = same.tril(-1).any(2) & ~is_noise
    targets = torch.full_like(ids, IGNORED)
    targets[:, 0::2] = torch.where(known, pairs[..., 1], IGNORED)
    return ids, targets


def copy_selectively(
    batch: int, length: int, generator: torch.Generator, *, copied: int, vocab: int
) -> tuple[Tensor, Tensor]:
    """A few tokens among blanks, then as many marks, at which they are to be said in order.

    ids: vocab tokens, the blank, the mark.
    """
    blank, mark = vocab, vocab + 1
    ids = torch.full((batch, length), blank)
    targets = torch.full_like(ids, IGNORED)
    places = torch.rand(batch, length - copied, generator=generator).argsort(1)[:, :copied].sort(1).values
    tokens = torch.randint(vocab, (batch, copied), generator=generator)
    ids.scatter_(1, places, tokens)
    ids[:, -copied:], targets[:, -copied:] = mark, tokens
    return ids, targets


def parity(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits; at each, whether the ones so far are odd in number."""
    ids = torch.randint(2, (batch, length), generator=generator)
    return ids, ids.cumsum(1) % 2


def _with(sample: Callable, **settings) -> Callable:
    return lambda batch, length, generator: sample(batch, length, generator, **settings)


TASKS = {
    "mqar": Task(
        vocab_size=64,
        length=64,
        layers=1,
        tests={"L 64, 8 pairs": 64},
        steps=600,
        sample=_with(recall_many, pairs=8, vocab=64),
        source="Zoology, arXiv:2312.04927",
    ),
    "noisy-recall": Task(
        vocab_size=48,
        length=64,
        layers=1,
        tests={"L 64": 64},
        steps=400,
        sample=_with(recall_noisily, keys=16, noise=0.3),
        source="MAD, arXiv:2403.17844",
    ),
    "selective-copy": Task(
        vocab_size=18,
        length=64,
        layers=2,
        tests={"L 64, 8 tokens": 64},
        steps=500,
        sample=_with(copy_selectively, copied=8, vocab=16),
        source="MAD, arXiv:2403.17844",
    ),
    "parity": Task(
        vocab_size=2,
        length=40,
        layers=2,
        tests={"L 40": 40, "on to 160": 160},
        steps=400,
        sample=parity,
        source="arXiv:2411.12537",
    ),
}
