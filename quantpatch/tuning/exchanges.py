"""Which neighbours may exchange scales: what makes the channels of a value and what uses them, in a run.

If what makes a value gives each channel divided by a number, and all that use it multiply by that number, the
model computes what it did. From a product's input the run is followed back to products and norms, through
operators to which a positive factor for a channel is nothing, and on to all else that uses the same values.
No name of a module matters, nor its class. Where channels are moved about in between, whether they are in the
same places again is left to who verifies the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import attrs
import torch
from torch import Tensor, nn

from quantpatch.dataflow import BATCHNORM, Dataflow, Operator, Value, traits
from quantpatch.quantize.reasons import Reason
from quantpatch.tuning.operands import Convolved, Layout, Multiplied
from quantpatch.tuning.reasons import NoData, NoExchange

# Through which a positive factor for each channel of the first argument goes; besides what moves values.
_HOMOGENEOUS = frozenset(
    f"aten::{name}"
    for name in (
        "relu", "leaky_relu", "dropout", "native_dropout", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "_to_copy", "div", "neg", "upsample_bilinear2d", "reflection_pad1d", "reflection_pad2d",
        "replication_pad1d", "replication_pad2d", "repeat", "mul",
    )
)  # fmt: skip
_NORMS = {"aten::native_layer_norm", *BATCHNORM}
_MIXED = {"aten::add", "aten::sub", "aten::cat"}
_ADDING = {"aten::add", "aten::add_", "aten::_to_copy"}


@attrs.frozen(eq=False)
class Channels:
    """A tensor of a model, and where in it the channels of a value are.

    Attributes:
        parameter: Its name.
        layout: How a product reads it; None for what has an element for each channel.
        is_input: Whether the channels are a product's inputs, and not its outputs.
    """

    parameter: str
    layout: Layout | None = None
    is_input: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor as ``(groups, channels of a group, …)``."""
        if self.layout is None:
            return tensor.unsqueeze(0)
        view = self.layout.view(tensor)
        return view.transpose(1, 2) if self.is_input else view

    def count(self, tensor: Tensor) -> int:
        """How many channels there are."""
        view = self.view(tensor)
        return view.shape[0] * view.shape[1]

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest magnitude of each channel."""
        return self.view(tensor.detach().contiguous().float()).abs().flatten(2).amax(2).flatten()

    def rotated(self, tensor: Tensor, rotation: Tensor) -> Tensor:
        """The tensor with neighbouring channels mixed by an orthogonal matrix, as many as that has rows."""
        result = tensor.detach().double().contiguous().clone()
        view = self.view(result)
        mixed = mix(view.movedim(1, -1), rotation.double()).movedim(-1, 1)
        view.copy_(mixed)
        return result.to(tensor.dtype)

    def scaled(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """The tensor with each channel times its factor."""
        result = tensor.detach().double().contiguous().clone()
        view = self.view(result)
        shape = *view.shape[:2], *[1] * (view.dim() - 2)
        view.mul_(factor.double().reshape(shape))
        return result.to(tensor.dtype)


@attrs.frozen(eq=False)
class Exchange:
    """Tensors that can exchange a factor for each channel.

    Attributes:
        name: The modules that use the channels.
        made_by: What they are made by.
        used_by: The weights that multiply them.
        values: The values between.
        at_runtime: Names of the layers that are to divide what they are given, where nothing before does.
        mixes: How many neighbouring channels may be mixed, where all between is linear; 0 where it is not.
    """

    name: str
    made_by: tuple[Channels, ...]
    used_by: tuple[Channels, ...]
    values: tuple[Value, ...]
    at_runtime: tuple[str, ...] = ()
    mixes: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(channels.parameter for channels in (*self.made_by, *self.used_by))


def mix(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbours on the last axis, mixed by a matrix."""
    return (torch.unflatten(x, -1, (-1, len(rotation))) @ rotation.mT).flatten(-2)


class _Impossible(Exception):
    """Why there is no exchange."""


class _Closure:
    """All values that share the channels of one, what makes them and what uses them."""

    def __init__(self) -> None:
        self.made_by: dict[tuple[str, bool], Channels] = {}
        self.used_by: dict[tuple[str, bool], Channels] = {}
        self.users: dict[str, None] = {}
        self.is_linear = True
        self.heads: set[int] = set()
        self.values: dict[int, Value] = {}

    def mixes(self, parameters: Mapping[str, Tensor]) -> int:
        """How many neighbouring channels may be mixed."""
        several = (*self.made_by.values(), *self.used_by.values())
        views = [channels.view(parameters[channels.parameter].detach().contiguous()) for channels in several]
        if not self.is_linear or any(view.shape[0] > 1 for view in views):
            return 0
        return math.gcd(*self.heads, *(view.shape[1] for view in views))

    def add(self, value: Value) -> None:
        """Follows a value in both directions."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if id(value) in self.values:
                continue
            self.values[id(value)] = value
            if value.is_result:
                raise _Impossible("is an output of the model")
            waiting += self._back(value)
            for operator in value.uses:
                waiting += self._on(value, operator)

    def _back(self, value: Value) -> Iterable[Value]:
        operator = value.maker
        if operator is None:
            raise _Impossible("is an input or a constant of the model")
        weight, layout = weight_of(operator)
        if layout is not None and weight is not None:
            self._make(weight, layout)
            for bias in _one_dimensional(operator):
                self._make(bias)
            return ()
        name = operator.name.removesuffix("_")
        if name in _NORMS:
            affine = list(_one_dimensional(operator))
            if not affine or operator.inputs[1].parameter is None:
                raise _Impossible(f"is made by {name}, which has no weight")
            for parameter in affine:
                self._make(parameter)
            self.is_linear = False
            return ()
        followed = _linear_operand(operator)
        if name in _MIXED or _is_homogeneous(operator) or followed is not None:
            self._cross(operator)
            return self._operands(operator) if followed is None else (followed,)
        raise _Impossible(f"is made by {name}")

    def _operands(self, operator: Operator) -> Iterable[Value]:
        """Those operands of an operator that have the channels of its result."""
        name = operator.name.removesuffix("_")
        several = [x for x in operator.inputs if x.is_floating_point]
        parameters = [x for x in several if x.parameter is not None]
        rest = [x for x in several if x.parameter is None]
        if name in ("aten::mul", "aten::div") and parameters:
            if name == "aten::div" or len(parameters) > 1 or not _is_per_channel(parameters[0], operator):
                raise _Impossible(f"is made by {name} with a parameter")
            self._make(str(parameters[0].parameter))  # which takes the factor: nothing before it need
            return ()
        if name in ("aten::mul", "aten::div"):
            rest = [x for x in rest if not x.is_constant]
            if name == "aten::div" or len(rest) < 2:
                return rest[:1]
            return [next((x for x in rest if _comes_from_product(x)), rest[0])]
        if name in _MIXED:
            numbers = [x for x in operator.args if isinstance(x, (int, float)) and x]
            if numbers or name == "aten::cat":
                raise _Impossible(f"is made by {name}")
            for parameter in parameters:
                if not _is_per_channel(parameter, operator):
                    raise _Impossible(f"is made by {name} with a parameter")
                self._make(str(parameter.parameter))
            return rest
        return rest[:1]

    def _on(self, value: Value, operator: Operator) -> Iterable[Value]:
        if operator.quantizer is not None:
            return operator.outputs
        weight, layout = weight_of(operator)
        if layout is not None and weight is not None:
            if operator.products[-1].operands[0][1] is not value:
                raise _Impossible(f"is used by {operator.name} otherwise than as its input")
            self.used_by[weight, True] = Channels(weight, layout, is_input=True)
            self.users[operator.module] = None
            return ()
        name = operator.name.removesuffix("_")
        if name == "aten::mul" and sum(x is value for x in operator.inputs) > 1:
            raise _Impossible("is squared")
        if name == "aten::div" and operator.inputs[0] is not value:
            raise _Impossible("is divided by")
        if name in _MIXED:
            others = [x for x in self._operands(operator) if x is not value]
            return (*operator.outputs, *others)
        if _is_homogeneous(operator) or _linear_operand(operator) is value:
            self._cross(operator)
            return [x for x in operator.outputs if x.is_floating_point]
        raise _Impossible(f"is used by {name}")

    def _cross(self, operator: Operator) -> None:
        """Notes whether channels may be mixed on both sides of an operator alike."""
        operand = _linear_operand(operator)
        if operand is not None:  # heads of attention, each on its own
            self.heads.add(operand.shape[-1])
        elif operator.name not in _ADDING and not traits(operator.name).moves and operator.quantizer is None:
            self.is_linear = False

    def _make(self, parameter: str, layout: Layout | None = None) -> None:
        self.made_by[parameter, False] = Channels(parameter, layout)


def _is_homogeneous(operator: Operator) -> bool:
    name = operator.name.removesuffix("_")
    if name == "aten::constant_pad_nd":
        return len(operator.args) < 3 or not operator.args[2]
    return name in _HOMOGENEOUS or traits(name).moves or operator.quantizer is not None


def _linear_operand(operator: Operator) -> Value | None:
    """Of a product of two activations that one whose features are those of the result."""
    for product in operator.products[-1:]:
        role, operand = product.operands[-1]
        if role == "value" or (
            role == "right" and operand is not None and not before_moves(operand).is_constant
        ):
            return operand
    return None


def before_moves(value: Value) -> Value:
    """What a value was before it was moved or quantized."""
    while value.maker is not None and (value.maker.quantizer is not None or traits(value.maker.name).moves):
        value = value.maker.inputs[0]
    return value


def _comes_from_product(value: Value) -> bool:
    return weight_of(before_moves(value).maker)[1] is not None


def _one_dimensional(operator: Operator) -> Iterator[str]:
    """The parameters of one axis among an operator's inputs."""
    for value in operator.inputs:
        if value.parameter is not None and len(value.shape) == 1:
            yield value.parameter


def _is_per_channel(parameter: Value, operator: Operator) -> bool:
    """Whether a parameter has an element for each of the last axis of an operator's result."""
    result = operator.outputs[0].shape
    return len(parameter.shape) == 1 and bool(result) and parameter.shape[0] == result[-1]


def weight_of(operator: Operator | None) -> tuple[str | None, Layout | None]:
    """The parameter that an operator multiplies activations by, and how it reads it; or None."""
    if operator is None or not operator.products:
        return None, None
    role, read = operator.products[-1].operands[-1]
    if read is None or role not in ("right", "weight"):
        return None, None
    held = before_moves(read)
    if held.parameter is None:
        return None, None
    if role == "weight":
        if operator.name != "aten::convolution" or read.shape != held.shape:
            return None, None
        return held.parameter, Convolved(int(operator.args[8]), bool(operator.args[6]))
    if len(held.shape) != 2 or len(read.shape) != 2:
        return None, None
    if read.shape == held.shape[::-1] and read.stride == held.stride[::-1]:
        return held.parameter, Multiplied(-1, 0, held.shape[0])
    if read is held:
        return held.parameter, Multiplied(-2, 0, held.shape[1])
    return None, None


def exchanges(
    model: nn.Module, flow: Dataflow, weights: Iterable[str]
) -> tuple[list[Exchange], dict[str, Reason]]:
    """The exchanges that the inputs of weights allow, and why there is none for the others.

    Args:
        model: The model.
        flow: A run of it, without quantizers.
        weights: The names of the parameters, in the order of the run.

    Returns:
        The exchanges, in that order, and reasons by the names of parameters.
    """
    wanted = set(weights)
    parameters = dict(model.named_parameters())
    found: dict[frozenset[str], Exchange] = {}
    skipped: dict[str, Reason] = {}
    times = _times_used(flow)
    done: set[str] = set()
    for operator in flow.operators:
        name, layout = weight_of(operator)
        if name is None or layout is None or name not in wanted or name in done:
            continue
        done.add(name)
        closure = _Closure()
        try:
            x = operator.products[-1].operands[0][1]
            if x is None:
                raise _Impossible("is not known")
            closure.add(x)
            exchange = Exchange(
                ", ".join(closure.users),
                tuple(closure.made_by.values()),
                tuple(closure.used_by.values()),
                tuple(closure.values.values()),
                mixes=closure.mixes(parameters),
            )
            _check(exchange, parameters, times, wanted)
        except _Impossible as why:
            skipped[name] = NoExchange(str(why))
        else:
            found.setdefault(frozenset(exchange.parameters), exchange)
    skipped |= {name: NoData() for name in sorted(wanted - done)}
    return list(found.values()), skipped


def _check(
    exchange: Exchange, parameters: Mapping[str, Tensor], times: Mapping[str, int], wanted: set[str]
) -> None:
    if not exchange.made_by:
        raise _Impossible("is made by nothing that has channels")
    counts = {
        channels.count(parameters[channels.parameter].contiguous())
        for channels in (*exchange.made_by, *exchange.used_by)
    }
    if len(counts) > 1:
        raise _Impossible(f"has other numbers of channels where it is made and used ({sorted(counts)})")
    for name in exchange.parameters:
        if times.get(name, 0) > 1:
            raise _Impossible(f"comes from or goes to {name}, which is used {times[name]} times")
    for channels in exchange.used_by:
        if channels.parameter not in wanted:
            raise _Impossible(f"goes to {channels.parameter} as well, which cannot be tuned")


def _times_used(flow: Dataflow) -> dict[str, int]:
    """How often each parameter is used, but for moves of it."""
    times: dict[str, int] = {}
    for operator in flow.operators:
        if operator.quantizer is not None or traits(operator.name).moves:
            continue
        for value in operator.inputs:
            parameter = before_moves(value).parameter
            if parameter is not None:
                times[parameter] = times.get(parameter, 0) + 1
    return times
