"""SmoothQuant: scale moved from activations to the weights that multiply them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv 2211.10438), equation 4: channel ``j`` is divided by ``max|x_j|**alpha / max|w_j|**(1 - alpha)`` where
it is made and multiplied where it is used. What is made by a norm or a product takes that into its
parameters, and nothing is left at runtime; else the layer that uses it gets a module that multiplies. Float
outputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.tuning.products import Product
from quantpatch.tuning.scaling import Scaling, most
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning

# The alphas that are tried.
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@attrs.frozen(kw_only=True)
class SmoothQuant(Tuner):
    """Scale moved from activations to weights.

    Attributes:
        alpha: How much of it, from 0 to 1; None tries several for each activation and takes the one that
            loses least, if any loses less than none.
        at_runtime: Whether a layer that is given what takes no factor before (behind a GELU, or in a
            residual) may multiply it by one itself, which costs that multiplication at runtime.
        rows: How many of the inputs of each product that is measured on.
    """

    alpha: float | None = None
    at_runtime: bool = True
    rows: int = 256

    def __attrs_post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ArgumentError(
                f"alpha={self.alpha!r}: expected a number from 0 to 1, or None", alpha=self.alpha
            )

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        scaling = Scaling(tuning, tuning.weights(), at_runtime=self.at_runtime)
        alphas: Sequence[float] = _ALPHAS if self.alpha is None else (self.alpha,)

        def candidates(products: Sequence[Product]) -> list[Tensor]:
            largest = most(p.of_channels(p.moments.largest) for p in products)
            weight = most(p.channels.largest(p.weight.tensor) for p in products)
            return [smoothing(largest, weight, alpha) for alpha in alphas]

        scaling.choose(candidates, Product.lost, rows=self.rows, always=self.alpha is not None)


def smoothing(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The factors of channels, from their largest magnitudes in activations and weights."""
    factor = largest.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
    return torch.where((largest > 0) & (weight > 0), factor, 1.0).clamp(1e-4, 1e4)
