"""`delta_rule` chunk by chunk in plain torch: what chunks need of their own tokens all at once, their states in turn.

In a chunk of C tokens, with G the cumulative log decay and S the state before it:

    R = Z − Ẽ S,  Δ = (I + A)⁻¹ R,  O = Q̃ S + M Δ,  S' = diag(exp G_C) S + K̂ᵀ Δ

A_ij = Σ_p e_ip k_jp exp(G_ip − G_jp) for i > j, M the same of q for i ≥ j, Ẽ = e exp G, Q̃ = q exp G, and
K̂_j = k_j exp(G_C − G_j) (Yang 2024, arXiv:2406.06484, arXiv:2412.06464). Kept for backward: the inputs, and a state
every few chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SPAN_ROWS = 2**14  # tokens × heads worked on together: few enough for the cache
_BLOCK = 16  # rows by which a triangle is solved, and within which a decay per channel is measured
_LEAST_DECAY = -60.0  # log; exp of less is nothing beside 1, and −∞ − (−∞) would be NaN


class Inputs(NamedTuple):
    """Of N tokens: q, k [N, H', P], v [N, H, V], g [N, H] or [N, H, P], erase [N, H' or H, P], beta [N, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    erase: Tensor | None
    beta: Tensor | None


class Terms(NamedTuple):
    """Of X chunks, [X, H, C, ..]: Z [V], Q̃, K̂ [P], M [C], exp G_C [X, H, 1 or P, 1], Ẽ [P], A [C]; None: 1, 0, 0."""

    z: Tensor
    q: Tensor
    k: Tensor
    m: Tensor
    last: Tensor | None
    erase: Tensor | None
    a: Tensor | None


@dataclass(frozen=True)
class Plan:
    """Which tokens are in which chunk: a step has one of every sequence that has not ended, the longest ones first.

    Attributes:
        index: [X, C] int64, a token each, step by step; -1 is padding, which changes no state.
        steps: how many chunks each step has, never growing.
        order: [number of sequences], the longest first.
    """

    index: Tensor
    steps: list[int]
    order: Tensor

    def spans(self, heads: int) -> Iterator[tuple[Tensor, list[slice]]]:
        """Runs of steps that are worked on together: their part of the index, and where in it each step is."""
        room = max(1, _SPAN_ROWS // (heads * self.index.shape[1]))
        first, parts, filled = 0, [], 0
        for chunks in self.steps:
            if parts and filled + chunks > room:
                yield self.index[first : first + filled], parts
                first, parts, filled = first + filled, [], 0
            parts.append(slice(filled, filled + chunks))
            filled += chunks
        if parts:
            yield self.index[first : first + filled], parts


def make_plan(bounds: Sequence[tuple[int, int]], chunk: int, device: torch.device) -> Plan:
    """For sequences that are tokens start..stop-1 each."""
    starts, stops = torch.tensor(bounds, dtype=torch.int64).view(-1, 2).unbind(1)
    order = (stops - starts).argsort(descending=True, stable=True)
    starts, stops = starts[order], stops[order]
    counts = -(-(stops - starts) // chunk)
    step = torch.arange(int(counts.max()) if len(counts) else 0)[:, None]
    active = counts > step  # [steps, sequences]
    index = (starts + step * chunk)[active][:, None] + torch.arange(chunk)
    index = index.masked_fill(index >= stops.expand_as(active)[active][:, None], -1)
    return Plan(index.to(device), active.sum(1).tolist(), order.to(device))


def forward(inputs: Inputs, states: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """o [N, H, V] in v's dtype; the states after the last tokens; and those before each span, [.., H, P, V].

    states: [number of sequences, H, P, V] before the first token, in the dtype that is computed in.
    """
    o = inputs.v.new_zeros(inputs.v.shape)
    state, kept = states[plan.order], []
    for index, parts in plan.spans(inputs.v.shape[1]):
        kept.append(state[: parts[0].stop].clone())
        taken = _take(inputs, index, states.dtype)
        terms = make_terms(_edits(taken, scale), _Decay.of(taken.g))
        inverse = None if terms.a is None else invert(terms.a)
        rows = torch.empty_like(terms.z)
        for part in parts:
            before = state[: part.stop - part.start]
            delta = _delta(terms, inverse, part, before)
            rows[part] = terms.q[part] @ before + terms.m[part] @ delta
            _advance(before, terms, part, delta)
        _put(o, index, rows)
    final = torch.empty_like(state)
    final[plan.order] = state
    return o, final, torch.cat(kept) if kept else states[:0].clone()


def backward(
    grad: Tensor, grad_states: Tensor, inputs: Inputs, kept: Tensor, plan: Plan, scale: float
) -> tuple[Inputs, Tensor]:
    """Gradients to the inputs, and to the states before the first tokens."""
    grads = Inputs(*(None if t is None else torch.zeros_like(t) for t in inputs))
    grad_state = grad_states[plan.order]
    spans = list(plan.spans(inputs.v.shape[1]))
    befores = kept.split([parts[0].stop for _, parts in spans])
    for (index, parts), before in zip(reversed(spans), reversed(befores), strict=True):
        taken = _take(inputs, index, kept.dtype)
        edits, decay = _edits(taken, scale), _Decay.of(taken.g)
        terms = make_terms(edits, decay)
        rows = _take_rows(grad, index, kept.dtype)
        term_grads = _through_states(rows, terms, parts, before.clone(), grad_state)
        for total, gradient in zip(grads, _input_grads(taken, edits, decay, terms, term_grads, scale), strict=True):
            if total is not None:
                _put(total, index, gradient)
    grad_initial = torch.empty_like(grad_state)
    grad_initial[plan.order] = grad_state
    return grads, grad_initial


def _through_states(rows: Tensor, terms: Terms, parts: Sequence[slice], state: Tensor, grad_state: Tensor) -> Terms:
    """The gradients to `terms` from those to their outputs, `rows` [X, H, C, V], and to the states after them.

    state: before the span; both it and grad_state, which becomes that before the span, are written to.
    """
    inverse = None if terms.a is None else invert(terms.a)
    delta, befores, afters = torch.empty_like(rows), *(rows.new_empty(len(rows), *state.shape[1:]) for _ in range(2))
    for part in parts:
        before = state[: part.stop - part.start]
        befores[part] = before
        delta[part] = _delta(terms, inverse, part, before)
        _advance(before, terms, part, delta[part])
    grad_z = terms.m.mT @ rows  # so far to Δ
    for part in reversed(parts):
        after = grad_state[: part.stop - part.start]
        afters[part] = after
        grad_z[part] += terms.k[part] @ after
        if inverse is not None:
            grad_z[part] = (inverse[part].mT @ grad_z[part].to(inverse.dtype)).to(grad_z.dtype)
        if terms.last is not None:
            after *= terms.last[part]
        after += terms.q[part].mT @ rows[part]
        if inverse is not None:
            after -= terms.erase[part].mT @ grad_z[part]
    grad_last = None
    if terms.last is not None:
        grad_last = (afters * befores).sum(-1, keepdim=True)
        if terms.last.shape[2] == 1:
            grad_last = grad_last.sum(2, keepdim=True)
    return Terms(
        z=grad_z,
        q=rows @ befores.mT,
        k=delta @ afters.mT,
        m=rows @ delta.mT,
        last=grad_last,
        erase=None if inverse is None else -grad_z @ befores.mT,
        a=None if inverse is None else -grad_z @ delta.mT,
    )


def _advance(state: Tensor, terms: Terms, part: slice, delta: Tensor) -> None:
    """state [X, H, P, V], in place, to that after its chunks."""
    if terms.last is not None:
        state *= terms.last[part]
    state += terms.k[part].mT @ delta


def _delta(terms: Terms, inverse: Tensor | None, part: slice, state: Tensor) -> Tensor:
    """What the chunks write, given the states before them.

    Where keys are alike and β is near 2, the triangle's inverse is large and what it makes is small. So it is applied
    after the subtraction, and is float64 all along: then chunks err no more than the recurrence does.
    """
    if inverse is None:
        return terms.z[part]
    difference = terms.z[part] - terms.erase[part] @ state
    return (inverse[part] @ difference.to(inverse.dtype)).to(difference.dtype)


def make_terms(edits: "_Edits", decay: "_Decay") -> Terms:
    q, k, v, erase = edits
    if erase is None:
        return Terms(v, decay.since_start(q), decay.until_end(k), decay.multiply(q, k).tril(), decay.whole, None, None)
    return Terms(
        z=v,
        q=decay.since_start(q),
        k=decay.until_end(k),
        m=decay.multiply(q, k).tril(),
        last=decay.whole,
        erase=decay.since_start(erase),
        a=decay.multiply(_widened(erase), _widened(k)).tril(-1),
    )


def _input_grads(inputs: Inputs, edits: "_Edits", decay: "_Decay", terms: Terms, grads: Terms, scale: float) -> Inputs:
    """The gradients to the inputs [X, H or H', C, ..] from those to the terms of their edits."""
    q, k, _, erase = edits
    grad_q, grad_k = decay.multiply_backward(grads.m.tril(), q, k)
    grad_q += decay.since_start(grads.q)
    grad_k += decay.until_end(grads.k)
    grad_erase = None
    if erase is not None:
        grad_erase, more = decay.multiply_backward(grads.a.tril(-1), erase, k)
        grad_erase += decay.since_start(grads.erase)
        grad_k += more
    grad_g = None
    if inputs.g is not None:
        grad_total = q * grad_q - k * grad_k  # to G
        if erase is not None:
            grad_total += erase * grad_erase
        grad_total[:, :, -1] += (terms.k * grads.k).sum(2) + (terms.last * grads.last).mT.squeeze(2) / (
            1 if inputs.g.dim() == 4 else k.shape[-1]
        )
        if inputs.g.dim() == 3:
            grad_total = grad_total.sum(-1)
        grad_g = grad_total.flip(2).cumsum(2).flip(2).masked_fill(inputs.g < _LEAST_DECAY, 0.0)
    grad_v, grad_beta = grads.z, None
    if inputs.beta is not None:
        beta = inputs.beta.unsqueeze(-1)
        grad_beta = (grad_erase * k).sum(-1) + (grad_v * inputs.v).sum(-1)
        grad_k, grad_v, grad_erase = grad_k + beta * grad_erase, beta * grad_v, None
    grad_q, grad_k, grad_erase = (
        t if t is None else _sum_heads(t, like.shape[1])
        for t, like in ((grad_q * scale, inputs.q), (grad_k, inputs.k), (grad_erase, inputs.erase))
    )
    return Inputs(grad_q, grad_k, grad_v, grad_g, grad_erase, grad_beta)


class _Edits(NamedTuple):
    """scale · q, k, z and e, [X, H, C, ..]."""

    q: Tensor
    k: Tensor
    z: Tensor
    erase: Tensor | None


def _edits(inputs: Inputs, scale: float) -> _Edits:
    """Of inputs [X, H or H', C, ..], for every head of v."""
    heads = inputs.v.shape[1]
    q, k, erase = (
        t if t is None or t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)
        for t in (inputs.q, inputs.k, inputs.erase)
    )
    if inputs.beta is None:
        return _Edits(q * scale, k, inputs.v, erase)
    beta = inputs.beta.unsqueeze(-1)
    return _Edits(q * scale, k, beta * inputs.v, beta * k)


def _widened(t: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return t if t.device.type == "mps" else t.double()


def _sum_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[1] == heads else t.unflatten(1, (heads, -1)).sum(2)


class _Decay:
    """What decay does to the rows [X, H, C, P] of a chunk; this one: nothing."""

    whole: Tensor | None = None  # exp G_C, [X, H, 1 or P, 1]
    _since: Tensor | None = None  # exp G, [X, H, C, 1 or P]
    _until: Tensor | None = None  # exp(G_C − G)

    @staticmethod
    def of(g: Tensor | None) -> "_Decay":
        if g is None:
            return _Decay()
        # In float64: the difference of two large sums is what counts.
        total = _widened(g.clamp(min=_LEAST_DECAY)).cumsum(2)
        return (_DecayOfHeads if g.dim() == 3 else _DecayOfChannels)(total, g.dtype)

    def since_start(self, rows: Tensor) -> Tensor:
        """rows · exp G."""
        return rows if self._since is None else rows * self._since

    def until_end(self, rows: Tensor) -> Tensor:
        """rows · exp(G_C − G)."""
        return rows if self._until is None else rows * self._until

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        """Σ_p left_ip k_jp exp(G_ip − G_jp) where i ≥ j, anything where not."""
        return left @ k.mT

    def multiply_backward(self, grad: Tensor, left: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to left and k; grad is 0 where i < j."""
        return grad @ k, grad.mT @ left


class _DecayOfHeads(_Decay):
    def __init__(self, total: Tensor, dtype: torch.dtype) -> None:
        ends, chunk = total[..., -1:], total.shape[2]
        later = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
        between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype)
        self._between = between.masked_fill_(later, -torch.inf).exp_()
        self._since, self._until = (t.to(dtype).exp().unsqueeze(-1) for t in (total, ends - total))
        self.whole = ends.to(dtype).exp().unsqueeze(-1)

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        return (left @ k.mT) * self._between

    def multiply_backward(self, grad: Tensor, left: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad * self._between
        return grad @ k, grad.mT @ left


class _DecayOfChannels(_Decay):
    """exp(G_i − G_j) is taken apart at the first row of i's block of 16, so that neither factor is above 1; within a
    block it is formed for every pair."""

    def __init__(self, total: Tensor, dtype: torch.dtype) -> None:
        ends = total[:, :, -1:]
        self._total, self._dtype = total, dtype
        self._since, self._until = (t.to(dtype).exp() for t in (total, ends - total))
        self.whole = ends.to(dtype).exp().mT

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        products = left.new_zeros(*left.shape[:3], k.shape[2])
        for here, since, until, within in self._blocks():
            rows, before = left[:, :, here], slice(0, here.start)
            products[:, :, here, before] = (rows * since) @ (k[:, :, before] * until).mT
            pairs = within * k[:, :, None, here]  # [X, H, i, j, P]
            products[:, :, here, here] = (pairs @ rows.unsqueeze(-1)).squeeze(-1)
        return products

    def multiply_backward(self, grad: Tensor, left: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        grad_left, grad_k = torch.zeros_like(left), torch.zeros_like(k)
        for here, since, until, within in self._blocks():
            rows, before = left[:, :, here], slice(0, here.start)
            above = grad[:, :, here, before]
            grad_left[:, :, here] = (above @ (k[:, :, before] * until)) * since
            grad_k[:, :, before] += (above.mT @ (rows * since)) * until
            pairs = grad[:, :, here, here].unsqueeze(-1) * within
            grad_left[:, :, here] += (pairs * k[:, :, None, here]).sum(3)
            grad_k[:, :, here] += (pairs * rows.unsqueeze(3)).sum(2)
        return grad_left, grad_k

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, exp(G − G of the first), exp(G of the first − earlier G), exp(G_i − G_j) or 0 [X, H, 16, 16, P])."""
        later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=self._total.device).triu(1).unsqueeze(-1)
        for first in range(0, self._total.shape[2], _BLOCK):
            here = slice(first, first + _BLOCK)
            g, start = self._total[:, :, here], self._total[:, :, first : first + 1]
            within = (g.unsqueeze(3) - g.unsqueeze(2)).to(self._dtype).masked_fill_(later, -torch.inf).exp_()
            since, until = (t.to(self._dtype).exp() for t in (g - start, start - self._total[:, :, :first]))
            yield here, since, until, within


def invert(a: Tensor) -> Tensor:
    """(I + A)⁻¹ of strictly lower triangular A [.., C, C], C = 16 · a power of two.

    Blocks of 16 row by row, then two blocks into one: a series of powers of A would grow without bound where keys are
    alike.
    """
    size, chunk = _BLOCK, a.shape[-1]
    blocks = _diagonal_blocks(a, size)
    inverse = torch.eye(size, dtype=a.dtype, device=a.device).expand(blocks.shape).clone()
    for row in range(1, size):
        inverse[..., row, :row] = -(blocks[..., row : row + 1, :row] @ inverse[..., :row, :row]).squeeze(-2)
    while size < chunk:
        upper, lower = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        between = _diagonal_blocks(a, 2 * size)[..., size:, :size]
        corner = -(lower @ between @ upper)
        top = torch.cat((upper, torch.zeros_like(upper)), -1)
        inverse, size = torch.cat((top, torch.cat((corner, lower), -1)), -2), 2 * size
    return inverse.squeeze(-3)


def _diagonal_blocks(a: Tensor, size: int) -> Tensor:
    """[.., C, C] → [.., C / size, size, size]."""
    blocks = a.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [.., n, size, n, size]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _take(inputs: Inputs, index: Tensor, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t if t is None else _take_rows(t, index, dtype) for t in inputs))


def _take_rows(t: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, ..] → [X, H, C, ..], padding 0."""
    rows = t.index_select(0, index.flatten().clamp(min=0)).unflatten(0, index.shape).transpose(1, 2).to(dtype)
    padding = (index < 0).view(index.shape[0], 1, index.shape[1], *[1] * (rows.dim() - 3))
    return rows.masked_fill(padding, 0.0)


def _put(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total [N, H, ..] at the index becomes rows [X, H, C, ..]."""
    tokens = index.flatten()
    rows = rows.transpose(1, 2).flatten(0, 1).to(total.dtype)
    is_token = tokens >= 0
    total[tokens[is_token]] = rows[is_token]
