"""Cross-layer equalization: neighbouring layers get weights of equal ranges for each channel between them.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721), section 4.1, equation 11: with ranges ``r1`` of a channel where it is made and ``r2`` where it is
used, it is divided by ``sqrt(r1 / r2)`` where it is made and multiplied where it is used, so that both are
``sqrt(r1 r2)``; over and over, since layers have neighbours on both sides. Float outputs stay as they are. It
helps weights that have one range for all channels, and those with ranges of their own where they are used.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.tuning.exchanges import Channels, Exchange
from quantpatch.tuning.reasons import NoExchange, NotBetter
from quantpatch.tuning.report import Tuned
from quantpatch.tuning.scaling import Scaling, most
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning

# Factors beyond that come from channels that are hardly there.
_MOST = 1e4


@attrs.frozen(kw_only=True)
class Equalize(Tuner):
    """Equal ranges of weights on both sides of each channel.

    Layers that follow on each other, with nothing between but what takes a positive factor: ReLU, pooling,
    additions. Batch norm between them has to be folded first (``fold_batchnorm``).

    Attributes:
        rounds: How often all are gone over at most.
    """

    rounds: int = 20

    def __attrs_post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ArgumentError(f"rounds={self.rounds!r}: expected a number from 1 on", rounds=self.rounds)

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        scaling = Scaling(tuning, tuning.weights())
        scaling.guard()
        pairs = {}
        for index, exchange in enumerate(scaling.exchanges):
            if any(channels.layout is not None for channels in exchange.made_by):
                pairs[index] = exchange
            else:
                for channels in exchange.used_by:
                    name = scaling.weights[channels.parameter].name
                    tuning.skipped[name] = NoExchange("is made by a norm, which has no weights to equalize")
        before = {index: _lost(scaling, exchange) for index, exchange in pairs.items()}
        factors: dict[int, Tensor] = {}
        for _ in range(self.rounds):
            change = 0.0
            for index, exchange in pairs.items():
                made, used = _ranges(scaling, exchange)
                alive = (made > 0) & (used > 0)
                factor = torch.where(alive, (made / used.clamp_min(1e-30)).sqrt(), 1.0)
                new = (factor * factors.get(index, torch.ones_like(factor))).clamp(1 / _MOST, _MOST)
                change = max(change, float((factor - 1).abs().max()))
                factors[index] = new
                scaling.put(exchange, new)
            if change < 1e-3:
                break
        after = {index: _lost(scaling, exchange) for index, exchange in pairs.items()}
        better = sum(after.values()) < sum(before.values())
        kept = scaling.keep_if_same(factors if better else {})
        for index, exchange in pairs.items():
            for channels in exchange.used_by:
                name = scaling.weights[channels.parameter].name
                if index in kept:
                    tuning.tuned[name] = Tuned(before[index], after[index])
                elif not better:
                    tuning.skipped[name] = NotBetter(before[index])


def _ranges(scaling: Scaling, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """The ranges of each channel where it is made and where it is used."""

    def of(several: tuple[Channels, ...]) -> Tensor:
        weights = (channels for channels in several if channels.layout is not None)
        return most(channels.largest(scaling.tensor(channels.parameter)) for channels in weights)

    return of(exchange.made_by), of(exchange.used_by)


def _lost(scaling: Scaling, exchange: Exchange) -> float:
    """How far the products of the two precisions of channels (equation 8) are from 1 in the mean."""
    made, used = _ranges(scaling, exchange)
    if not made.max() or not used.max():
        return 0.0
    return float(1 - (made / made.max() * used / used.max()).mean())
