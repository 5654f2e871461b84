"""What decay does within the chunks of `_delta_rule_chunks`: nothing, by head, or by channel of a head."""

from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 16  # rows within which a decay per channel is measured
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

    def since_start(self, rows: Tensor) -> Tensor:
        """rows · exp G."""
        return rows

    def until_end(self, rows: Tensor) -> Tensor:
        """rows · exp(G_C − G)."""
        return rows

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

    def since_start(self, rows: Tensor) -> Tensor:
        return rows * self._since

    def until_end(self, rows: Tensor) -> Tensor:
        return rows * self._until

    def _exp(self, log: Tensor) -> Tensor:
        return log.to(self._dtype).exp()

    def backward(self, since: Tensor, until: Tensor, to_whole: Tensor, inside: Tensor) -> Tensor:
        """The gradient to g: whatever decayed at a token has a part in it, and nothing else, so that none cancels.

        since: rows ⊙ their gradients of all `since_start`, [Y, C, P]: those of the token and later ones count.
        until: the same of `until_end`: those of earlier ones count.
        to_whole: the gradient to `whole`, [Y, 1 or P, 1].
        inside: the sum of what `multiply_backward` returned.
        """
        since, until = self._summed(since), self._summed(until)
        grad = since.flip(1).cumsum(1).flip(1) + (until.cumsum(1) - until) + (self.whole * to_whole).mT
        return grad.add_(self._inside(inside)).masked_fill_(self._is_clamped, 0.0)

    def _summed(self, t: Tensor) -> Tensor:
        """Over what one decay is for."""
        return t

    def _inside(self, t: Tensor) -> Tensor:
        """From what is inside a chunk, [Y, C, 1 or P]."""
        return t.flip(1).cumsum(1).flip(1)


class _DecayOfHeads(_SomeDecay):
    @cached_property
    def _between(self) -> Tensor:
        """exp(G_i − G_j) for i ≥ j, else 0."""
        log = (self._total - self._total.mT).to(self._dtype)
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

    def _summed(self, t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True)

    def _inside(self, t: Tensor) -> Tensor:
        """The decay of token t is in G_i − G_j for i ≥ t > j."""
        from_here_on = torch.ones(t.shape[1:], dtype=t.dtype, device=t.device).triu_()
        return (from_here_on @ t).tril_(-1).sum(-1, keepdim=True)


class _DecayOfChannels(_SomeDecay):
    """exp(G_i − G_j) is taken apart at the first row of i's block, unless that would overflow for j in the same block:
    then it is formed for every pair. A block is the whole chunk where nothing overflows there, else 16 rows."""

    def multiply(self, left: Tensor, k: Tensor) -> Tensor:
        products = left.new_zeros(*left.shape[:2], k.shape[1])
        for here, since, until, pairs in self._blocks:
            rows, near, seen = left[:, here], k[:, here], slice(0, until.shape[1])
            products[:, here, seen] = torch.bmm(rows * since, (k[:, seen] * until).mT)
            if pairs is not None:
                products[:, here, here] = ((pairs * near.unsqueeze(1)) @ rows.unsqueeze(-1)).squeeze(-1)
        return products.tril_()

    def multiply_backward(
        self, grad: Tensor, products: Tensor, left: Tensor, k: Tensor, grad_left: Tensor, grad_k: Tensor
    ) -> Tensor:
        to_left, to_k = torch.zeros_like(left), torch.zeros_like(k)
        for here, since, until, pairs in self._blocks:
            rows, near, seen = left[:, here], k[:, here], slice(0, until.shape[1])
            to_seen, inside = grad[:, here, seen], grad[:, here, here].unsqueeze(-1)
            to_left[:, here] += torch.bmm(to_seen, k[:, seen] * until).mul_(since)
            to_k[:, seen] += torch.bmm(to_seen.mT, rows * since).mul_(until)
            if pairs is not None:
                to_left[:, here] += (inside * pairs * near.unsqueeze(1)).sum(2)
                to_k[:, here] += (inside * pairs * rows.unsqueeze(2)).sum(1)
        grad_left += to_left
        grad_k += to_k
        return (left * to_left).addcmul_(k, to_k, value=-1)

    @cached_property
    def _blocks(self) -> list[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """(rows i, exp(G − G of the first), exp(G of the first − G) of the rows that are seen that way, and of the
        block's own rows, if they are not, exp(G_i − G_j) [Y, 16, 16, P] or 0)."""
        total, chunk = self._total, self._total.shape[1]
        size = chunk if self._is_mild(total) else _BLOCK
        later = torch.full((size, size), -torch.inf, dtype=self._dtype, device=total.device).triu_(1).unsqueeze(-1)
        blocks = []
        for first in range(0, chunk, size):
            here, start = slice(first, first + size), total[:, first : first + 1]
            rows, pairs, seen = total[:, here], None, first + size
            if not self._is_mild(rows):
                seen = first
                pairs = (rows.unsqueeze(2) - rows.unsqueeze(1)).to(self._dtype).add_(later).exp_()
            blocks.append((here, self._exp(rows - start), self._exp(start - total[:, :seen]), pairs))
        return blocks

    @staticmethod
    def _is_mild(total: Tensor) -> bool:
        """Whether rows can be taken apart at the first. An accelerator is not waited for, to know."""
        return total.device.type == "cpu" and bool((total[:, 0] - total[:, -1] < _MILD).all())
