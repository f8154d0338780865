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
from quantpatch.tuning.clipping import clipped, costs, size
from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.products import Product
from quantpatch.tuning.reasons import NoData, NotBetter
from quantpatch.tuning.report import Tuned, relative
from quantpatch.tuning.scaling import Scaling, most
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning
from quantpatch.tuning.weights import Weight


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
        if self.steps:
            scaling = Scaling(tuning, weights, at_runtime=self.at_runtime)
            scaling.choose(self._candidates, Product.lost_by_weight)
        if self.clip:
            with tuning.in_blocks(weights, in_float=True) as blocks:
                for block in blocks:
                    seen = block.moments()
                    for weight in block.weights:
                        self._clip(tuning, weight, seen[weight.name])

    def _candidates(self, products: Sequence[Product]) -> list[Tensor]:
        mean = most(p.of_channels(p.moments.magnitude / max(1, p.moments.count)) for p in products)
        mean = torch.where(mean > 0, mean, mean.max().clamp_min(1e-5))
        factors = []
        for step in range(1, self.steps + 1):
            factor = mean.clamp_min(1e-4) ** (step / self.steps)
            factors.append(factor / (factor.max() * factor.min()).sqrt())
        return factors

    def _clip(self, tuning: Tuning, weight: Weight, seen: Mapping[Layout, Moments]) -> None:
        own = weight.tensor.detach().float()
        if not seen:
            tuning.skipped[weight.name] = NoData()
            return
        result, there = clipped(weight, own, seen), size(own, seen)
        before, after = (float(costs(weight, own, t, seen).sum()) for t in (own, result))
        if not after < before:
            if weight.name not in tuning.tuned:
                tuning.skipped.setdefault(weight.name, NotBetter(relative(before, there)))
            return
        tuning.write(weight.owner, weight.attribute, result)
        tuning.forget(weight.quantizer)
        tuning.skipped.pop(weight.name, None)
        scaled = tuning.tuned.get(weight.name)
        first = relative(before, there) if scaled is None else scaled.before
        what = "clipped" if scaled is None else "scaled and clipped"
        tuning.tuned[weight.name] = Tuned(first, relative(after, there), what)
