"""``QuantizeLinear`` and ``DequantizeLinear`` in exported graphs, for both exporters of ``torch.onnx``.

While the TorchScript exporter traces, the two operators come from the ``symbolic`` of an autograd function;
under ``torch.export``, which the other exporter builds on, from ``torch.onnx.ops.symbolic``. Scales are
constants of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from pytorch_quantization.tensor_quant import Axis, NumBits, bound_of, fake_tensor_quant, scaled_e4m3

__all__ = ["Grid", "exporting", "quantize_dequantize"]

_JitScalarType: Any = torch.onnx.JitScalarType  # type: ignore[attr-defined]
_FP8_OPERATORS = ("trt::TRT_FP8QuantizeLinear", "trt::TRT_FP8DequantizeLinear")


@attrs.frozen
class Grid:
    """What a quantizer rounds to.

    Attributes:
        amax: The range.
        num_bits: As of a descriptor.
        axis: As of a descriptor.
        unsigned: As of a descriptor.
        narrow_range: As of a descriptor.
    """

    amax: Tensor
    num_bits: NumBits
    axis: Axis
    unsigned: bool
    narrow_range: bool

    def check(self, who: str) -> None:
        """Raises if ONNX has no operators for it.

        Raises:
            RuntimeError: The number of bits is not 8, or ranges are kept along several axes.
        """
        with _untraced():  # what a range looks like is not part of the graph
            shape = tuple(self.amax.shape)
        if isinstance(self.num_bits, tuple):
            if math.prod(shape) != 1:
                raise RuntimeError(f"{who} cannot be exported: FP8 is exported with one range per tensor")
        elif self.num_bits != 8:
            raise RuntimeError(f"{who} cannot be exported: it has {self.num_bits} bits, and ONNX takes 8")
        if sum(n > 1 for n in shape) > 1:
            raise RuntimeError(f"{who} cannot be exported: ONNX takes ranges along one axis only")

    def kept_axis(self, dim: int) -> int | None:
        """The axis of the ranges in a tensor of ``dim`` axes; None if there is one range."""
        axis = self.axis if isinstance(self.axis, int) else None
        if self.amax.numel() == 1 and axis is None:
            return None
        if axis is None:
            axis = next(d for d, n in enumerate(self.amax.shape) if n > 1)
        return axis % dim if self.amax.dim() else None

    def scale(self, axis: int | None) -> Tensor:
        """The step between neighbours, 0-dim or along an axis 1-dim; 1 where the range is 0."""
        amax = self.amax.detach().float()
        scale = amax / bound_of(self.num_bits, self.unsigned)
        return scale.masked_fill(scale == 0, 1.0).reshape(() if axis is None else -1)

    def lowest(self, scale: Tensor, axis: int | None, dim: int) -> Tensor:
        """The low end of a narrow range, to be broadcast to ``dim`` axes."""
        lowest = scale * -bound_of(self.num_bits)
        return lowest if axis is None else lowest.reshape([-1 if d == axis else 1 for d in range(dim)])

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the operators stand for."""
        if isinstance(self.num_bits, tuple):
            return scaled_e4m3(x, self.amax, *self.num_bits)
        return fake_tensor_quant(x, self.amax, self.num_bits, self.unsigned, self.narrow_range)


def quantize_dequantize(x: Tensor, grid: Grid) -> Tensor:
    """Fake quantization that an exporter turns into the two operators."""
    if torch._C._get_tracing_state() is not None:
        with _untraced():
            fixed = attrs.evolve(grid, amax=grid.amax.detach().clone())
        result: Tensor = _Traced.apply(x, fixed)  # type: ignore[no-untyped-call]
        return result
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return _exported(x, grid)
    return grid.fake_quantize(x)


# --- TorchScript -----------------------------------------------------------------------------------


@contextmanager
def _untraced() -> Iterator[None]:
    """What is computed here does not go into the graph, if one is being traced."""
    state: Any = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        return grid.fake_quantize(x)

    @staticmethod
    def symbolic(g: Any, x: Any, grid: Grid) -> Any:
        dtype, of_input = _JitScalarType.from_value(x, _JitScalarType.FLOAT), x.type()
        axis = grid.kept_axis(of_input.dim() or 0)
        scale_value = grid.scale(axis).cpu()
        scale = g.op("Constant", value_t=scale_value)
        if dtype != _JitScalarType.FLOAT:
            x = g.op("Cast", x, to_i=_JitScalarType.FLOAT.onnx_type())
        if isinstance(grid.num_bits, tuple):
            for operator in _FP8_OPERATORS:
                x = g.op(operator, x, scale)
        else:
            if grid.narrow_range and not grid.unsigned:
                # Integers of ONNX go down to -128; a range below the smallest value would show it.
                lowest = grid.lowest(scale_value, axis, of_input.dim() or 0)
                x = g.op("Max", x, g.op("Constant", value_t=lowest))
            integer = torch.uint8 if grid.unsigned else torch.int8
            zero = g.op("Constant", value_t=torch.zeros_like(scale_value, dtype=integer))
            attributes = {} if axis is None else {"axis_i": axis}
            for operator in ("QuantizeLinear", "DequantizeLinear"):
                x = g.op(operator, x, scale, zero, **attributes)
        if dtype != _JitScalarType.FLOAT:
            x = g.op("Cast", x, to_i=dtype.onnx_type())
        return x.setType(of_input)


# --- torch.export ----------------------------------------------------------------------------------


def _exported(x: Tensor, grid: Grid) -> Tensor:
    dtype = x.dtype
    axis = grid.kept_axis(x.dim())
    scale = grid.scale(axis)
    x = x.float()
    if isinstance(grid.num_bits, tuple):
        quantize, dequantize = _FP8_OPERATORS
        codes = _operator(quantize, [x, scale], {}, torch.float8_e4m3fn, x.shape)
        return _operator(dequantize, [codes, scale], {}, torch.float32, x.shape).to(dtype)
    if grid.narrow_range and not grid.unsigned:
        x = torch.maximum(x, grid.lowest(scale, axis, x.dim()))
    integer = torch.uint8 if grid.unsigned else torch.int8
    zero = torch.zeros_like(scale, dtype=integer)
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    codes = _operator("QuantizeLinear", [x, scale, zero], attributes, integer, x.shape)
    return _operator("DequantizeLinear", [codes, scale, zero], attributes, torch.float32, x.shape).to(dtype)


def _operator(name: str, inputs: list[Tensor], attributes: Any, dtype: Any, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)


# --- names for messages ----------------------------------------------------------------------------

_called: list[torch.nn.Module] = []  # while exporting: every module, those around others first
_EXPORTERS = ("torch.jit", "torch.onnx", "torch.export", "torch.fx")


@contextmanager
def exporting() -> Iterator[None]:
    """Watches which modules are called, so that a quantizer knows its name."""

    def remember(module: torch.nn.Module, args: Any) -> None:
        if not type(module).__module__.startswith(_EXPORTERS):
            _called.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        yield
    finally:
        handle.remove()
        _called.clear()


def name_of(quantizer: torch.nn.Module) -> str:
    """The name of a quantizer in the model that is being exported; empty if it is not known."""
    for model in _called:
        for name, module in model.named_modules():
            if module is quantizer and name:
                return str(name)
    return ""
