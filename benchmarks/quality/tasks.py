"""Small synthetic tasks that tell apart what token mixers can learn; each makes its data as it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quality.mixers import HYBRIDS, MIXERS, WINDOWED

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
        mixers: that are compared if nothing is said.
        learning_rates: that are tried, likewise.
        batch: sequences of a training step.
        rotary: whether attention has a rotary embedding.
        solved: the loss of a test at which training ends.
        end: where this many positions at the end are the questions, tests score them alone, and are of their lengths.
        test_sample: what tests are drawn from, where that is not `sample`.
    """

    vocab_size: int
    length: int
    layers: int
    tests: Mapping[str, int]
    steps: int
    sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    source: str
    mixers: tuple[str, ...] = tuple(name for name in MIXERS if name not in (WINDOWED, *HYBRIDS))
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    batch: int = 32
    rotary: bool = True
    solved: float = 1e-4
    end: int | None = None
    test_sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]] | None = None


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


def find_needles(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    needles: int,
    asked: int,
    keys: int,
    values: int,
    digits: int,
    fillers: int,
    noise: bool,
) -> tuple[Tensor, Tensor]:
    """Needles, a mark, a key of its own and the digits of its value each, in a haystack; then, what had these keys?

    ids: values, keys, fillers, the mark, the question. The haystack is one sentence again and again, or noise. Asked is
    for every digit, with those before it told.
    """
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :needles, None] + values
    value = torch.randint(values, (batch, needles, digits), generator=generator)
    mark = torch.full_like(key, values + keys + fillers)
    chosen = torch.rand(batch, needles, 1, generator=generator).argsort(1)[:, :asked]
    questions = torch.cat((mark + 1, key, value), 2).gather(1, chosen.expand(-1, -1, digits + 2))
    hay = _haystack(batch, length + 1 - asked * (digits + 2), generator, fillers, noise) + values + keys
    hay, _ = _hide(torch.cat((mark, key, value), 2), hay, generator)
    return _ask(hay, questions, values)


def track_variables(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    chains: int,
    hops: int,
    names: int,
    values: int,
    fillers: int,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """Chains of assignments, a = 7, b = a, c = b, .. among each other in a haystack of noise; then, what are some?

    ids: values, names, fillers, the mark of an assignment, the question. Asked is for any one name of every chain, and
    at every assignment, too, what is assigned: the last 3 · chains - 1 positions are the questions'. Or for the `last`
    names, of which the first alone counts: its answer tells what the others are not.
    """
    value = torch.rand(batch, values, generator=generator).argsort(1)[:, :chains, None]
    name = torch.rand(batch, names, generator=generator).argsort(1)[:, : chains * hops].view(batch, chains, hops)
    name = name + values
    mark = torch.full_like(name, values + names + fillers)
    assignments = torch.stack((mark, name, torch.cat((value, name[..., :-1]), 2), value.expand_as(name)), 3)
    # Chains take turns at random, each in its own order.
    chain = torch.rand(batch, chains * hops, generator=generator).argsort(1) // hops
    order = chain.argsort(stable=True, dim=1).argsort(1).unsqueeze(-1)
    *assignments, assigned = assignments.flatten(1, 2).gather(1, order.expand(-1, -1, 4)).unbind(2)
    hay = _haystack(batch, length + 1 - 3 * chains, generator, fillers, noise=True) + values + names
    hay, places = _hide(torch.stack(assignments, 2), hay, generator)
    hop = torch.full_like(value, hops - 1) if last else torch.randint(hops, value.shape, generator=generator)
    ids, targets = _ask(hay, torch.cat((mark[..., -1:] + 1, name.gather(2, hop), value), 2), values)
    if last:
        targets[:, 1 - 3 * (chains - 1) :] = IGNORED
        return ids, targets
    return ids, targets.scatter(1, places[:, 2::3], assigned)


def _haystack(batch: int, length: int, generator: torch.Generator, fillers: int, noise: bool) -> Tensor:
    """[B, L] of so many fillers: at random, or one after another and again, from anywhere."""
    if noise:
        return torch.randint(fillers, (batch, length), generator=generator)
    return (torch.randint(fillers, (batch, 1), generator=generator) + torch.arange(length)) % fillers


def _hide(pieces: Tensor, hay: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """hay [B, L] with pieces [B, n, size] over it, in their order, none over another; and where, [B, n · size]."""
    batch, count, size = pieces.shape
    free = torch.rand(batch, hay.shape[1] - count * (size - 1), generator=generator)
    first = free.argsort(1)[:, :count].sort(1).values + (size - 1) * torch.arange(count)
    places = (first.unsqueeze(-1) + torch.arange(size)).flatten(1)
    return hay.scatter(1, places, pieces.flatten(1)), places


def _ask(told: Tensor, questions: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """ids and targets of told [B, L] and then questions [B, n, size]: in these each id below `values` is asked for."""
    ids = torch.cat((told, questions.flatten(1)), 1)
    targets = torch.where(ids < values, ids, IGNORED)
    targets[:, : told.shape[1]] = IGNORED
    return ids[:, :-1], targets[:, 1:]


def _with(sample: Callable, **settings) -> Callable:
    return lambda batch, length, generator: sample(batch, length, generator, **settings)


_LENGTHS = {f"L {length}": length for length in (128, 512, 2048)}
_RETRIEVAL = {"length": 128, "tests": _LENGTHS, "batch": 16, "rotary": False, "solved": 3e-3}
_RETRIEVAL["mixers"] = ("attention", WINDOWED, "gated delta", *HYBRIDS)

_CHAINS = {"chains": 3, "hops": 2, "names": 16, "values": 16, "fillers": 16}

# Tasks that are run together, and drawn as curves over the length.
GROUPS = {"retrieval": ("passkey", "multi-key", "variable-tracking")}

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
    "passkey": Task(
        **_RETRIEVAL,
        vocab_size=34,
        layers=2,
        learning_rates=(1e-2,),
        steps=800,
        sample=_with(find_needles, needles=1, asked=1, keys=8, values=16, digits=4, fillers=8, noise=False),
        source="S-NIAH of RULER, arXiv:2404.06654",
        end=4,
    ),
    "multi-key": Task(
        **_RETRIEVAL,
        vocab_size=50,
        layers=2,
        learning_rates=(1e-2,),
        steps=800,
        sample=_with(find_needles, needles=8, asked=4, keys=16, values=16, digits=1, fillers=16, noise=True),
        source="MK-NIAH of RULER, arXiv:2404.06654",
        end=11,
    ),
    "variable-tracking": Task(
        **_RETRIEVAL,
        vocab_size=50,
        # Each kind of layer twice: above one linear layer, attention learns the first hop, and there is no second.
        layers=4,
        learning_rates=(5e-3,),
        steps=1600,
        # The last names alone are hardly learned: what finds any name's value has to be found first.
        sample=_with(track_variables, **_CHAINS, last=False),
        test_sample=_with(track_variables, **_CHAINS, last=True),
        source="VT of RULER, arXiv:2404.06654",
        end=8,
    ),
}
