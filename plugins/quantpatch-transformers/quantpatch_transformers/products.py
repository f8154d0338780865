"""Products that a forward computes with functions, quantized without a copy of that forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["QuantizedProducts"]

_MATMULS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__})
_PRODUCTS = _MATMULS | {F.linear, F.conv1d}

Quantize = Callable[[Tensor], Tensor]


class QuantizedProducts(TorchFunctionMode):
    """A block in which what some weights are multiplied with is quantized.

    A weight is known by being itself: whatever is made of it with torch's functions, such as one expert's
    slice or a transposed view, is still that weight.

    Args:
        activations: What quantizes the left and the right operand of a matrix product that has none of the
            weights in it; None leaves them as they are.
    """

    def __init__(self, activations: tuple[Quantize | None, Quantize | None] = (None, None)) -> None:
        super().__init__()
        self._activations = activations
        self._partners: dict[int, tuple[Tensor, Quantize | None]] = {}

    def partner(self, weight: Tensor, quantize: Quantize | None) -> None:
        """Makes a weight, as the forward sees it, known, with what quantizes its partner in a product."""
        self._partners[id(weight)] = (weight, quantize)  # kept, so that no other tensor gets its id

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return func(*self._quantized(func, args, kwargs), **kwargs)
        result = func(*args, **kwargs)
        known = self._partners.get(id(args[0])) if args else None
        if known is not None and isinstance(result, Tensor):
            self.partner(result, known[1])
        return result

    def _quantized(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        left, right = args[0], args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
        quantizers: tuple[Quantize | None, Quantize | None]
        if id(right) in self._partners:
            quantizers = (self._partners[id(right)][1], None)
        elif id(left) in self._partners:
            quantizers = (None, self._partners[id(left)][1])
        elif func in _MATMULS:
            quantizers = self._activations
        else:
            quantizers = (None, None)
        operands = [
            x if quantize is None else quantize(x) for x, quantize in zip(args, quantizers, strict=False)
        ]
        return (*operands, *args[2:])
