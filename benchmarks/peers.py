"""Fake quantization as others do it: torch's own operators always, libraries where they are installed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

FakeQuantize = Callable[[Tensor], Tensor]


def _torch(scale: Tensor, axis: int | None, _: tuple[int, ...]) -> FakeQuantize:
    step, zero = scale.flatten(), torch.zeros(scale.numel(), dtype=torch.int32)
    if axis is None:
        return lambda x: torch.fake_quantize_per_tensor_affine(x, step[0], zero[0], -128, 127)
    return lambda x: torch.fake_quantize_per_channel_affine(x, step, zero, axis, -128, 127)


def _operations(scale: Tensor, axis: int | None, _: tuple[int, ...]) -> FakeQuantize:
    return lambda x: torch.clamp(torch.round(x / scale), -128, 127) * scale


def _torchao(scale: Tensor, axis: int | None, shape: tuple[int, ...]) -> FakeQuantize:
    function = importlib.import_module("torchao.quantization.quant_primitives")._fake_quantize_affine
    block = shape if axis is None else tuple(1 if d == axis else n for d, n in enumerate(shape))
    step, zero = scale.flatten(), torch.zeros(scale.numel(), dtype=torch.int32)
    return lambda x: function(x, block, step, zero, torch.int8, -128, 127)


def _modelopt(scale: Tensor, axis: int | None, _: tuple[int, ...]) -> FakeQuantize:
    function = importlib.import_module("modelopt.torch.quantization.tensor_quant").fake_tensor_quant
    amax = scale * 127
    return lambda x: function(x, amax, None, 8)


def _brevitas(scale: Tensor, axis: int | None, _: tuple[int, ...]) -> FakeQuantize:
    quant = importlib.import_module("brevitas.core.quant").IntQuant
    wrapper = importlib.import_module("brevitas.core.function_wrapper")
    module = quant(
        narrow_range=False,
        signed=True,
        input_view_impl=nn.Identity(),
        float_to_int_impl=wrapper.RoundSte(),
        tensor_clamp_impl=wrapper.TensorClamp(),
    )
    zero, bits = torch.tensor(0.0), torch.tensor(8.0)
    return lambda x: module(scale, zero, bits, x)


def _quanto(scale: Tensor, axis: int | None, _: tuple[int, ...]) -> FakeQuantize:
    quanto = importlib.import_module("optimum.quanto")
    if axis is None:
        return lambda x: quanto.quantize_activation(x, quanto.qint8, scale.reshape(())).dequantize()
    return lambda x: quanto.quantize_weight(x, quanto.qint8, axis, scale).dequantize()


def _torch_learnable(scale: Tensor, axis: int | None, shape: tuple[int, ...]) -> FakeQuantize:
    step, zero = scale.flatten(), torch.zeros(scale.numel())
    factor = (math.prod(shape) / scale.numel() * 127) ** -0.5
    if axis is None:
        function = torch._fake_quantize_learnable_per_tensor_affine
        return lambda x: function(x, step, zero, -128, 127, factor)
    by_channel = torch._fake_quantize_learnable_per_channel_affine
    return lambda x: by_channel(x, step, zero, axis, -128, 127, factor)


def _lsq(scale: Tensor, axis: int | None, shape: tuple[int, ...]) -> FakeQuantize:
    """As the paper has it, arXiv 1902.08153, appendix A."""
    factor = (math.prod(shape) / scale.numel() * 127) ** -0.5

    def function(x: Tensor) -> Tensor:
        step = (scale - scale * factor).detach() + scale * factor
        v = (x / step).clamp(-128, 127)
        y: Tensor = ((v.round() - v).detach() + v) * step
        return y

    return function


LEARNED = {"operations": _lsq, "torch learnable": _torch_learnable, "brevitas": _brevitas}
MAKERS = {
    "four operations": _operations,
    "torch.fake_quantize": _torch,
    "torchao": _torchao,
    "modelopt": _modelopt,
    "brevitas": _brevitas,
    "quanto": _quanto,
}


def peers(
    scale: Tensor, axis: int | None, shape: tuple[int, ...]
) -> tuple[dict[str, FakeQuantize], dict[str, str]]:
    """int8, as each peer does it; and those that cannot, with the error's name.

    Args:
        scale: 0-dim, or of ``len(shape)`` dimensions with 1 on all axes but ``axis``; learned if it requires
            a gradient.
        axis: The axis that is kept; None for one scale.
        shape: Of the tensors to come.
    """
    made: dict[str, FakeQuantize] = {}
    missing: dict[str, str] = {}
    for name, make in (LEARNED if scale.requires_grad else MAKERS).items():
        try:
            function = make(scale, axis, shape)
            function(torch.zeros(shape)).sum()
        except Exception as error:  # whatever it is, the table names it  # noqa: PERF203
            missing[name] = type(error).__name__
        else:
            made[name] = function
    return made, missing
