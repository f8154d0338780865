"""AdaRound: for each weight it is learned whether to round it up or down, by the error at the layer's output.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568),
equations 21 to 25: a weight is ``scale * clip(floor(w / scale) + h(V))`` with ``h`` a stretched sigmoid;
``V`` is learned with Adam so that outputs behind the layer's ReLU, if it has one, are near those of ``w``,
and a regularizer drives ``h`` to 0 or 1 in the end. Both terms are relative to what rounding to the nearest
gives, so that one weight of the regularizer does for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from quantpatch.dataflow import Operator, Value, dataflow, traits
from quantpatch.errors import ArgumentError
from quantpatch.layers.quantizer import in_float
from quantpatch.numerics.backends.scales import divisor
from quantpatch.numerics.formats import Integer
from quantpatch.tuning.exchanges import weight_of
from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.reasons import WrongFormat
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning
from quantpatch.tuning.weights import Grid, Weight

# The sigmoid is stretched by this on both sides (the paper's zeta and gamma).
_STRETCH = 0.1
# The share of steps without a regularizer, and its exponents at the beginning and the end.
_WARM, _FIRST, _LAST = 0.2, 20.0, 2.0


@attrs.frozen(kw_only=True)
class AdaRound(Tuner):
    """Learned rounding of integer weights, layer by layer.

    The inputs of each are those that it has with the layers before it rounded.

    Attributes:
        steps: How many steps of Adam for each weight.
        rows: How many inputs of each product are learned from.
        batch: How many of them in one step.
        rate: The learning rate.
        regularizer: Its weight.
    """

    steps: int = 1000
    rows: int = 1024
    batch: int = 128
    rate: float = 0.03
    regularizer: float = 10.0

    def __attrs_post_init__(self) -> None:
        for name in ("steps", "rows", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r}: expected a number from 1 on", **{name: value})

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        tuning.calibrate()
        weights = tuning.weights()
        for name, weight in list(weights.items()):
            if not isinstance(weight.quantizer.qparams.format.element, Integer):
                tuning.skipped[name] = WrongFormat(weight.quantizer.format_name, "rounds integers up or down")
                del weights[name]
        clipped = _before_relu(tuning)
        names = {id(parameter): name for name, parameter in tuning.model.named_parameters()}
        with tuning.in_blocks(weights) as blocks:
            for block in blocks:
                seen = block.moments(rows=self.rows, gram=False)
                for weight in block.weights:
                    relu = names[id(weight.tensor)] in clipped
                    self._round(tuning, weight, seen[weight.name], relu=relu)

    def _round(self, tuning: Tuning, weight: Weight, seen: Mapping[Layout, Moments], *, relu: bool) -> None:
        own = weight.tensor.detach().float().contiguous()
        grid, nearest = weight.grid(own), weight.rounded(own)
        result = nearest.clone()
        before = after = size = 0.0
        bias = getattr(weight.layer, "bias", None) if relu else None
        for layout, moments in seen.items():
            w, rtn, x = layout.matrices(own), layout.matrices(nearest), moments.rows
            b = 0.0 if bias is None else bias.detach().float().reshape(w.shape[0], 1, -1)

            def output(t: Tensor, x: Tensor = x, b: Tensor | float = b) -> Tensor:
                y = torch.bmm(x, t.mT) + b
                return y.relu() if relu else y

            wanted = output(w)
            learned = self._learn(w, x, wanted, grid.map(layout.matrices), rtn, b, relu=relu)
            errors = [(output(t) - wanted).square().sum(1) for t in (rtn, learned)]
            better = (errors[1] < errors[0]).unsqueeze(-1)
            view = layout.view(result)
            view.copy_(torch.where(better, learned, rtn).reshape(view.shape))
            before, after = before + float(errors[0].sum()), after + float(torch.minimum(*errors).sum())
            size += float(wanted.square().sum())
        note = "by the output of its ReLU" if relu else ""
        tuning.write_rounded(weight, result, before, after, size, note)

    def _learn(
        self,
        w: Tensor,
        x: Tensor,
        wanted: Tensor,
        grid: Grid,
        nearest: Tensor,
        bias: Tensor | float,
        *,
        relu: bool,
    ) -> Tensor:
        """Matrices of weights, each rounded up or down.

        Args:
            w: ``(groups, outputs, inputs)``.
            x: Inputs, ``(groups, rows, inputs)``.
            wanted: What they are to give.
            grid: What the weights are rounded to.
            nearest: They, rounded to the nearest.
            bias: Is added to products.
            relu: Whether a ReLU comes behind.
        """
        low, high = neighbours(w, grid)
        room = high - low
        share = ((w - low) / divisor(room)).clamp(0.01, 0.99)
        v = torch.special.logit((share + _STRETCH) / (1 + 2 * _STRETCH)).requires_grad_()
        off = torch.bmm(x, (nearest - w).mT).square().mean().clamp_min(1e-30)
        optimizer = torch.optim.Adam([v], lr=self.rate)
        count = min(self.batch, x.shape[1])
        for step in range(self.steps):
            chosen = torch.randint(x.shape[1], (count,))
            done = (step / self.steps - _WARM) / (1 - _WARM)
            with torch.enable_grad():
                h = (torch.sigmoid(v) * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)
                y = torch.baddbmm(torch.as_tensor(bias), x[:, chosen], (low + room * h).mT)
                loss = ((y.relu() if relu else y) - wanted[:, chosen]).square().mean() / off
                if done > 0:
                    exponent = _LAST + (_FIRST - _LAST) * (1 - done)
                    loss = loss + self.regularizer * (1 - (2 * h - 1).abs() ** exponent).mean()
                (v.grad,) = torch.autograd.grad(loss, v)
            optimizer.step()
        return torch.where(v.detach() >= 0, high, low)


def neighbours(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The values on a grid of integers below and above each weight; the same where one is beyond its ends."""
    steps = w / divisor(grid.scales)
    low, high = (grid.nearest(t * grid.scales) for t in (steps.floor(), steps.ceil()))
    return low, high


def _before_relu(tuning: Tuning) -> set[str]:
    """The names of the weights whose products, with a bias, go into a ReLU and nowhere else."""
    with in_float(tuning.model):
        flow = dataflow(tuning.model, tuning.outputs)
    found: dict[str, bool] = {}
    for operator in flow.operators:
        name, _ = weight_of(operator)
        if name is not None:
            found[name] = found.get(name, True) and _into_relu(operator)
    return {name for name, into in found.items() if into}


def _into_relu(operator: Operator) -> bool:
    value: Value = operator.outputs[0]
    while len(value.uses) == 1 and not value.is_result:
        (use,) = value.uses
        if use.name.removesuffix("_") == "aten::relu":
            return True
        if not traits(use.name).moves or len(use.outputs) != 1:
            return False
        value = use.outputs[0]
    return False
