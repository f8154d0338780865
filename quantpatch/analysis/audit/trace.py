"""Run a model once and note every product, where it ran, and which quantizers its operands came from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from quantpatch.dataflow import Operator, Product, Recorder, Value, recording, traits
from quantpatch.layers.base import QuantizedLayer
from quantpatch.recipes.descriptor import Axis
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import evaluating

# Namespaces of operators that multiply nothing unseen: torch's own, ours, marks for the profiler, messages.
_LOOKED_INTO = frozenset({"aten", "prim", "prims", "quantpatch", "profiler", "c10d"})

# Roles that say nothing but the place in an operator.
_GENERIC = frozenset({"left", "right"})

# Operators that make a tensor to be filled: what is in it before is zeros or nothing.
_BLANK = frozenset(
    "aten::" + name
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like")
)
# Operators that fill one with a number.
_FILLING = frozenset({"aten::zero_", "aten::fill_"})


@attrs.frozen
class Operand:
    """One of the things that a product multiplies.

    Attributes:
        role: What it is: the name that its layer has for it, such as ``"input"`` or ``"weight"``, or the
            operator's, such as ``"left"``.
        quantizer: The name of the quantizer it came out of, or None.
        parameter: Qualified name of the parameter whose values it holds, or None.
        channels: Of a parameter the axes of its output channels, or None.
    """

    role: str
    quantizer: str | None
    parameter: str | None = None
    channels: Axis = None


@attrs.frozen
class Seen:
    """A product that ran.

    Attributes:
        module: Qualified name of the innermost module whose forward was running.
        layer: That module.
        operator: Name of the operator, such as ``"aten::addmm"``.
        operation: What it is, for people.
        macs: Multiply-accumulates.
        operands: What was multiplied.
        of_weight: Whether it is a step in the making of a weight, by a parametrization or a hook such as
            spectral norm's: the same for every input.
    """

    module: str
    layer: nn.Module
    operator: str
    operation: str
    macs: int
    operands: tuple[Operand, ...]
    of_weight: bool

    @property
    def quantized(self) -> bool:
        """Whether every operand came out of a quantizer."""
        return all(operand.quantizer is not None for operand in self.operands)


@attrs.define
class Trace:
    """What was noted.

    Attributes:
        seen: Every product, in order.
        reached: Names of the quantizers that a tensor passed through.
        opaque: Names of operators that are not torch's own, whose inside cannot be seen.
        elsewhere: Names of modules that ran in other threads, where nothing is noted.
        origin_of: The name of the quantizer that a tensor came out of, or None.
    """

    seen: list[Seen] = attrs.field(factory=list)
    reached: set[str] = attrs.field(factory=set)
    opaque: set[str] = attrs.field(factory=set)
    elsewhere: set[str] = attrs.field(factory=set)
    origin_of: Callable[[Tensor], str | None] = lambda tensor: None


class _TraceBuilder:
    """Makes a ``Trace`` of what a recorder notes, operator by operator."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder
        self._names = {module: name for name, module in model.named_modules()}
        self._origins = _Origins(self._names)
        self._done = 0
        self.trace = Trace(origin_of=self._origin_of)

    def catch_up(self) -> None:
        """Looks at all operators that were noted since the last time."""
        flow = self._recorder.flow
        for operator in flow.operators[self._done :]:
            for product in operator.products:
                self._see(operator, product)
            if operator.quantizer is None and operator.name.partition("::")[0] not in _LOOKED_INTO:
                self.trace.opaque.add(operator.name)
            self._origins.note(operator)
        self._done = len(flow.operators)

    def finish(self) -> None:
        """Notes what is known only when all has run."""
        self.catch_up()
        self.trace.reached.update(map(self._origins.name_of, self._recorder.flow.quantized))
        self.trace.elsewhere.update(self._recorder.flow.elsewhere)

    def _origin_of(self, tensor: Tensor) -> str | None:
        self.catch_up()
        return self._origins.quantizer(self._recorder.of(tensor))

    def _see(self, operator: Operator, product: Product[Value]) -> None:
        # The innermost module that has a name: wrappers made on the fly do not help the reader.
        layer = next((m for m in reversed(operator.stack) if m in self._names), self._model)
        of_weight = _is_of_weight(operator, layer, product)
        operands = tuple(
            self._origins.operand(role, value, channel)
            for (role, value), channel in zip(product.operands, product.channels, strict=True)
        )
        found = Seen(
            operator.module, layer, operator.name, product.operation, product.macs, operands, of_weight
        )
        named = tuple(named_for(layer, operator.module, operands))
        self.trace.seen.append(attrs.evolve(found, operands=named))


def _is_of_weight(operator: Operator, layer: nn.Module, product: Product[Value]) -> bool:
    if any(isinstance(module, ParametrizationList) for module in operator.stack):
        return True
    # Spectral norm as a hook multiplies the weight by vectors; no layer that has it does.
    hooks = layer._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm) for hook in hooks) and any(
        value is not None and len(value.shape) == 1 for _, value in product.operands
    )


class _Origins:
    """The quantizer that each value came out of, and the parameter that it holds, if there is one.

    Args:
        names: The names of the model's modules.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._quantizers: dict[Value, str] = {}
        self._parameters: dict[Value, Value] = {}
        self._blank: set[Value] = set()  # tensors to be filled, in which nothing is float yet

    def name_of(self, quantizer: nn.Module) -> str:
        """The name of a quantizer."""
        return self._names.get(quantizer, "a quantizer outside the model")

    def quantizer(self, value: Value) -> str | None:
        """The name of the quantizer that a value came out of."""
        return self._quantizers.get(value)

    def operand(self, role: str, value: Value | None, channel: int | None) -> Operand:
        """What is known of a value that is multiplied."""
        quantizer = None if value is None else self.quantizer(value)
        parameter = None if value is None or quantizer is not None else self._parameter(value)
        if value is None or parameter is None:
            return Operand(role, quantizer)
        return Operand(role, None, parameter.parameter, _axes_of(parameter, value, channel))

    def _parameter(self, value: Value) -> Value | None:
        return value if value.parameter is not None else self._parameters.get(value)

    def note(self, operator: Operator) -> None:
        """Passes the origin of an argument on to a result that holds the same values."""
        plain = operator.name.removesuffix("_")
        source = operator.inputs[0] if operator.inputs else None
        if operator.quantizer is not None:
            self._put(operator.outputs, self.name_of(operator.quantizer))
        elif operator.name == "aten::copy_":
            self._fill(operator)
        elif plain in _BLANK:
            self._blank.update(operator.outputs)
        elif operator.name in _FILLING:
            self._blank.update(value for value in operator.outputs if source in self._blank)
            self._blank.update(after for before, after in operator.written if before in self._blank)
        elif operator.name in ("aten::cat", "aten::stack"):
            origins = [self.quantizer(value) for value in operator.inputs]
            self._put(operator.outputs, None if None in origins or not origins else origins[0])
        elif source is not None and (traits(operator.name).keeps_grid or _is_scaled(plain, operator)):
            self._put(operator.outputs, self.quantizer(source))
            parameter = self._parameter(source)
            if parameter is not None:
                self._parameters.update(dict.fromkeys(operator.outputs, parameter))
            if plain != operator.name:  # in place, of a part perhaps: what was around it is as it was
                for before, after in operator.written:
                    self._put((after,), self.quantizer(before))

    def _put(self, values: Iterable[Value], quantizer: str | None) -> None:
        if quantizer is not None:
            self._quantizers.update({v: quantizer for v in values if v.is_floating_point})

    def _fill(self, operator: Operator) -> None:
        """A tensor, or part of one, is written over: padding around the edges is made so."""
        quantizer = self.quantizer(operator.inputs[1])
        self._put(operator.outputs, quantizer)
        for before, after in operator.written:
            if quantizer is not None and before in self._blank:
                self._put((after,), quantizer)
                self._blank.add(after)


def _is_scaled(plain: str, operator: Operator) -> bool:
    """Whether an operator multiplies all values by one number."""
    if plain not in ("aten::mul", "aten::div"):
        return False
    return len(operator.inputs) < 2 or operator.inputs[1].shape == ()


def named_for(layer: nn.Module, module: str, operands: tuple[Operand, ...]) -> Iterator[Operand]:
    """A product's operands by the names that its layer has for them.

    Args:
        layer: The layer.
        module: Its qualified name.
        operands: The operands as the operator calls them.
    """
    roles = [_own_role(module, operand) for operand in operands]
    pairs = list(zip(roles, operands, strict=True))
    weights = (role for role, o in pairs if role is not None and (o.parameter or role.startswith("weight")))
    weight = next(weights, None)
    inputs = type(layer).inputs if isinstance(layer, QuantizedLayer) else ()
    of_weight = inputs[0] if len(inputs) == 1 else "input"
    if isinstance(layer, nn.RNNBase) and weight is not None and not weight.startswith("weight_ih_l0"):
        of_step = weight.removesuffix("_reverse").partition("weight_ih_")[2]
        of_weight = f"input_{of_step}" if of_step else "hidden"
    for role, operand in pairs:
        if role is None:
            role = of_weight if weight is not None and operand.role in _GENERIC else operand.role
        yield attrs.evolve(operand, role=role)


def _own_role(module: str, operand: Operand) -> str | None:
    """What the quantizer's name, or the parameter's, says of an operand."""
    if operand.quantizer is not None:
        holder, _, own = operand.quantizer.rpartition(".")
        return own.removesuffix("_quantizer") if holder == module and own.endswith("_quantizer") else None
    if operand.parameter is not None and operand.role in _GENERIC:
        return operand.parameter.rpartition(".")[2]
    return operand.role if operand.role.startswith("weight") else None


def _axes_of(parameter: Value, view: Value, channel: int | None) -> Axis:
    """The axes of a parameter that are the output channels of what is a view of it."""
    dims = len(view.shape)
    if channel is None or not -dims <= channel < dims or not view.stride:
        return None
    wanted = [channel % dims]
    if channel < 0 and dims == 3:
        wanted.insert(0, 0)  # of three axes of a batched product the first counts experts
    own = list(zip(parameter.shape, parameter.stride, strict=True))
    found: set[int] = set()
    for axis in wanted:
        like = (view.shape[axis], view.stride[axis])
        if axis < len(own) and own[axis] == like:
            found.add(axis)
        elif like in own:
            found.add(own.index(like))
    return found.pop() if len(found) == 1 else tuple(sorted(found)) or None


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[Trace]:
    """A block in which everything that runs is noted as the model's."""
    with recording(model) as recorder:
        tracer = _TraceBuilder(model, recorder)
        try:
            yield tracer.trace
        finally:
            tracer.finish()


def trace(model: nn.Module, run: Callable[[], Any]) -> Trace:
    """Runs ``run`` with the model in eval mode, without gradients, and notes what it computes."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]), tracing(model) as found:
        run()
    return found
