"""What decay does within the chunks of `_delta_rule_chunks`: nothing, by head, or by channel of a head."""

from functools import cached_property

import torch
from torch import Tensor

_PAIRS = 4  # rows of which a decay per channel may be formed for every pair
_LEAST = -60.0  # log; exp of less is nothing beside 1, and −∞ − (−∞) would be NaN
_MILD = 40.0  # log; a factor of exp of that, and its inverse, leave small gradients room above float32's least


class Decay:
    """Of the rows [Y, C, P] of chunks, G being the cumulative log decay; this one: there is none."""

    whole: Tensor | None = None  # exp G_C, [Y, 1 or P, 1]

    @staticmethod
    def of(g: Tensor | None) -> "Decay":
        """g: None, [Y, C], or [Y, C, P]."""
        if g is None:
            return Decay()
        return _DecayOfHeads(g.unsqueeze(-1)) if g.dim() == 2 else _DecayOfChannels(g)

    def since_start(self, rows: Tensor, *, keep: bool) -> Tensor:
        """rows · exp G; keep: `rows` are needed as they are, else they become that."""
        return rows

    def until_end(self, rows: Tensor, *, keep: bool) -> Tensor:
        """rows · exp(G_C − G)."""
        return rows

    def paired(self, left: Tensor, right: Tensor) -> Tensor | None:
        """left ⊙ right [Y, C, P], summed over what one decay is for."""
        return None

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        """[Y, C, C]: Σ_p left_ip k_jp exp(G_ip − G_jp) for i ≥ j, else 0."""
        return torch.bmm(left, k.mT).tril_()

    def multiply_backward(
        self, grad: Tensor, products: Tensor, left: Tensor, k: Tensor, grad_left: Tensor, grad_k: Tensor
    ) -> Tensor | None:
        """Adds the gradients to left and k to the last two, and returns what `backward` wants of that to G.

        grad: to the products; 0 for i < j, and not kept.
        """
        grad_left.baddbmm_(grad, k)
        grad_k.baddbmm_(grad.mT, left)
        return None


class _SomeDecay(Decay):
    """Of g [Y, C, 1 or P]."""

    def __init__(self, g: Tensor) -> None:
        self._dtype, self._is_clamped = g.dtype, g < _LEAST
        g = g.clamp(min=_LEAST)
        # In float64: the difference of two large sums is what counts.
        self._total = (g if g.device.type == "mps" else g.double()).cumsum(1)
        self._since, self._until = self._exp(self._total), self._exp(self._total[:, -1:] - self._total)
        self.whole = self._exp(self._total[:, -1:]).mT

    def since_start(self, rows: Tensor, *, keep: bool) -> Tensor:
        return rows * self._since if keep else rows.mul_(self._since)

    def until_end(self, rows: Tensor, *, keep: bool) -> Tensor:
        return rows * self._until if keep else rows.mul_(self._until)

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def _exp(self, log: Tensor) -> Tensor:
        return log.to(self._dtype).exp()

    def backward(self, since: Tensor, until: Tensor, to_whole: Tensor, inside: Tensor) -> Tensor:
        """The gradient to g: whatever decayed at a token has a part in it, and nothing else, so that none cancels.

        since: rows `paired` with their gradients of all `since_start`: those of the token and later ones count.
        until: the same of `until_end`: those of earlier ones count.
        to_whole: the gradient to `whole`, [Y, 1 or P, 1].
        inside: the sum of what `multiply_backward` returned.
        """
        grad = since.flip(1).cumsum(1).flip(1) + (until.cumsum(1) - until) + (self.whole * to_whole).mT
        return grad.add_(self._inside(inside)).masked_fill_(self._is_clamped, 0.0)

    def _inside(self, t: Tensor) -> Tensor:
        """From what is inside a chunk, [Y, C, 1 or P]."""
        return t.flip(1).cumsum(1).flip(1)


class _DecayOfHeads(_SomeDecay):
    @cached_property
    def _between(self) -> Tensor:
        """exp(G_i − G_j) for i ≥ j, else 0."""
        log = self._total.new_empty(*self._total.shape[:2], self._total.shape[1], dtype=self._dtype)
        torch.sub(self._total, self._total.mT, out=log)
        later = torch.full(log.shape[1:], -torch.inf, dtype=self._dtype, device=log.device).triu_(1)
        return log.add_(later).exp_()

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        return torch.bmm(left, k.mT).mul_(self._between)

    def multiply_backward(
        self, grad: Tensor, products: Tensor, left: Tensor, k: Tensor, grad_left: Tensor, grad_k: Tensor
    ) -> Tensor:
        to_logs = grad * products  # G_i − G_j
        super().multiply_backward(grad.mul_(self._between), products, left, k, grad_left, grad_k)
        return to_logs

    def backward(self, since: Tensor, until: Tensor, to_whole: Tensor, inside: Tensor) -> Tensor:
        return super().backward(since, until, to_whole, inside).squeeze(-1)

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1, keepdim=True)

    def _inside(self, t: Tensor) -> Tensor:
        """The decay of token t is in G_i − G_j for i ≥ t > j."""
        from_here_on = torch.ones(t.shape[1:], dtype=t.dtype, device=t.device).triu_()
        return (from_here_on @ t).tril_(-1).sum(-1, keepdim=True)


class _DecayOfChannels(_SomeDecay):
    """exp(G_i − G_j) is taken apart where that overflows nowhere.

    Of two neighbouring blocks, at the first row of the later: both parts are at most 1. So a chunk is halved, and its
    halves, down to blocks in which nothing overflows if they are taken apart at their own first row, or of so few rows
    that the decay of every pair is formed.
    """

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        products = left.new_zeros(*left.shape[:2], k.shape[1])
        for size, since, until in self._halvings:
            across = torch.bmm(_halves(left, size)[1] * since, (_halves(k, size)[0] * until).mT)
            _off_diagonal(products, size).copy_(across.view(len(k), -1, size, size))
        size, since, until, pairs = self._blocks
        rows, near = _blocks_of(left, size), _blocks_of(k, size)
        if pairs is None:
            inside = torch.bmm(rows * since, (near * until).mT)
        else:
            inside = (pairs * near.unsqueeze(1)) @ rows.unsqueeze(-1)
        _diagonal(products, size).copy_(inside.view(len(k), -1, size, size))
        return products.tril_()

    def multiply_backward(
        self, grad: Tensor, products: Tensor, left: Tensor, k: Tensor, grad_left: Tensor, grad_k: Tensor
    ) -> Tensor:
        size, since, until, pairs = self._blocks
        rows, near = _blocks_of(left, size), _blocks_of(k, size)
        inside = _diagonal(grad, size).reshape(-1, size, size)
        if pairs is None:
            to_left = torch.bmm(inside, near * until).mul_(since)
            to_k = torch.bmm(inside.mT, rows * since).mul_(until)
        else:
            weighed = pairs * inside.unsqueeze(-1)
            to_left, to_k = (weighed * near.unsqueeze(1)).sum(2), (weighed * rows.unsqueeze(2)).sum(1)
        to_left, to_k = to_left.view(left.shape), to_k.view(k.shape)
        for size, since, until in self._halvings:
            to_later = _off_diagonal(grad, size).reshape(-1, size, size)
            later, earlier = _halves(to_left, size)[1], _halves(to_k, size)[0]  # views
            later += torch.bmm(to_later, _halves(k, size)[0] * until).mul_(since)
            earlier += torch.bmm(to_later.mT, _halves(left, size)[1] * since).mul_(until)
        grad_left += to_left
        grad_k += to_k
        return (left * to_left).addcmul_(k, to_k, value=-1)

    @cached_property
    def _block(self) -> int:
        """Rows of the largest blocks in which nothing overflows; an accelerator is not waited for, to know."""
        size, total = self._total.shape[1], self._total
        while total.device.type == "cpu" and size > _PAIRS:
            blocks = _blocks_of(total, size)
            if (blocks[:, 0] - blocks[:, -1] < _MILD).all():
                return size
            size //= 2
        return _PAIRS

    @cached_property
    def _halvings(self) -> list[tuple[int, Tensor, Tensor]]:
        """(rows of a block, exp(G − F) of the later of two, exp(F − G) of the earlier); F is G of the later's first."""
        halvings, size = [], self._total.shape[1] // 2
        while size >= self._block:
            earlier, later = _halves(self._total, size)
            first = later[:, :1]
            halvings.append((size, self._exp(later - first), self._exp(first - earlier)))
            size //= 2
        return halvings

    @cached_property
    def _blocks(self) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
        """(rows, exp(G − G of the first), exp(G of the first − G), None), or the rows and exp(G_i − G_j) or 0 of pairs,
        [Y · blocks, rows, rows, P]."""
        size, total = self._block, _blocks_of(self._total, self._block)
        if size > _PAIRS:
            return size, self._exp(total - total[:, :1]), self._exp(total[:, :1] - total), None
        later = torch.full((size, size), -torch.inf, dtype=self._dtype, device=total.device).triu_(1).unsqueeze(-1)
        pairs = (total.unsqueeze(2) - total.unsqueeze(1)).to(self._dtype).add_(later).exp_()
        return size, None, None, pairs


def _blocks_of(t: Tensor, size: int) -> Tensor:
    """[Y, C, P] → [Y · blocks, size, P]."""
    return t.reshape(-1, size, t.shape[2])


def _halves(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[Y, C, P] → the earlier and the later of every two blocks, [Y · pairs of blocks, size, P]."""
    earlier, later = t.reshape(-1, 2, size, t.shape[2]).unbind(1)
    return earlier, later


def _diagonal(t: Tensor, size: int) -> Tensor:
    """The blocks on the diagonals of [Y, C, C], as a view [Y, blocks, size, size]."""
    blocks = t.shape[1] // size
    return t.view(-1, blocks, size, blocks, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _off_diagonal(t: Tensor, size: int) -> Tensor:
    """Of every two blocks, rows of the later and columns of the earlier: [Y, pairs of blocks, size, size], a view."""
    return _diagonal(t, 2 * size)[:, :, size:, :size]
