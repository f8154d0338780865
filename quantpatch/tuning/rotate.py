"""Rotations: channels mixed so that none is much larger than others, taken back by weights that use them.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4.1, stage 1b, and SpinQuant (Liu et al. 2024, arXiv
2405.16406), rotation R2: where nothing but linear operators lies between weights, as between the values of
attention and the projection behind it, what makes the channels is multiplied by an orthogonal matrix, and
what uses them by its transpose. The matrix is Hadamard's with random signs, of each head. Float outputs stay
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from quantpatch.tuning.products import Product
from quantpatch.tuning.reasons import NoExchange
from quantpatch.tuning.scaling import Scaling
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning


@attrs.frozen(kw_only=True)
class Rotate(Tuner):
    """Hadamard rotations folded into neighbouring weights.

    Attributes:
        tries: How many draws of signs are compared.
        rows: How many of the inputs of each product that is measured on.
    """

    tries: int = 4
    rows: int = 256

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        scaling = Scaling(tuning, tuning.weights())
        for exchange in scaling.exchanges:
            if _power_of_two(exchange.mixes) < 2:
                for channels in exchange.used_by:
                    name = scaling.weights[channels.parameter].name
                    tuning.skipped[name] = NoExchange("is not made by linear operators alone")
        scaling.exchanges = [exchange for exchange in scaling.exchanges if _power_of_two(exchange.mixes) > 1]
        sizes = {
            channels.parameter: _power_of_two(exchange.mixes)
            for exchange in scaling.exchanges
            for channels in exchange.used_by
        }

        def candidates(products: Sequence[Product]) -> list[Tensor]:
            size = sizes[products[0].channels.parameter]
            return [hadamard(size) for _ in range(self.tries)]

        scaling.choose(candidates, Product.lost, rows=self.rows)


def _power_of_two(count: int) -> int:
    """The largest power of two that divides a number; 0 of 0."""
    return count & -count


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix with random signs of its columns, scaled to be orthogonal.

    Args:
        size: A power of two.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size,)) * 2 - 1
    return matrix * signs / math.sqrt(size)
