"""What a model computes, as a graph: which values go where, through which quantizers, out of which modules.

The model runs once, as it is, and every operator is noted: code that depends on its data is followed where
the data leads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.torch_tools.forward import evaluating

__all__ = ["BATCHNORM", "Dataflow", "Operator", "Value", "dataflow"]

#: Operators that normalize a batch.
BATCHNORM = frozenset(
    f"aten::{name}"
    for name in (
        "batch_norm",
        "cudnn_batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
    )
)


@attrs.define(eq=False)
class Value:
    """A tensor.

    Attributes:
        maker: The operator it comes from; None for inputs and parameters.
        uses: The operators it goes into.
        outputs_of: Names of the modules whose output it is, the innermost first.
        is_parameter: Whether it is a parameter or a buffer of the model.
        is_result: Whether the model returns it.
    """

    maker: Operator | None = None
    uses: list[Operator] = attrs.field(factory=list)
    outputs_of: list[str] = attrs.field(factory=list)
    is_parameter: bool = False
    is_result: bool = False


@attrs.frozen(eq=False)
class Operator:
    """An operator that ran; a quantizer counts as one.

    Attributes:
        name: Such as ``"aten::convolution"``; ``"quantizer"`` for a quantizer.
        module: Name of the innermost module that ran it.
        inputs: The tensors among its arguments.
        outputs: What it gave.
        args: Its arguments, tensors left out (None).
        quantizer: The quantizer, for one.
    """

    name: str
    module: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    args: tuple[Any, ...] = ()
    quantizer: TensorQuantizer | None = None


@attrs.define
class Dataflow:
    """The graph.

    Attributes:
        operators: In the order they ran.
        calls: How often each module ran, by name.
    """

    operators: list[Operator] = attrs.field(factory=list)
    calls: Counter[str] = attrs.field(factory=Counter)

    def named(self, *names: str) -> Iterator[Operator]:
        """The operators of these names (``"add"``), in-place ones (``"add_"``) too."""
        wanted = {f"aten::{name}{end}" for name in names for end in ("", "_")}
        return (operator for operator in self.operators if operator.name in wanted)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Dataflow()
        self._values: Any = WeakTensorKeyDictionary()
        self._alive: list[Tensor] = []  # so that no tensor takes another's place
        self._stack = [""]
        self._silent = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.of(tensor).is_parameter = True

    def of(self, tensor: Tensor) -> Value:
        """The value of a tensor."""
        value: Value | None = self._values.get(tensor)
        return self._new(tensor, Value()) if value is None else value

    def _new(self, tensor: Tensor, value: Value) -> Value:
        self._values[tensor] = value
        self._alive.append(tensor)
        return value

    def note(self, name: str, inputs: Any, results: Any, **more: Any) -> None:
        """An operator that ran."""
        given = tuple(self.of(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
        made = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
        outputs = tuple(Value() for _ in made)
        operator = Operator(name, self._stack[-1], given, outputs, **more)
        for value in dict.fromkeys(given):
            value.uses.append(operator)
        for tensor, value in zip(made, outputs, strict=True):
            value.maker = operator
            self._new(tensor, value)  # of an operator in place, the tensor's value from now on
        self.flow.operators.append(operator)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._silent:
            rest = tuple(None if isinstance(x, Tensor) else x for x in args)
            self.note(func._schema.name, (args, kwargs or {}), result, args=rest)
        return result

    # --- modules -----------------------------------------------------------------------------------

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks on a module that tell what it gives."""
        if isinstance(module, TensorQuantizer):
            return [
                module.register_forward_pre_hook(self._entering_quantizer),
                module.register_forward_hook(self._leaving_quantizer, always_call=True),
            ]

        def entering(module: nn.Module, args: Any) -> None:
            self._stack.append(name)
            self.flow.calls[name] += 1

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            if isinstance(output, Tensor):
                self.of(output).outputs_of.append(name)

        return [
            module.register_forward_pre_hook(entering),
            module.register_forward_hook(leaving, always_call=True),
        ]

    def _entering_quantizer(self, module: nn.Module, args: Any) -> None:
        self._silent += 1

    def _leaving_quantizer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._silent -= 1
        if isinstance(output, Tensor) and output is not args[0]:
            self.note("quantizer", args[0], output, quantizer=module)


def dataflow(model: nn.Module, run: Callable[[], Any]) -> Dataflow:
    """Runs ``run`` with the model in eval mode and without gradients, and gives what it computed."""
    recorder = _Recorder(model)
    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles += recorder.hooks(name, module)
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]), recorder:
            results = run()
    finally:
        for handle in handles:
            handle.remove()
    for tensor in pytree.tree_leaves(results if not isinstance(results, Mapping) else dict(results)):
        if isinstance(tensor, Tensor):
            recorder.of(tensor).is_result = True
    return recorder.flow
