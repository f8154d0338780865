"""Experts of mixture-of-experts blocks: many linear layers, whose weights lie in one parameter.

transformers' classes for them have no base in common but a contract, that of its registry of experts
functions (``@use_experts_implementation``): weights ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of
shape (experts, out, in) or, where ``is_transposed``, (experts, in, out), and an activation in between.
``QuantizedExperts`` keeps to that contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from quantpatch.layers import QuantizedLayer, TensorQuantizer, call_with
from quantpatch.recipes import Axis, QuantDescriptor, Recipe
from quantpatch_transformers.lazy_classes import classes_of
from quantpatch_transformers_entries import EXPERTS

__all__ = ["QuantizedExperts"]


class QuantizedExperts(QuantizedLayer):
    """Mixin for a class of experts, with the operands of both its products quantized.

    These are ``input`` and ``gate_up_proj`` (or ``up_proj``), ``down_proj_input`` and ``down_proj``. Each
    output channel of each expert has a range of its own; an activation has one for all experts, since the
    router may send any token anywhere. The products are computed the way that the model's
    ``experts_implementation`` says, with its fused kernels as ``"grouped_mm"``.

    For experts that this package does not know::

        class QuantMyExperts(QuantizedExperts, MyExperts):
            pass
    """

    inputs = ("input",)

    # What the contract leaves to each class, where it is not said otherwise.
    has_gate: bool = True
    is_transposed: bool = False

    _routing: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "float_class"):
            parameters = inspect.signature(cls.float_class.forward).parameters
            cls._routing = tuple(parameters)[2:]  # after self and the hidden states

    def weight_axes(self) -> Mapping[str, Axis]:
        """Both weights, each with its experts and its output channels."""
        axes = (0, 2) if self.is_transposed else (0, 1)
        return {"gate_up_proj" if self.has_gate else "up_proj": axes, "down_proj": axes}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """The input, the weights, and the activation between the two products."""
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            yield "down_proj_input", recipe.input.for_axes(None, self.feature_axis)

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Any:
        """The experts' output, as of the float class, for as many tokens as there are.

        Args:
            hidden_states: The tokens, of shape (tokens, features).
            *routing: Which experts each token goes to and with which weights: (tokens, choices) each.
            **named: The same by name.
        """
        if not any(quantizer.is_active for quantizer in self.quantizers().values()):
            output = self.run_float({}, (hidden_states, *routing), named)
        else:
            quantizer = self.quantizer("input")
            hidden_states = hidden_states if quantizer is None else quantizer(hidden_states)
            output = self.multiply(hidden_states, routing, named)
        return self.quantize_output(output)

    def multiply(self, hidden_states: Tensor, routing: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Runs the experts on tokens that are quantized already."""
        own: Any = self
        weights = self.quantize_weights()
        inner = self.quantizer("down_proj_input")
        name = own.config._experts_implementation if self._is_registered else None
        if name in (None, "eager"):
            partner = _Partner(weights.get("down_proj", own.down_proj), inner)
            with partner if inner is not None else nullcontext():
                return self.run_float(weights, (hidden_states, *routing), named)
        ordered = (*routing, *(named[name] for name in self._routing[len(routing) :] if name in named))
        run = batched_mm_experts_forward if name == "batched_mm" else grouped_mm_experts_forward
        return call_with({**weights, **self._activation(inner)}, run, self, hidden_states, *ordered)

    @property
    def _is_registered(self) -> bool:
        """Whether transformers' registry of experts functions computes it."""
        return "is_transposed" in vars(self)

    def _activation(self, inner: TensorQuantizer | None) -> dict[str, Any]:
        """What the functions of the registry call between the two products, with its result quantized."""
        if inner is None:
            return {}
        name = "_apply_gate" if self.has_gate else "act_fn"
        compute = getattr(self, name)
        return {name: lambda x: inner(compute(x))}


class _Partner(TorchFunctionMode):
    """A block in which what a weight is multiplied with is quantized.

    The weight is known by being itself: whatever is made of it with torch's functions, such as one expert's
    slice or a transposed view, is still that weight.
    """

    _PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, F.linear})

    def __init__(self, weight: Tensor, quantize: Any) -> None:
        super().__init__()
        self._quantize = quantize
        self._made_of_it = {id(weight): weight}  # kept, so that no other tensor gets an id

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._PRODUCTS:
            left, right = args[0], args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            if id(right) in self._made_of_it:
                args = (self._quantize(left), *args[1:])
            elif id(left) in self._made_of_it:
                args = (left, self._quantize(right), *args[2:])
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if args and id(args[0]) in self._made_of_it and isinstance(result, Tensor):
            self._made_of_it[id(result)] = result
        return result


__getattr__, __dir__ = classes_of(globals(), {QuantizedExperts: EXPERTS})
