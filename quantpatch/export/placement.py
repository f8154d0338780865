"""``prepare``: batch norm folded, and quantizers where a target's integer kernels want them.

Where quantizers stand decides what runs on integers. ONNX Runtime's integer convolution gives integers, and
so do its additions and concatenations: they run where all operands are quantized, and the result again. A
quantizer is put where a tensor comes from, behind a ReLU if one follows, and all who take the tensor share
it, so that it is quantized once. A first convolution that is faster on floats stays float. TensorRT fuses a
residual addition with the convolution before it if the other operand is quantized.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import UnknownNameError
from quantpatch.export.batchnorm import FoldedBatchNorm, fold_batchnorm
from quantpatch.export.dataflow import BATCHNORM, MOVING, Dataflow, Operator, Value, dataflow
from quantpatch.export.targets import TARGETS, Target
from quantpatch.export.unsigned import is_never_negative
from quantpatch.formats import Integer
from quantpatch.layers.base import QuantizedLayer, quantizer_name
from quantpatch.layers.placed import can_hold, quantize_output_of
from quantpatch.quantizer import TensorQuantizer, named_quantizers
from quantpatch.running import demand_model, explaining_devices, uncompiled

__all__ = ["Preparation", "prepare"]

# Below that many channels an image is padded and turned for the integer kernel, and is not for the float one.
_FEW_CHANNELS = 4
# A float kernel is as fast as an integer one up to about so many products for each output.
_FEW_PRODUCTS = 32
# Activations that have no integer kernel.
_FLOAT_ACTIVATIONS = frozenset(
    f"aten::{name}{end}" for name in ("gelu", "hardswish", "silu") for end in ("", "_")
)

_RELU = ("aten::relu", "aten::relu_", "aten::hardtanh", "aten::hardtanh_", "aten::clamp_min")


@attrs.frozen
class Preparation:
    """What ``prepare`` did.

    Attributes:
        target: What for.
        batchnorm: Which batch norms were folded, and which were not and why.
        placed: Names of the new quantizers.
        shared: Quantizers that gave way to a new one, which they share now: its name by theirs.
        unsigned: Quantizers that are unsigned now, since what they take is never negative.
        left: What stays float between integer kernels, by the module that runs it, and why.
    """

    target: str
    batchnorm: FoldedBatchNorm
    placed: tuple[str, ...]
    shared: Mapping[str, str]
    unsigned: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"for {self.target}: {len(self.batchnorm.folded)} batch norms folded, {len(self.placed)} "
            f"quantizers placed, {len(self.shared)} shared, {len(self.unsigned)} unsigned"
        ]
        lines += [f"{name} is not folded: {why}" for name, why in self.batchnorm.left.items()]
        lines += [f"{name or 'the model'} is left: {why}" for name, why in self.left.items()]
        return "\n  ".join(lines)


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    target: Target = "onnxruntime",
) -> Preparation:
    """Places the quantizers that a target's integer kernels want, and folds batch norm where it wants that.

    Call it before calibration or quantization-aware training, which give the new quantizers their ranges.
    The model then computes with them in PyTorch as well, so the exported file still gives the same integers.
    Calling it again changes nothing.

    Args:
        model: A quantized model in eval mode; changed in place.
        args: Arguments to run it on once, to see what it computes: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        target: What will run the exported file. ``"onnxruntime"``: batch norm is folded; convolutions,
            residual additions and concatenations get quantized results, what is never negative becomes
            unsigned, and a small convolution of images is left float, its quantizers switched off, if its
            activation has no integer kernel. ``"tensorrt"``: of an addition to a convolution the other
            operand is quantized.

    Returns:
        What was done, and what was left and why.

    Raises:
        ExportError: A batch norm is in training mode.
        InputError: The first argument is no model, or the inputs are on another device.
        UnknownNameError: There is no such target.
    """
    demand_model(model, "prepare")
    if target not in TARGETS:
        raise UnknownNameError.of("target", target, TARGETS)
    model = uncompiled(model)
    args = args if isinstance(args, tuple) else (args,)
    with explaining_devices(model, (args, kwargs)):
        # TensorRT folds batch norm by itself, and its documentation asks that nobody does it before.
        fold = target == "onnxruntime"
        folded = fold_batchnorm(model, args, kwargs=kwargs) if fold else FoldedBatchNorm({}, {})
        flow = dataflow(model, lambda: model(*args, **dict(kwargs or {})))
    rules = _Rules(model, flow)
    unsigned: tuple[str, ...] = ()
    if target == "onnxruntime":
        rules.leave_images_float()
        rules.quantize_convolutions()
        rules.quantize_joins()
        unsigned = tuple(_never_negative(model, flow))
    else:
        rules.quantize_skips()
    placed, shared = rules.carry_out(allow_unsigned=target == "onnxruntime")
    every = named_quantizers(model, every_name=True)
    unsigned = tuple(name for name in unsigned if name not in shared and not every[name].disabled)
    for name in unsigned:
        every[name].use_zero_point(0)
    unsigned += tuple(name for name in placed if getattr(every[name].format, "unsigned", False))
    return Preparation(target, folded, placed, shared, unsigned, rules.left)


def _never_negative(model: nn.Module, flow: Dataflow) -> Iterator[str]:
    """Quantizers of activations that may be unsigned: nothing that they take is ever negative."""
    taken: dict[TensorQuantizer, list[Value]] = {}
    for operator in flow.operators:
        if operator.quantizer is not None:
            taken.setdefault(operator.quantizer, []).append(operator.inputs[0])
    for name, quantizer in named_quantizers(model).items():
        values = taken.get(quantizer, [])
        if values and quantizer.is_symmetric and all(map(is_never_negative, values)):
            yield name


class _Rules:
    """The rules of placement, over what a model computes; ``carry_out`` changes the model."""

    def __init__(self, model: nn.Module, flow: Dataflow) -> None:
        self.model = model
        self.flow = flow
        self.left: dict[str, str] = {}
        self._modules = dict(model.named_modules())
        self._plans: dict[Value, tuple[str, QuantDescriptor]] = {}
        self._float: dict[Operator, QuantizedLayer] = {}
        self._uses = Counter(o.quantizer for o in flow.operators if o.quantizer is not None)

    # --- rules ---------------------------------------------------------------------------------

    def leave_images_float(self) -> None:
        """A small convolution of images stays float if its activation has no integer kernel.

        On integers the image is quantized, padded to four channels and turned, and the result becomes float
        for the activation and integer again; the float kernel takes the image as it is and has the activation
        in it (3 to 16 channels, 3 x 3, 160 x 160, hard swish: 200 and 114 us on one thread of an x86 with
        VNNI; SiLU and GELU gain as much, larger kernels and ReLU do not).
        """
        for operator in self.flow.named("convolution"):
            layer = self._modules.get(operator.module)
            if not isinstance(layer, QuantizedLayer) or not isinstance(layer, nn.Conv2d):
                continue
            products = layer.in_channels * math.prod(layer.kernel_size)
            if layer.groups != 1 or layer.in_channels >= _FEW_CHANNELS or products > _FEW_PRODUCTS:
                continue
            uses = operator.outputs[0].uses
            if len(uses) != 1 or uses[0].name not in _FLOAT_ACTIVATIONS:
                continue
            own = layer.quantizers().values()
            if self._of_convolution(operator) is None or any(self._uses[q] > 1 for q in own):
                continue
            self._float[operator] = layer
            follows = uses[0].name.removeprefix("aten::").rstrip("_")
            self.left[operator.module] = (
                f"its quantizers are switched off, since ONNX Runtime is faster on floats where images of "
                f"{layer.in_channels} channels come in and {follows} follows, which has no integer kernel; "
                f"enable() them if it shall be quantized nevertheless"
            )

    def quantize_convolutions(self) -> None:
        """The result of an integer convolution is quantized, behind its activation if it has one."""
        for operator in self.flow.named("convolution"):
            descriptor = self._of_convolution(operator)
            result = operator.outputs[0]
            if descriptor is None or operator.args[6] or self._is_settled(result):
                continue
            behind = self._behind_activation(result)
            if self._is_settled(behind):
                continue
            if not self._plan(behind, descriptor) and not self._plan(result, descriptor):
                self.left[operator.module] = (
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
            if result.is_result and not result.uses:
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

    def _plan_all(self, operator: Operator, wanted: list[Value], descriptor: QuantDescriptor) -> None:
        if any(self._place(value) is None for value in wanted):
            self.left[operator.module] = (
                "what it adds or concatenates is computed there by functions, and only the output of a "
                "module can be quantized: use modules, such as nn.ReLU or quantpatch.layers.operands.Add"
            )
            return
        for value in wanted:
            self._plan(value, descriptor)

    def _joined(self, operator: Operator) -> QuantDescriptor | None:
        """The descriptor for an addition or concatenation of activations, one of them a convolution's."""
        if len(operator.inputs) < 2 or any(value.is_parameter for value in operator.inputs):
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
        passed = (*MOVING, *_RELU, *BATCHNORM)
        while operator is not None and (operator.quantizer is not None or operator.name in passed):
            operator = operator.inputs[0].maker
        if operator is None or operator.name != "aten::convolution":
            return None
        return self._of_convolution(operator)

    def _is_on_grid(self, value: Value) -> bool:
        """Whether a value comes out of a quantizer, moved at most."""
        while value not in self._plans:
            if value.maker is None or value.maker.quantizer is not None:
                return value.maker is not None
            if value.maker.name not in MOVING:
                return False
            value = value.maker.inputs[0]
        return True

    def _is_settled(self, value: Value) -> bool:
        """Whether a value is quantized wherever it goes, or is what the model returns."""
        if value in self._plans:
            return True
        return bool(value.uses or value.is_result) and all(map(self._takes_quantized, value.uses))

    def _takes_quantized(self, operator: Operator) -> bool:
        if operator.quantizer is not None:
            return True
        used = [value for value in operator.outputs if value.uses or value.is_result]
        return operator.name in (*MOVING, *_RELU) and bool(used) and all(map(self._is_settled, used))

    def _behind_activation(self, value: Value) -> Value:
        """The value behind the ReLU that is all a value goes into; else the value."""
        if len(value.uses) != 1 or value.uses[0].name not in _RELU or value.is_result:
            return value
        behind = value.uses[0].outputs[0]
        return behind if self._place(behind) is not None or self._is_settled(behind) else value

    def _place(self, value: Value) -> str | None:
        """The module whose output a value is, where a quantizer there changes that value and no other."""
        for name in value.outputs_of:
            inside = any(use.module == name or use.module.startswith(f"{name}.") for use in value.uses)
            if name and self.flow.calls[name] == 1 and not inside and can_hold(self._modules[name]):
                return name
        return None

    # --- doing ---------------------------------------------------------------------------------

    def _plan(self, value: Value, descriptor: QuantDescriptor) -> bool:
        place = self._place(value)
        if place is None or quantizer_name("output") in self._modules[place]._modules:
            return False
        self._plans[value] = (place, descriptor)
        return True

    def carry_out(self, *, allow_unsigned: bool) -> tuple[tuple[str, ...], dict[str, str]]:
        """Places what was planned; gives the names of the new quantizers, and of those that share them."""
        placed: list[str] = []
        shared: dict[str, str] = {}
        for layer in self._float.values():
            for quantizer in layer.quantizers().values():
                quantizer.disable()
        for value, (place, descriptor) in self._plans.items():
            if allow_unsigned and is_never_negative(value):
                descriptor = attrs.evolve(descriptor, unsigned=True)
            new = quantize_output_of(self._modules[place], descriptor)
            placed.append(f"{place}.{quantizer_name('output')}")
            for old in _takers(value):
                if self._uses[old] == 1 and _may_share(old, new):
                    for name in _replace(self.model, old, new):
                        shared[name] = placed[-1]
        return tuple(placed), shared


def _quantizer_of(value: Value) -> TensorQuantizer | None:
    while value.maker is not None and value.maker.name in MOVING:
        value = value.maker.inputs[0]
    return None if value.maker is None else value.maker.quantizer


def _takers(value: Value) -> Iterator[TensorQuantizer]:
    """The quantizers that a value goes into, moved at most."""
    for operator in value.uses:
        if operator.quantizer is not None:
            yield operator.quantizer
        elif operator.name in MOVING:
            for output in operator.outputs:
                yield from _takers(output)


def _replace(model: nn.Module, old: TensorQuantizer, new: TensorQuantizer) -> list[str]:
    """Puts a quantizer in every place of another; gives the names of those places."""
    names = [name for name, m in named_quantizers(model, every_name=True).items() if m is old]
    for name in names:
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._modules[own] = new
    return names


def _may_share(old: TensorQuantizer, new: TensorQuantizer) -> bool:
    """Whether one quantizer can stand for another that is not calibrated yet; its sign may differ."""
    if old.amax is not None or old.disabled or not old.quantizing or old.calibrating:
        return False
    if old.descriptor.zero_point:
        return False
    return bool(attrs.evolve(old.descriptor, unsigned=new.descriptor.unsigned) == new.descriptor)
