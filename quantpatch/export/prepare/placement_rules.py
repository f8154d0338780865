"""The rules by which ``prepare`` places quantizers: which values a runtime's integer kernels want quantized.

Where quantizers stand decides what runs on integers. ONNX Runtime's integer convolution gives integers, and
so do its additions and concatenations: they run where all operands are quantized, and the result again. A
quantizer is put where a tensor comes from, behind a ReLU if one follows, and all who take the tensor share
it, so that it is quantized once. A small convolution that is faster on floats stays float. TensorRT fuses a
residual addition with the convolution before it if the other operand is quantized. PyTorch's compiler does so
too, if what the convolution gives is not rounded before it is added; it multiplies activations in float.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from quantpatch.dataflow import BATCHNORM, Dataflow, Operator, Value, traits
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.placed import can_hold
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.formats import Integer
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.torch_tools import nn

# Below that many channels an image is padded and turned for the integer kernel, and is not for the float one.
_FEW_CHANNELS = 4
# A float kernel is as fast as an integer one up to about so many products for each output.
_FEW_PRODUCTS = 32
# Of one channel, that takes longer than integers save up to so many that go out.
_FEW_OF_ONE = 32
# What is copied for the integer kernel is worth it from about so many channels on that come in and out.
_FEW_IN_VOLUMES, _FEW_IN_GROUPS = 16, 8
# Activations that have no integer kernel.
_FLOAT_ACTIVATIONS = frozenset(
    f"aten::{name}{end}" for name in ("gelu", "hardswish", "silu") for end in ("", "_")
)


class Rules:
    """The rules of placement, over what a model computes. They plan; nothing is changed by them.

    Args:
        model: The model.
        flow: What it computes.
        outputs: Whether what the model returns is quantized where an integer kernel gives it.

    Attributes:
        skipped: What stays float, by the module that runs it, and why.
        plans: The values to be quantized, each with the module whose output it is, and how.
        off: Quantizers that are to be switched off.
    """

    def __init__(self, model: nn.Module, flow: Dataflow, *, outputs: bool) -> None:
        self.flow = flow
        self.skipped: dict[str, str] = {}
        self.plans: dict[Value, tuple[str, QuantDescriptor]] = {}
        self._outputs = outputs
        self._modules = dict(model.named_modules())
        self._float: set[Operator] = set()
        self.off: set[TensorQuantizer] = set()
        self._uses = Counter(o.quantizer for o in flow.operators if o.quantizer is not None)

    def takers(self, value: Value) -> Iterator[TensorQuantizer]:
        """The quantizers that a value goes into, moved at most, and nothing else does."""
        for operator in value.uses:
            if operator.quantizer is not None:
                if self._uses[operator.quantizer] == 1 and operator.quantizer not in self.off:
                    yield operator.quantizer
            elif traits(operator.name).moves:
                for output in operator.outputs:
                    yield from self.takers(output)

    def plan(self, names: Iterable[str]) -> None:
        """Applies rules by their names, which a ``Runtime`` has as its ``placement``."""
        for name in names:
            RULES[name](self)

    # --- rules ---------------------------------------------------------------------------------

    def leave_slow_float(self) -> None:
        """A small convolution stays float where ONNX Runtime is slower on integers than on floats."""
        for operator in self.flow.named("convolution"):
            layer = self._modules.get(operator.module)
            if not isinstance(layer, QuantizedLayer):
                continue
            if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                continue
            why = _why_slow_with_few_channels(layer)
            if why is None and isinstance(layer, nn.Conv2d) and layer.groups == 1:
                why = _why_slow_on_images(layer, operator)
            own = type(layer).quantizers(layer).values()
            if why is None or self._of_convolution(operator) is None or any(self._uses[q] > 1 for q in own):
                continue
            self._float.add(operator)
            self.off.update(own)
            self.skipped[operator.module] = (
                f"its quantizers are switched off, since ONNX Runtime is faster on floats {why}; enable() "
                f"them to quantize it anyway"
            )

    def quantize_convolutions(self) -> None:
        """The result of an integer convolution is quantized, behind its activation if it has one."""
        for operator in self.flow.named("convolution"):
            descriptor = self._of_convolution(operator)
            result = operator.outputs[0]
            if descriptor is None or operator.args[6]:
                continue
            if not self._outputs and _is_returned(result):
                self.skipped[operator.module] = (
                    "the model returns its result, which outputs=False leaves float, and ONNX Runtime then "
                    "runs the convolution on floats"
                )
                continue
            if self._is_settled(result):
                continue
            behind = self._behind_activation(result)
            if self._is_settled(behind):
                continue
            if not self._plan(behind, descriptor) and not self._plan(result, descriptor):
                self.skipped[operator.module] = (
                    "its output can have no quantizer, since the layer runs more than once or quantizes its "
                    "output already"
                )

    def quantize_joins(self) -> None:
        """Additions and concatenations of what convolutions give have quantized operands and results."""
        for operator in self.flow.named("add", "cat"):
            descriptor = self._joined(operator)
            if descriptor is None:
                continue
            result = self._behind_activation(operator.outputs[0])
            wanted = [v for v in operator.inputs if not self._is_on_grid(v)]
            if result.is_result and not result.uses and not self._outputs:
                continue  # a float result wants float operands
            if not self._is_settled(result):
                wanted.append(result)
            self._plan_all(operator, wanted, descriptor)

    def quantize_skips(self) -> None:
        """Of an addition to what a convolution gives, the operand that was there first is quantized."""
        order = {value: i for i, o in enumerate(self.flow.operators) for value in o.outputs}
        for operator in self.flow.named("add"):
            descriptor = self._joined(operator)
            if descriptor is not None:
                first = min(operator.inputs, key=lambda value: order.get(value, -1))
                self._plan_all(operator, [] if self._is_on_grid(first) else [first], descriptor)

    def add_before_rounding(self) -> None:
        """Of an addition to what a convolution gives, that operand is not quantized: a kernel adds before."""
        order = {value: i for i, o in enumerate(self.flow.operators) for value in o.outputs}
        for operator in self.flow.named("add"):
            if self._joined(operator) is None:
                continue
            last = max(operator.inputs, key=lambda value: order.get(value, -1)).maker
            if last is None or last.quantizer is None or self._uses[last.quantizer] > 1:
                continue
            between, source = [last.outputs[0], last.inputs[0]], last.inputs[0].maker
            while source is not None and source.name in BATCHNORM:
                between.append(source.inputs[0])
                source = source.inputs[0].maker
            is_alone = all(len(value.uses) == 1 and not value.is_result for value in between)
            if source is not None and source.name == "aten::convolution" and is_alone:
                self.off.add(last.quantizer)
                self.skipped[operator.module] = (
                    "the quantizer of what the convolution before gives is switched off, since the kernel "
                    "adds to that before it rounds; enable() it to quantize it anyway"
                )

    def leave_products_float(self) -> None:
        """Quantizers of what products of activations take are switched off: there is no kernel for these."""
        found: dict[TensorQuantizer, list[Operator]] = {}
        for operator in self.flow.operators:
            if operator.quantizer is not None and not operator.quantizer.disabled:
                found.setdefault(operator.quantizer, []).append(operator)
        for quantizer, runs in found.items():
            ends = [end for run in runs for end in _taken_by(run.outputs[0])]
            if not ends or any(run.inputs[0].is_constant for run in runs):
                continue
            if all(end.products and not any(map(_is_weight, _multiplied(end))) for end in ends):
                self.off.add(quantizer)
                for run in runs:
                    self.skipped[run.module] = (
                        "quantizers of what it multiplies are switched off, since PyTorch's compiler has no "
                        "integer kernel for products of activations; enable() them to quantize them anyway"
                    )

    def _plan_all(self, operator: Operator, wanted: list[Value], descriptor: QuantDescriptor) -> None:
        if any(self._spot(value) is None for value in wanted):
            self.skipped[operator.module] = (
                "what it adds or concatenates is computed there by functions, and only the output of a "
                "module can be quantized: use modules, such as nn.ReLU or quantpatch.layers.Add"
            )
            return
        for value in wanted:
            self._plan(value, descriptor)

    def _joined(self, operator: Operator) -> QuantDescriptor | None:
        """The descriptor for an addition or concatenation of activations, one of them a convolution's."""
        if len(operator.inputs) < 2 or any(value.is_constant for value in operator.inputs):
            return None
        found = (self._from_convolution(value) for value in operator.inputs)
        return next((descriptor for descriptor in found if descriptor is not None), None)

    # --- what is known of a value ----------------------------------------------------------------

    def _of_convolution(self, operator: Operator) -> QuantDescriptor | None:
        """What a convolution's input is quantized to, if that and its weight are quantized to integers."""
        if operator in self._float:
            return None
        x, weight = operator.inputs[:2]
        source = _quantizer_of(x)
        if source is None or not isinstance(source.format, Integer) or source.format.bits != 8:
            return None
        other = None if weight.maker is None else weight.maker.quantizer
        if source.descriptor.dynamic or source.descriptor.kept_axes is not None:
            return None
        if other is None or not isinstance(other.format, Integer):
            return None
        return attrs.evolve(source.descriptor, amax=None, unsigned=False, narrow_range=False, zero_point=0)

    def _from_convolution(self, value: Value) -> QuantDescriptor | None:
        operator = value.maker
        while operator is not None and (
            operator.quantizer is not None or _is_passed(operator) or operator.name in BATCHNORM
        ):
            operator = operator.inputs[0].maker
        if operator is None or operator.name != "aten::convolution":
            return None
        return self._of_convolution(operator)

    def _is_on_grid(self, value: Value) -> bool:
        """Whether a value comes out of a quantizer, moved at most."""
        while value not in self.plans:
            if value.maker is None or value.maker.quantizer is not None:
                return value.maker is not None
            if not traits(value.maker.name).moves:
                return False
            value = value.maker.inputs[0]
        return True

    def _is_settled(self, value: Value) -> bool:
        """Whether a value is quantized wherever it goes, or is what the model returns in float."""
        if value in self.plans:
            return True
        if value.is_result and self._outputs and not self._is_on_grid(value):
            return False
        return bool(value.uses or value.is_result) and all(map(self._takes_quantized, value.uses))

    def _takes_quantized(self, operator: Operator) -> bool:
        if operator.quantizer is not None:
            return operator.quantizer not in self.off
        used = [value for value in operator.outputs if value.uses or value.is_result]
        return _is_passed(operator) and bool(used) and all(map(self._is_settled, used))

    def _behind_activation(self, value: Value) -> Value:
        """The value behind the ReLU that is all a value goes into; else the value."""
        if len(value.uses) != 1 or not traits(value.uses[0].name).clips or value.is_result:
            return value
        behind = value.uses[0].outputs[0]
        return behind if self._spot(behind) is not None or self._is_settled(behind) else value

    def _module_at(self, value: Value) -> str | None:
        """The module whose output a value is, where a quantizer there changes that value and no other."""
        for name in value.outputs_of:
            inside = any(use.module == name or use.module.startswith(f"{name}.") for use in value.uses)
            if name and self.flow.calls[name] == 1 and not inside and can_hold(self._modules[name]):
                return name
        return None

    def _spot(self, value: Value) -> Value | None:
        """Where a quantizer can stand for a value: at it, or behind what only moves it."""
        while self._module_at(value) is None:
            if value.is_result or len(value.uses) != 1 or not traits(value.uses[0].name).moves:
                return None
            used = [output for output in value.uses[0].outputs if output.uses or output.is_result]
            if len(used) != 1:
                return None
            value = used[0]
        return value

    def _plan(self, value: Value, descriptor: QuantDescriptor) -> bool:
        spot = self._spot(value)
        place = None if spot is None else self._module_at(spot)
        if spot is None or place is None or quantizer_name("output") in self._modules[place]._modules:
            return False
        self.plans[spot] = (place, descriptor)
        return True


#: The rules by the names in ``Runtime.placement``.
RULES: Mapping[str, Callable[[Rules], None]] = {
    "slow_float": Rules.leave_slow_float,
    "convolutions": Rules.quantize_convolutions,
    "joins": Rules.quantize_joins,
    "skips": Rules.quantize_skips,
    "sums": Rules.add_before_rounding,
    "products": Rules.leave_products_float,
}


def _why_slow_on_images(layer: nn.Conv2d, operator: Operator) -> str | None:
    """When integers are slower in a convolution of images: few channels come in.

    On integers the image is quantized, padded to four channels and turned; the float kernel takes it as it
    is. Where one channel comes in and few go out, that is more than integers save (measured for kernels of 1
    to 7, strides of 1 and 2, and for a ReLU and a convolution behind: 1.0 to 2.5 times as long). Where an
    activation follows that has no integer kernel, such as hard swish, SiLU
    and GELU, the result becomes float for it and integer again besides, while the float kernel has it inside.
    """
    if layer.in_channels >= _FEW_CHANNELS:
        return None
    if layer.in_channels == 1 and layer.out_channels <= _FEW_OF_ONE and _is_given(operator.inputs[0]):
        return f"where images of one channel become {layer.out_channels}"
    uses = operator.outputs[0].uses
    if layer.in_channels * math.prod(layer.kernel_size) > _FEW_PRODUCTS or len(uses) != 1:
        return None
    if uses[0].name not in _FLOAT_ACTIVATIONS:
        return None
    follows = uses[0].name.removeprefix("aten::").rstrip("_")
    return (
        f"where images of {layer.in_channels} channels come in and {follows} follows, which has no integer "
        f"kernel"
    )


def _why_slow_with_few_channels(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    """When integers are slower in a convolution of volumes, or of groups: a group has few channels.

    The integer kernel copies what each output of a group needs, which takes as long for 1 channel as for 16;
    floats are as slow from about 12 channels on, and in groups from about 8. Depthwise ones
    have a kernel of their own, of volumes for many groups at once.
    """
    inside, outside = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    is_volume = isinstance(layer, nn.Conv3d)
    if inside == outside == 1 and layer.groups >= (_FEW_IN_VOLUMES if is_volume else 2):
        return None
    if is_volume:
        is_slow = inside < _FEW_IN_VOLUMES // 2 or inside * outside < _FEW_IN_VOLUMES**2
    else:
        is_slow = layer.groups > 1 and inside * outside < _FEW_IN_GROUPS**2
    grouped = "" if layer.groups == 1 else " in each group"
    return f"where {inside} channels become {outside}{grouped}" if is_slow else None


def _is_given(value: Value) -> bool:
    """Whether a value is an input of the model, quantized and moved at most."""
    while value.maker is not None and (value.maker.quantizer is not None or traits(value.maker.name).moves):
        value = value.maker.inputs[0]
    return value.maker is None and not value.is_constant


def _quantizer_of(value: Value) -> TensorQuantizer | None:
    while value.maker is not None and traits(value.maker.name).moves:
        value = value.maker.inputs[0]
    return None if value.maker is None else value.maker.quantizer


def _taken_by(value: Value) -> Iterator[Operator]:
    """The operators that a value goes into, moved or scaled at most."""
    for operator in value.uses:
        if operator.quantizer is None and traits(operator.name).keeps_grid and not operator.products:
            for output in operator.outputs:
                yield from _taken_by(output)
        else:
            yield operator


def _multiplied(operator: Operator) -> Iterator[Value]:
    """The values that an operator multiplies."""
    for product in operator.products:
        yield from (value for _, value in product.operands if value is not None)


def _is_weight(value: Value) -> bool:
    """Whether a value is a parameter or a buffer, quantized or moved at most."""
    while value.maker is not None and (value.maker.quantizer is not None or traits(value.maker.name).moves):
        value = value.maker.inputs[0]
    return value.is_constant


def _is_returned(value: Value) -> bool:
    """Whether a model returns a value, moved or behind a ReLU at most."""
    passed = filter(_is_passed, value.uses)
    return value.is_result or any(_is_returned(output) for use in passed for output in use.outputs)


def _is_passed(operator: Operator) -> bool:
    """Whether an operator moves its argument, or cuts it off, as an integer kernel does besides."""
    known = traits(operator.name)
    return known.moves or known.clips
