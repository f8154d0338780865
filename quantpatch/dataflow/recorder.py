"""What a model computes, as a graph: which values go where, through which quantizers, out of which modules.

The model runs once, as it is, and every operator that reaches the dispatcher is noted, below autograd and
below every Python function: fast paths are seen, and code that depends on its data is followed where the data
leads. No tensor is kept alive by that.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from quantpatch.dataflow.flow import Dataflow, Operator, Value
from quantpatch.dataflow.macs import Product, products_of
from quantpatch.layers.base import is_quantizer
from quantpatch.torch_tools.forward import evaluating

#: What gets a module that has run, its arguments and its keywords.


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what runs as a model's; ``recording`` is the block that it does so in.

    Args:
        model: The model.

    Attributes:
        flow: What was noted so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Dataflow()
        self._thread = threading.get_ident()
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: tuple[nn.Module, ...] = (model,)
        self._inside_quantizer = 0
        self._values: Any = WeakTensorKeyDictionary()
        # By the memory that they lie in, so that what is written over is found without a look at all others.
        self._lying_in: dict[int, list[TensorWeakRef]] = {}
        for name, parameter in model.named_parameters():
            value = self.of(parameter)
            value.parameter, value.is_constant = name, True
        for buffer in model.buffers():
            self.of(buffer).is_constant = True

    def of(self, tensor: Tensor) -> Value:
        """What a tensor holds now."""
        value: Value | None = self._values.get(tensor)
        return self._put(tensor, None) if value is None else value

    def _put(self, tensor: Tensor, maker: Operator | None) -> Value:
        """A tensor holds something new."""
        before: Value | None = self._values.get(tensor)
        strided = tensor.layout == torch.strided
        value = Value(
            tuple(tensor.shape),
            tuple(tensor.stride()) if strided else (),
            tensor.is_floating_point(),
            maker,
        )
        if before is None:
            self._lying_in.setdefault(_memory(tensor), []).append(TensorWeakRef(tensor))
        else:
            value.parameter, value.is_constant = before.parameter, before.is_constant
        self._values[tensor] = value
        return value

    # --- which module is running -----------------------------------------------------------------

    def entered(self, module: nn.Module, args: Any) -> None:
        """The hook before a module's forward."""
        if threading.get_ident() != self._thread:
            if module in self._names:
                self.flow.elsewhere.add(self._names[module])
            return
        if is_quantizer(module):
            if args and isinstance(args[0], Tensor):
                self.flow.quantized.setdefault(module, []).append(self.of(args[0]))
            self._inside_quantizer += 1
        else:
            self._stack = (*self._stack, module)
        if module in self._names:
            self.flow.calls[self._names[module]] += 1

    def left(self, module: Any, args: Any, *kwargs_and_output: Any) -> None:
        """The hook behind it."""
        if threading.get_ident() != self._thread:
            return
        output = kwargs_and_output[-1]  # torch leaves the keywords out where forward raised
        if is_quantizer(module):
            self._inside_quantizer -= 1
            quantizes = module.quantizing and not module.disabled
            if quantizes and not self._inside_quantizer and args and isinstance(output, Tensor):
                self._note("quantizer", args[:1], {}, output, quantizer=module)
            return
        if len(self._stack) > 1:
            self._stack = self._stack[:-1]
        if isinstance(output, Tensor) and module in self._names:
            self.of(output).outputs_of.append(self._names[module])

    # --- what it runs ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside_quantizer:
            return func(*args, **kwargs)
        # Under inference_mode what is made of other operators, as attention is, comes here in one piece.
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        schema = func._schema
        written = list(_written(schema, args, kwargs)) if schema.is_mutable else ()
        self._note(schema.name, args, kwargs, result, written=written)
        return result

    def _note(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        *,
        written: Sequence[Tensor] = (),
        quantizer: Any = None,
    ) -> None:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = {id(x): self.of(x) for x in tensors}
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        changed = self._sharing(written, made)
        module = next((m for m in reversed(self._stack) if m in self._names), self._stack[0])
        operator = Operator(
            name,
            self._names[module],
            self._stack,
            tuple(given[id(x)] for x in tensors),
            args=tuple(_but_for_tensors(x) for x in args),
            kwargs={key: x for key, x in kwargs.items() if _but_for_tensors(x) is not None},
            products=tuple(_of_values(product, given) for product in products_of(name, args, result)),
            quantizer=quantizer,
        )
        for value in given.values():
            value.uses.append(operator)
        before = [self.of(tensor) for tensor in changed]
        # Of an operator in place, the tensor's value from now on.
        operator.outputs = tuple(self._put(tensor, operator) for tensor in made)
        operator.written = tuple(zip(before, (self._put(t, operator) for t in changed), strict=True))
        self.flow.operators.append(operator)

    def _sharing(self, written: Sequence[Tensor], made: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that lie in memory that was written to, but for results."""
        found: dict[int, Tensor] = {}
        known = {id(tensor) for tensor in made}
        for memory in {_memory(tensor) for tensor in written}:
            alive = []
            for reference in self._lying_in.get(memory, ()):
                tensor = reference()
                # Memory of what is gone is given to others, and a tensor can be given other memory.
                if tensor is not None and _memory(tensor) == memory:
                    alive.append(reference)
                    if id(tensor) not in known:
                        found[id(tensor)] = tensor
            self._lying_in[memory] = alive
        return list(found.values())


@functools.cache
def _is_composite(operator: Any) -> bool:
    """Whether an operator is made of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key))


def _of_values(product: Product[Tensor], values: Mapping[int, Value]) -> Product[Value]:
    operands = tuple((role, None if x is None else values[id(x)]) for role, x in product.operands)
    return Product(product.operation, product.macs, operands, product.channels)


def _but_for_tensors(x: Any) -> Any:
    holds = isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x))
    return None if holds else x


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            x = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views; ``_base`` is not known under inference_mode."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse one, for instance, has no storage
        return id(tensor)


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """A block in which everything that runs in this thread is noted as a model's.

    Hooks are put on all modules of the process, not on the model's own: torch's fast paths look whether
    a module has hooks, and would not be taken.

    Args:
        model: The model.
    """
    recorder = Recorder(model)
    entered = register_module_forward_pre_hook(recorder.entered)
    left = register_module_forward_hook(recorder.left, with_kwargs=True, always_call=True)
    try:
        with recorder:
            yield recorder
    finally:
        entered.remove()
        left.remove()
        # torch forgets this one, and would take it for a hook of every module ever after.
        nn.modules.module._global_forward_hooks_with_kwargs.pop(left.id, None)


def dataflow(model: nn.Module, run: Callable[[], Any]) -> Dataflow:
    """Runs ``run`` with the model in eval mode and without gradients, and gives what it computed."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]), recording(model) as recorder:
        results = run()
    for tensor in pytree.tree_leaves(results if not isinstance(results, Mapping) else dict(results)):
        if isinstance(tensor, Tensor):
            recorder.of(tensor).is_result = True
    return recorder.flow
