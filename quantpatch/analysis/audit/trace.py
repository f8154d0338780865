"""Run a model once and note every product, where it ran, and which quantizers its operands came from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from quantpatch.analysis.audit.operations import PRESERVING, Product, products_of
from quantpatch.layers.base import QuantizedLayer, is_quantizer
from quantpatch.recipes.descriptor import Axis
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.class_swap import own_class
from quantpatch.torch_tools.forward import evaluating

__all__ = ["Operand", "Seen", "Trace", "recording", "trace"]


# Namespaces of operators that multiply nothing unseen: torch's own, ours, marks for the profiler, messages.
_LOOKED_INTO = frozenset({"aten", "prim", "prims", "quantpatch", "profiler", "c10d"})

# Roles that say nothing but the place in an operator.
_GENERIC = frozenset({"left", "right"})

# Operators that make a tensor to be filled: what is in it before is zeros or nothing.
_BLANK = frozenset(
    "aten::" + name
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like")
)


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
        opaque: Names of operators that are not torch's own, whose inside nobody can see.
        origin_of: The name of the quantizer that a tensor came out of, or None.
        calls: For each class of modules that ran a product with a float operand itself, such a module and
            the arguments that it was called with.
    """

    seen: list[Seen] = attrs.field(factory=list)
    reached: set[str] = attrs.field(factory=set)
    opaque: set[str] = attrs.field(factory=set)
    origin_of: Callable[[Tensor], str | None] = lambda tensor: None
    calls: dict[type, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=dict)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[nn.Module] = [model]
        self._lacking: set[nn.Module] = set()  # what is running and has multiplied something float
        self._origin = _Origins()
        self.trace = Trace(origin_of=self._origin.get)
        self._blank: Any = WeakTensorKeyDictionary()  # tensors to be filled, in which nothing is float yet
        self._parameters = dict(model.named_parameters())
        self._weights: Any = WeakTensorKeyDictionary()
        for name, parameter in self._parameters.items():
            self._weights[parameter] = name

    # --- which module is running -----------------------------------------------------------------

    def entered(self, module: nn.Module, args: Any) -> None:
        if not is_quantizer(module):
            self._stack.append(module)

    def left(self, module: Any, args: Any, *kwargs_and_output: Any) -> None:
        *kwargs, output = kwargs_and_output  # torch leaves the keywords out where forward raised
        if not is_quantizer(module):
            if len(self._stack) > 1:
                self._stack.pop()
            if module in self._lacking:
                self._lacking.remove(module)
                if kwargs:
                    self.trace.calls.setdefault(own_class(module), (module, args, kwargs[0]))
            return
        name = self._names.get(module, "a quantizer outside the model")
        self.trace.reached.add(name)
        if isinstance(output, Tensor) and module.quantizing and not module.disabled:
            self._origin.put(output, name)

    # --- what it runs ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Under inference_mode what is made of other operators, as attention is, comes here in one piece.
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        for product in products_of(name, args, result):
            self._note(name, product)
        namespace = name.partition("::")[0]
        if namespace not in _LOOKED_INTO:
            self.trace.opaque.add(name)
        out = tuple(value for key, value in (kwargs or {}).items() if key.startswith("out"))
        self._follow(name, args, result, tuple(t for t in out if isinstance(t, Tensor)))
        return result

    def _note(self, operator: str, product: Product) -> None:
        # The innermost module that has a name: wrappers made on the fly do not help the reader.
        layer = next((m for m in reversed(self._stack) if m in self._names), self._model)
        name, of_weight = self._names[layer], self._is_of_weight(layer, product)
        found = Seen(
            name, layer, operator, product.operation, product.macs, self._operands(product), of_weight
        )
        if not (found.quantized or of_weight or isinstance(layer, QuantizedLayer)):
            self._lacking.add(layer)
        self.trace.seen.append(attrs.evolve(found, operands=tuple(named_for(layer, name, found.operands))))

    def _operands(self, product: Product) -> tuple[Operand, ...]:
        found = []
        for (role, tensor), channel in zip(product.operands, product.channels, strict=True):
            quantizer = None if tensor is None else self._origin.get(tensor)
            operand = Operand(role, quantizer)
            name = None if tensor is None or quantizer is not None else self._weights.get(tensor)
            if tensor is not None and name is not None:
                operand = Operand(role, None, name, _axes_of(self._parameters[name], tensor, channel))
            found.append(operand)
        return tuple(found)

    def _is_of_weight(self, layer: nn.Module, product: Product) -> bool:
        if any(isinstance(module, ParametrizationList) for module in self._stack):
            return True
        # Spectral norm as a hook multiplies the weight by vectors; no layer that has it does.
        hooks = layer._forward_pre_hooks.values()
        return any(isinstance(hook, SpectralNorm) for hook in hooks) and any(
            tensor is not None and tensor.dim() == 1 for _, tensor in product.operands
        )

    def _follow(self, name: str, args: tuple[Any, ...], result: Any, out: tuple[Any, ...] = ()) -> None:
        """Passes the origin of an argument on to a result that holds the same values.

        Args:
            name: Name of the operator.
            args: Its arguments.
            result: What it returned.
            out: What it was told to write its result into.
        """
        plain = name.removesuffix("_")
        for written in out:
            self._origin.forget(written)
        if plain in _BLANK and isinstance(result, Tensor):
            self._blank[result] = True
        if not args:
            return
        if name == "aten::copy_":
            self._fill(args[0], args[1])
            return
        is_kept = plain in PRESERVING or (plain in ("aten::mul", "aten::div") and _is_number(args[1]))
        if plain != name and not is_kept and isinstance(args[0], Tensor):
            self._origin.forget(args[0])  # changed in place, it holds other values
        if name in ("aten::cat", "aten::stack"):
            origins = [self._origin.get(t) for t in args[0]]
            origin = origins[0] if origins and None not in origins else None
        elif is_kept:
            origin = self._origin.get(args[0]) if isinstance(args[0], Tensor) else None
            weight = self._weights.get(args[0]) if isinstance(args[0], Tensor) else None
            if weight is not None:
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        self._weights[tensor] = weight
        else:
            return
        if origin is not None:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self._origin.put(tensor, origin)

    def _fill(self, into: Tensor, source: Tensor) -> None:
        """A tensor, or part of one, is written over: padding around the edges is made so."""
        whole = into if into._base is None else into._base
        origin = self._origin.get(source)
        if origin is not None and (into is whole or self._blank.get(whole)):
            self._origin.put(whole, origin)
        else:
            self._origin.forget(into)
            self._blank.pop(whole, None)


class _Origins:
    """The quantizer that each tensor came out of; a tensor that is gone is forgotten."""

    def __init__(self) -> None:
        self._names: Any = WeakTensorKeyDictionary()
        # By the memory that they lie in, so that what is written over is found without a look at all others.
        self._lying_in: dict[int, list[TensorWeakRef]] = {}

    def get(self, tensor: Tensor) -> str | None:
        """The quantizer's name, or None."""
        name: str | None = self._names.get(tensor)
        return name

    def put(self, tensor: Tensor, name: str) -> None:
        """A tensor holds what came out of a quantizer."""
        self._names[tensor] = name
        self._lying_in.setdefault(_memory(tensor), []).append(TensorWeakRef(tensor))

    def forget(self, changed: Tensor) -> None:
        """What a tensor holds is new: in what it is a view of, and in the other views of that, as well."""
        memory = _memory(changed)
        self._names.pop(changed, None)
        for reference in self._lying_in.pop(memory, ()):
            tensor = reference()
            # Memory of what is gone is given to others, and a tensor can be given other memory.
            if tensor is not None and _memory(tensor) == memory:
                self._names.pop(tensor, None)


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
    inputs = layer.inputs if isinstance(layer, QuantizedLayer) else ()
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


def _axes_of(parameter: Tensor, view: Tensor, channel: int | None) -> Axis:
    """The axes of a parameter that are the output channels of what is a view of it."""
    if channel is None or not -view.dim() <= channel < view.dim():
        return None
    wanted = [channel % view.dim()]
    if channel < 0 and view.dim() == 3:
        wanted.insert(0, 0)  # of three axes of a batched product the first counts experts
    own = list(zip(parameter.shape, parameter.stride(), strict=True))
    found: set[int] = set()
    for axis in wanted:
        like = (view.shape[axis], view.stride(axis))
        if axis < len(own) and own[axis] == like:
            found.add(axis)
        elif like in own:
            found.add(own.index(like))
    return found.pop() if len(found) == 1 else tuple(sorted(found)) or None


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views; ``_base`` is not known under inference_mode."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse one, for instance, has no storage
        return id(tensor)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Trace]:
    """A block in which everything that runs is noted as the model's.

    Hooks are put on all modules of the process, not on the model's own: torch's fast paths look whether
    a module has hooks, and would not be taken.
    """
    recorder = _Recorder(model)
    entered = register_module_forward_pre_hook(recorder.entered)
    left = register_module_forward_hook(recorder.left, with_kwargs=True, always_call=True)
    try:
        with recorder:
            yield recorder.trace
    finally:
        entered.remove()
        left.remove()
        # torch forgets this one, and would take it for a hook of every module ever after.
        torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(left.id, None)


def trace(model: nn.Module, run: Callable[[], Any]) -> Trace:
    """Runs ``run`` with the model in eval mode, without gradients, and notes what it computes."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]), recording(model) as found:
        run()
    return found
