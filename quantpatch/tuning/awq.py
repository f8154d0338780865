"""AWQ: weights of salient channels made larger, and ranges of weights clipped, by what is lost at the output.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv
2306.00978), equations 4 and 5: the factor of a channel is the mean of its magnitude to the power of alpha,
for which values from 0 to 1 are tried, each by the error at the output with quantized weights. Then weights
are clipped at the share of their range, of several, that loses least; each range on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.products import Product
from quantpatch.tuning.reasons import NoData, NotBetter
from quantpatch.tuning.report import Tuned, relative
from quantpatch.tuning.scaling import Scaling, most
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Seen, Tuning
from quantpatch.tuning.weights import Weight

# Shares of a range that it is clipped at.
_SHARES = tuple(1 - step / 20 for step in range(1, 11))


@attrs.frozen(kw_only=True)
class AWQ(Tuner):
    """Scales from the magnitudes of activations, and clipped weights, by what quantized weights alone lose.

    Scales leave float outputs as they are, clipping does not.

    Attributes:
        steps: How many values of alpha are tried; 0 leaves the scales.
        clip: Whether weights are clipped.
        at_runtime: As in ``SmoothQuant``.
    """

    steps: int = 20
    clip: bool = True
    at_runtime: bool = False

    def __attrs_post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ArgumentError(f"steps={self.steps!r}: expected a number from 0 on", steps=self.steps)

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        weights = tuning.weights()
        scaling = Scaling(tuning, weights, at_runtime=self.at_runtime) if self.steps else None
        seen = tuning.moments(weights.values(), "looks at activations", in_float=True)
        if scaling is not None:
            for index, factor in scaling.choose(seen, self._candidates, Product.lost_by_weight).items():
                for channels in scaling.exchanges[index].used_by:
                    for moments in seen[scaling.weights[channels.parameter].name].values():
                        moments.divide(factor)
        if self.clip:
            for weight in weights.values():
                self._clip(tuning, weight, seen)

    def _candidates(self, products: Sequence[Product]) -> list[Tensor]:
        mean = most(p.of_channels(p.moments.magnitude / max(1, p.moments.count)) for p in products)
        mean = torch.where(mean > 0, mean, mean.max().clamp_min(1e-5))
        factors = []
        for step in range(1, self.steps + 1):
            factor = mean.clamp_min(1e-4) ** (step / self.steps)
            factors.append(factor / (factor.max() * factor.min()).sqrt())
        return factors

    def _clip(self, tuning: Tuning, weight: Weight, seen: Seen) -> None:
        own, by_layout = weight.tensor.detach().float(), seen[weight.name]
        if not by_layout:
            tuning.skipped[weight.name] = NoData()
            return
        ranges = weight.own_ranges(own)
        result, best = own, weight.summed(_costs(weight, own, own, by_layout, alone=True))
        for share in _SHARES:
            clipped = torch.minimum(torch.maximum(own, -ranges * share), ranges * share)
            costs = weight.summed(_costs(weight, own, clipped, by_layout, alone=True))
            result = torch.where(costs < best, clipped, result)
            best = torch.minimum(best, costs)
        before, after = (float(_costs(weight, own, t, by_layout).sum()) for t in (own, result))
        if not after < before:
            if weight.name not in tuning.tuned:
                tuning.skipped.setdefault(weight.name, NotBetter(relative(before, _size(own, by_layout))))
            return
        tuning.write(weight.owner, weight.attribute, result)
        tuning.forget(weight.quantizer)
        tuning.skipped.pop(weight.name, None)
        scaled = tuning.tuned.get(weight.name)
        size = _size(own, by_layout)
        first = relative(before, size) if scaled is None else scaled.before
        what = "clipped" if scaled is None else "scaled and clipped"
        tuning.tuned[weight.name] = Tuned(first, relative(after, size), what)


def _costs(
    weight: Weight, own: Tensor, clipped: Tensor, seen: Mapping[Layout, Moments], *, alone: bool = False
) -> Tensor:
    """What rounding a clipped weight loses at the output, of each element its part in the sum.

    Args:
        weight: The weight.
        own: What it is.
        clipped: What is rounded.
        seen: What is known of its inputs.
        alone: Whether blocks count each for itself, without what their errors have in common.
    """
    error, costs = own - weight.rounded_anew(clipped), torch.zeros_like(own)
    blocks = weight.blocks(own) if alone else None
    for layout, moments in seen.items():
        delta, gram = layout.matrices(error), moments.gram
        if blocks is not None:
            numbers = layout.matrices(blocks)[:, :1]
            gram = gram * (numbers.mT == numbers)
        view = layout.view(costs)
        view.copy_((torch.bmm(delta, gram) * delta).reshape(view.shape))
    return costs


def _size(own: Tensor, seen: Mapping[Layout, Moments]) -> float:
    pairs = ((layout.matrices(own), moments.gram) for layout, moments in seen.items())
    return sum(float((torch.bmm(w, gram) * w).sum()) for w, gram in pairs)
