"""`delta_rule` chunk by chunk in plain torch: what chunks need of their own tokens all at once, their states in turn.

In a chunk of C tokens, with G the cumulative log decay and S the state before it:

    R = Z − Ẽ S,  Δ = (I + A)⁻¹ R,  O = Q̃ S + M Δ,  S' = diag(exp G_C) S + K̂ᵀ Δ

A_ij = Σ_p e_ip k_jp exp(G_ip − G_jp) for i > j, M the same of q for i ≥ j, Ẽ = e exp G, Q̃ = q exp G, and
K̂_j = k_j exp(G_C − G_j) (Yang 2024, arXiv:2406.06484, arXiv:2412.06464). Kept for backward: the inputs, and a state
every few chunks. A unit is one chunk of one head; Y of them, chunk by chunk, are worked on together, [Y, C, ..].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.ops._delta_rule_decay import Decay

_SPAN_ROWS = 2**12  # tokens × heads worked on together: few enough for a core's cache
_SPAN_STEPS = 4  # and at least so many chunks of a sequence, so that the states kept are few beside the inputs
# Up to this β‖k‖² a token's edit hardly overshoots, so that float32 chunks are as exact as the recurrence is.
_TAME = 1.1


class Inputs(NamedTuple):
    """Of N tokens: q, k [N, H', P], v [N, H, V], g [N, H] or [N, H, P], erase [N, H' or H, P], beta [N, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    erase: Tensor | None
    beta: Tensor | None


class Terms(NamedTuple):
    """Of Y units: Z [Y, C, V], Q̃ and K̂ [Y, C, P], M [Y, C, C], exp G_C [Y, 1 or P, 1], Ẽ [Y, C, P] and (I + A)⁻¹
    [Y, C, C], or their gradients with A's as the last; None: no decay, no erasing."""

    z: Tensor
    q: Tensor
    k: Tensor
    m: Tensor
    last: Tensor | None
    erase: Tensor | None
    triangle: Tensor | None


@dataclass(frozen=True)
class Plan:
    """Which tokens are in which chunk: a step has one of every sequence that has not ended, the longest ones first.

    Attributes:
        index: [X, C] int64, a token each, step by step; -1 is padding, which changes no state.
        padded: of each chunk, whether it has padding.
        steps: how many chunks each step has, never growing.
        order: [number of sequences], the longest first.
        length: of each sequence, if they are all of one; else None.
    """

    index: Tensor
    padded: list[bool]
    steps: list[int]
    order: Tensor
    length: int | None

    def spans(self, heads: int) -> Iterator["Span"]:
        """Runs of steps that are worked on together."""
        first, start, sizes = 0, 0, []
        for step, chunks in enumerate(self.steps):
            if sizes and len(sizes) >= _span_steps(sizes[0], heads, self.index.shape[1]):
                yield self._span(first, start, sizes, heads)
                first, start, sizes = first + sum(sizes), step, []
            sizes.append(chunks)
        if sizes:
            yield self._span(first, start, sizes, heads)

    def _span(self, first: int, start: int, sizes: Sequence[int], heads: int) -> "Span":
        here = slice(first, first + sum(sizes))
        is_padded = any(self.padded[here])
        run = None if self.length is None or is_padded else (len(self.order), start)
        return Span(self.index[here], is_padded, [heads * chunks for chunks in sizes], run)


@dataclass(frozen=True)
class Span:
    """index [X, C], a token each or -1; whether there is a -1; how many units each step has; and, where the tokens are
    a run of every sequence, how many sequences there are and the first step."""

    index: Tensor
    is_padded: bool
    steps: list[int]
    run: tuple[int, int] | None

    def _view(self, t: Tensor) -> Tensor:
        """The run of t [N, H', ..], [steps, sequences, H', C, ..]."""
        (sequences, start), steps, chunk = self.run, len(self.steps), self.index.shape[1]
        rows = t.unflatten(0, (sequences, -1))[:, start * chunk : (start + steps) * chunk]
        return rows.unflatten(1, (steps, chunk)).transpose(0, 1).transpose(2, 3)

    def take(self, t: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """[N, H', ..] → [X · heads, C, ..], padding 0; a head of t serves heads / H' in turn."""
        if self.run is not None:
            rows = self._view(t).unsqueeze(3).expand(-1, -1, -1, heads // t.shape[1], *[-1] * (t.dim() - 1))
            return rows.new_empty(rows.shape, dtype=dtype).copy_(rows).flatten(0, 3)
        of_head = torch.arange(heads, device=t.device) // (heads // t.shape[1])
        rows = self.index.clamp(min=0).unsqueeze(1) * t.shape[1] + of_head.unsqueeze(-1)  # [X, heads, C]
        taken = t.flatten(0, 1).index_select(0, rows.flatten()).to(dtype).view(-1, rows.shape[-1], *t.shape[2:])
        if self.is_padded:
            padding = (self.index < 0).repeat_interleave(heads, 0)
            taken.masked_fill_(padding.view(*padding.shape, *[1] * (t.dim() - 2)), 0.0)
        return taken

    def put(self, total: Tensor, rows: Tensor) -> None:
        """total [N, H', ..] at the index becomes rows [X · heads, C, ..], summed over the heads that one serves."""
        rows = rows.unflatten(0, (len(self.index), total.shape[1], -1))
        rows = rows.sum(2) if rows.shape[2] > 1 else rows.squeeze(2)
        if self.run is not None:
            self._view(total).copy_(rows.unflatten(0, (len(self.steps), -1)))
            return
        rows, tokens = rows.transpose(1, 2).flatten(0, 1).to(total.dtype), self.index.flatten()
        if self.is_padded:
            is_token = tokens >= 0
            rows, tokens = rows[is_token], tokens[is_token]
        total.index_copy_(0, tokens, rows)


def _span_steps(chunks: int, heads: int, chunk: int) -> int:
    """How many steps are worked on together, the first being of so many chunks."""
    return torch.sym_max(_SPAN_STEPS, _SPAN_ROWS // (heads * chunk * chunks))


def num_kept(sequences: int, length: int, heads: int, chunk: int) -> int:
    """How many states forward keeps for backward, of sequences that are all of one length."""
    steps = -(-length // chunk)
    return sequences * heads * -(-steps // _span_steps(sequences, heads, chunk))


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
    length = bounds[0][1] if bounds and list(bounds) == _side_by_side(len(bounds), bounds[0][1]) else None
    return Plan(index.to(device), (index[:, -1] < 0).tolist(), active.sum(1).tolist(), order.to(device), length)


def _side_by_side(sequences: int, length: int) -> list[tuple[int, int]]:
    return [(length * i, length * (i + 1)) for i in range(sequences)]


def forward(inputs: Inputs, states: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """o [N, H, V] in v's dtype; the states after the last tokens; and those before each span, [.., P, V].

    states: [number of sequences, H, P, V] before the first token, in the dtype that is computed in.
    """
    heads = inputs.v.shape[1]
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    state, kept = states[plan.order].flatten(0, 1), []
    for span in plan.spans(heads):
        kept.append(state[: span.steps[0]].clone())
        terms, _ = _terms(_take(inputs, span, states.dtype), keep=False)
        rows, delta = _outputs(state, terms, span.steps)
        span.put(o, rows.baddbmm_(terms.m, delta, beta=scale, alpha=scale))
    final = torch.empty_like(states)
    final[plan.order] = state.unflatten(0, (-1, heads))
    return o, final, torch.cat(kept) if kept else state[:0].clone()


def backward(
    grad: Tensor, grad_states: Tensor, inputs: Inputs, kept: Tensor, plan: Plan, scale: float
) -> tuple[Inputs, Tensor]:
    """Gradients to the inputs, and to the states before the first tokens."""
    heads = inputs.v.shape[1]
    grads = Inputs(*(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs))
    grad_state = grad_states[plan.order].flatten(0, 1)
    spans = list(plan.spans(heads))
    starts = kept.split([span.steps[0] for span in spans])
    for span, state in zip(reversed(spans), reversed(starts), strict=True):
        taken = _take(inputs, span, kept.dtype)
        terms, edit = _terms(taken, keep=True)
        rows = span.take(grad, heads, kept.dtype).mul_(scale)
        term_grads = _through_states(rows, terms, span.steps, state, grad_state)
        for total, gradient in zip(grads, _input_grads(taken, edit, terms, term_grads), strict=True):
            if total is not None:
                span.put(total, gradient)
    grad_initial = torch.empty_like(grad_states)
    grad_initial[plan.order] = grad_state.unflatten(0, (-1, heads))
    return grads, grad_initial


def _take(inputs: Inputs, span: Span, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t if t is None else span.take(t, inputs.v.shape[1], dtype) for t in inputs))


def _needs_exact_triangle(k: Tensor, beta: Tensor | None) -> bool:
    """Whether the triangles of units have to be float64; k [Y, C, P], beta [Y, C, 1].

    Where keys are alike and β‖k‖² is near 2, the inverse is large and what it makes is small.
    """
    if beta is None or k.device.type != "cpu":  # an accelerator is not waited for
        return k.device.type != "mps"  # which has none
    return not bool((torch.linalg.vector_norm(k, dim=-1, keepdim=True).square_().mul_(beta) <= _TAME).all())


class _Edit(NamedTuple):
    """Where units read, e [Y, C, P]; A [Y, C, C]; and what decays meanwhile."""

    erase: Tensor | None
    a: Tensor | None
    decay: Decay


def _terms(inputs: Inputs, *, keep: bool) -> tuple[Terms, _Edit]:
    """Of inputs [Y, C, ..], which are written to if they are not to be kept."""
    q, k, z, g, erase, beta = inputs
    decay = Decay.of(g)
    if beta is not None:
        beta = beta.unsqueeze(-1)
        erase, z = k * beta, z * beta if keep else z.mul_(beta)
    a = None
    if erase is not None:
        exact = _needs_exact_triangle(k, beta)
        a = decay.multiply(*(t.double() if exact else t for t in (erase, k)))
    m = decay.multiply(q, k)
    terms = Terms(
        z=z,
        q=decay.since_start(q, keep=keep),
        k=decay.until_end(k, keep=keep),
        m=m,
        last=decay.whole,
        erase=None if erase is None else decay.since_start(erase, keep=keep),
        triangle=None if a is None else _inverse(a),
    )
    return terms, _Edit(erase, a, decay)


def _outputs(state: Tensor, terms: Terms, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What units read of the states before them, Q̃ S, and what they write, Δ, both [Y, C, V].

    state: before the first; becomes that after the last.
    """
    rows = torch.empty_like(terms.z)
    delta = terms.z if terms.erase is None else torch.empty_like(terms.z)
    for units, read, change, term in _by_step(steps, rows, delta, *terms):
        now = state[:units]
        torch.bmm(term.q, now, out=read)
        _write(change, term, now)
        if term.last is not None:
            now.mul_(term.last)
        now.baddbmm_(term.k.mT, change)
    return rows, delta


def _write(change: Tensor, terms: Terms, state: Tensor) -> None:
    """change = Δ; if nothing is erased it is so already."""
    if terms.erase is not None:
        _multiply(terms.triangle, torch.baddbmm(terms.z, terms.erase, state, alpha=-1), out=change)


def _through_states(rows: Tensor, terms: Terms, steps: Sequence[int], state: Tensor, grad_state: Tensor) -> Terms:
    """The gradients to `terms` from those to their outputs, `rows` [Y, C, V], and to the states after them.

    state: before the span. grad_state: to that after it; becomes that to `state`.
    """
    befores = state.new_empty(len(terms.z), *state.shape[1:])
    delta = terms.z if terms.erase is None else torch.empty_like(terms.z)
    grad_q, grad_k = torch.empty_like(terms.q), torch.empty_like(terms.k)
    parts = _by_step(steps, befores, delta, rows, grad_q, *terms)
    parts[0][1].copy_(state)
    for (units, now, change, row, to_q, term), following in zip_longest(parts, parts[1:]):
        torch.bmm(row, now.mT, out=to_q)
        _write(change, term, now)
        if following is None:
            break
        units, after = following[:2]
        if term.last is None:
            after.copy_(now[:units])
        else:
            torch.mul(now[:units], term.last[:units], out=after)
        after.baddbmm_(term.k[:units].mT, change[:units])
    grad_z = torch.bmm(terms.m.mT, rows)  # so far to Δ
    to_last = []
    for units, before, wrote, row, to_change, to_k, term in reversed(
        _by_step(steps, befores, delta, rows, grad_z, grad_k, *terms)
    ):
        now = grad_state[:units]
        torch.bmm(wrote, now.mT, out=to_k)
        to_change.baddbmm_(term.k, now)
        if term.erase is not None:
            _multiply(term.triangle.mT, to_change, out=to_change)
        if term.last is not None:
            to_last.append((now * before).sum((1, 2) if term.last.shape[1] == 1 else 2, keepdim=True))
            now.mul_(term.last)
        now.baddbmm_(term.q.mT, row)
        if term.erase is not None:
            now.baddbmm_(term.erase.mT, to_change, alpha=-1)
    has_erase = terms.erase is not None
    return Terms(
        z=grad_z,
        q=grad_q,
        k=grad_k,
        m=torch.bmm(rows, delta.mT),
        last=torch.cat(to_last[::-1]) if to_last else None,
        erase=_negative_product(grad_z, befores.mT) if has_erase else None,
        triangle=_negative_product(grad_z, delta.mT) if has_erase else None,
    )


def _by_step(steps: Sequence[int], *tensors: Tensor | None) -> list[tuple]:
    """(units, the parts of the tensors before the last seven, `Terms` of those seven) of each step."""
    parts = zip(*([None] * len(steps) if t is None else t.split(steps) for t in tensors), strict=True)
    own = len(tensors) - len(Terms._fields)
    return [(units, *part[:own], Terms(*part[own:])) for units, part in zip(steps, parts, strict=True)]


def _input_grads(inputs: Inputs, edit: _Edit, terms: Terms, grads: Terms) -> Inputs:
    """The gradients to the inputs [Y, C, ..] from those to the terms, which are written to."""
    q, k, v, g, _, beta = inputs
    erase, a, decay = edit
    grad_q, grad_k = decay.since_start(grads.q, keep=False), decay.until_end(grads.k, keep=False)
    grad_v, grad_erase, grad_g, grad_beta = grads.z, None, None, None
    if erase is not None:
        grad_erase = decay.since_start(grads.erase, keep=False)
    if g is not None:
        since, until = decay.paired(q, grad_q), decay.paired(k, grad_k)
        if erase is not None:
            since.add_(decay.paired(erase, grad_erase))
    inside = decay.multiply_backward(grads.m.tril_(), terms.m, q, k, grad_q, grad_k)
    if erase is not None:
        more = decay.multiply_backward(grads.triangle.tril_(-1), a.to(k.dtype), erase, k, grad_erase, grad_k)
        inside = inside if more is None else inside.add_(more)
    if g is not None:
        grad_g = decay.backward(since, until, grads.last, inside)
    if beta is not None:
        beta = beta.unsqueeze(-1)
        grad_beta = (grad_erase * k).sum(-1) + (grad_v * v).sum(-1)
        grad_k, grad_v, grad_erase = grad_k.addcmul_(grad_erase, beta), grad_v.mul_(beta), None
    return Inputs(grad_q, grad_k, grad_v, grad_g, grad_erase, grad_beta)


def _inverse(a: Tensor) -> Tensor:
    """(I + A)⁻¹, A being what stands below the diagonal; row by row, as powers of A grow without bound where keys are
    alike."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)


def _multiply(triangle: Tensor, rows: Tensor, out: Tensor) -> None:
    """out = triangle @ rows, in the triangle's dtype."""
    if triangle.dtype == rows.dtype and out is not rows:
        torch.bmm(triangle, rows, out=out)
    else:
        out.copy_(torch.bmm(triangle, rows.to(triangle.dtype)))


def _negative_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=-1)
