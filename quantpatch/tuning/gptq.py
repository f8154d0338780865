"""GPTQ: weights rounded one input after the other, each error made up for by the inputs that are left.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323). For each output it looks for the ``q`` on the grid with the least ``(w - q) H (w - q)ᵀ``,
where ``H`` is the sum of ``x xᵀ`` over the inputs ``x``, plus a share of its mean diagonal. It is computed in
the form that Chee et al. 2023 (QuIP, arXiv 2307.13304) show to be the same, theorem 6: with ``H = (I + U) D
(I + U)ᵀ``, ``U`` strictly upper triangular and ``D`` diagonal, ``q_i`` is ``w_i`` plus the sum of ``(w_j -
q_j) U_ji`` over ``j < i``, rounded. One Cholesky factorization gives ``U``, and nothing is inverted.

Scales are those of the weight before, so that inputs can be rounded in any order.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.tuning.clipping import clipped
from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning
from quantpatch.tuning.weights import Grid, Weight

_MOST_DAMPING = 1e3
_EARLIER_DAMPING = 0.1  # of what makes up for earlier layers, as a share of the mean of the diagonal


@attrs.frozen(kw_only=True)
class GPTQ(Tuner):
    """Weights rounded by second-order error.

    Weights of all layers whose products are seen, in any format; block after block, with the weights of the
    blocks before as they are rounded, and activations as they are quantized. What is held at a time is a
    matrix of ``inputs ** 2`` for each weight of a block.

    Attributes:
        act_order: Whether inputs with the largest squares are rounded first.
        damping: What is added to the diagonal of ``H``, as a share of its mean. Where that is not enough, ten
            times as much is tried, and so on, which is reported.
        block_size: How many inputs are rounded before those behind a block hear of it.
        earlier: How much of what the inputs of a layer lack, since earlier layers are quantized, its weights
            make up for, from 0 to 1. All of it is too much: a layer that gives less than in float where it
            cannot know better, and the next that does so again, are further off together.
        clip: Whether ranges that follow from weights, such as those of formats in blocks, are clipped first,
            each at the share of it that loses least. Others are as ``calibrate`` found them.
    """

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    earlier: float = 0.5
    clip: bool = True

    def __attrs_post_init__(self) -> None:
        for name, least in (("damping", 0.0), ("block_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise ArgumentError(f"{name}={value!r}: expected a number from {least} on", **{name: value})

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        tuning.calibrate()
        with tuning.in_blocks(tuning.weights(), beside_float=self.earlier > 0) as blocks:
            for block in blocks:
                for part in block.parts:
                    seen = block.moments(part)
                    for weight in part:
                        self._round(tuning, weight, seen[weight.name])

    def _round(self, tuning: Tuning, weight: Weight, seen: Mapping[Layout, Moments]) -> None:
        own = weight.tensor.detach().float().contiguous()
        nearest = weight.rounded(own)
        start = own = self._wanted(own, seen)
        if self.clip and weight.range_of(own) is None:
            start = clipped(weight, own, seen)
        grid, result = weight.grid(start), weight.rounded(start)
        before = after = size = 0.0
        notes: dict[str, None] = {}
        for layout, moments in seen.items():
            w, rtn, first = (layout.matrices(t) for t in (own, result, nearest))
            # Columns of inputs become rows, which lie together.
            rounded, damping = self.solve(w, moments.gram, grid.map(layout.matrices))
            errors = [_cost(w - q, moments.gram) for q in (rtn, rounded)]
            better = (errors[1] < errors[0]).unsqueeze(-1)
            view = layout.view(result)
            view.copy_(torch.where(better, rounded, rtn).reshape(view.shape))
            before += float(_cost(w - first, moments.gram).sum())
            after += float(torch.minimum(*errors).sum())
            size += float(_cost(w, moments.gram).sum())
            if damping > self.damping:
                notes[f"damping {damping:.3g}"] = None
            if moments.count < w.shape[-1]:
                notes[f"damped: {moments.count} examples for {w.shape[-1]} inputs"] = None
        tuning.write_rounded(weight, result, before, after, size, ", ".join(notes))

    def _wanted(self, own: Tensor, seen: Mapping[Layout, Moments]) -> Tensor:
        """The weights that make up for a share of what inputs lack of what they are in float."""
        result = own.clone()
        for layout, moments in seen.items():
            if moments.lost.numel():
                h = moments.gram.clone()
                diagonal = h.diagonal(dim1=1, dim2=2)
                diagonal.add_(_EARLIER_DAMPING * diagonal.mean(1, keepdim=True)).masked_fill_(
                    diagonal <= 0, 1.0
                )
                lower, failed = torch.linalg.cholesky_ex(h)
                if failed.any():
                    continue
                w, view = layout.matrices(own), layout.view(result)
                more = torch.cholesky_solve(torch.bmm(w, moments.lost).mT, lower).mT
                view.add_(self.earlier * more.reshape(view.shape))
        return result

    def solve(self, w: Tensor, gram: Tensor, grid: Grid) -> tuple[Tensor, float]:
        """Rounds matrices of weights.

        Args:
            w: ``(groups, outputs, inputs)``, float32.
            gram: The sum of ``x xᵀ``, ``(groups, inputs, inputs)``.
            grid: What they are rounded to.

        Returns:
            The rounded ones, and the damping that was needed.
        """
        if self.act_order:
            order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
            back = order.argsort(1)
            gram = gram.gather(1, order.unsqueeze(2).expand_as(gram)).gather(
                2, order.unsqueeze(1).expand_as(gram)
            )
            w, grid = _taken(w, order), grid.map(lambda t: _taken(t, order))
        factor, damping = self._factor(gram)
        # (groups, inputs, outputs): what is rounded together lies together.
        rounded = self._in_order(_turned(w), factor, grid.map(_turned)).transpose(1, 2)
        return (_taken(rounded, back) if self.act_order else rounded), damping

    def _factor(self, gram: Tensor) -> tuple[Tensor, float]:
        """The strictly upper triangular ``U``, and the damping that was needed."""
        diagonal = gram.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        dead = diagonal <= 0
        damping = float(self.damping)
        while True:
            h = gram.clone()
            h.diagonal(dim1=1, dim2=2).add_(damping * mean).masked_fill_(dead, 1.0)
            lower, failed = torch.linalg.cholesky_ex(h.flip(1, 2))
            if not failed.any():
                break
            damping = max(10 * damping, 1e-6)
            if damping > _MOST_DAMPING:  # of infinities, for instance: nothing is made up for
                return torch.zeros_like(h), damping
        upper = lower.flip(1, 2)
        return upper.div_(upper.diagonal(dim1=1, dim2=2).clone().unsqueeze(1)), damping

    def _in_order(self, w: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        """Rounds ``(groups, inputs, outputs)`` input by input."""
        wanted, rounded, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
        count = w.shape[1]
        for start in range(0, count, self.block_size):
            end = min(count, start + self.block_size)
            for i in range(start, end):
                now = grid.map(lambda t, i=i: t[:, i]).nearest(wanted[:, i])
                error = w[:, i] - now
                rounded[:, i], errors[:, i] = now, error
                if i + 1 < end:
                    wanted[:, i + 1 : end].add_(factor[:, i, i + 1 : end, None] * error[:, None])
            if end < count:
                wanted[:, end:].baddbmm_(factor[:, start:end, end:].mT, errors[:, start:end])
        return rounded


def _taken(t: Tensor, order: Tensor) -> Tensor:
    """The inputs, the last axis, in another order."""
    return t.gather(2, order.unsqueeze(1).expand_as(t))


def _turned(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous()


def _cost(error: Tensor, gram: Tensor) -> Tensor:
    """The squared error at each output, ``(groups, outputs)``."""
    return torch.bmm(error, gram).mul_(error).sum(-1)
