"""Where quantizers stand decides whether ONNX Runtime's integer kernels run: two steps that put them there.

ONNX Runtime's integer convolution takes integers and gives integers. It runs where the output is quantized at
once, or after a ReLU that the quantization makes superfluous, because its smallest integer means 0.

``quantize_conv_outputs`` is for before calibration (or training): it gives an output quantizer to each
convolution whose output goes somewhere else, such as a residual addition. ``use_unsigned`` is for after it:
ranges that were never negative become unsigned ones, which have twice the resolution and need no ReLU before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, fx, nn

from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import ExportError
from quantpatch.export.targets import operands
from quantpatch.formats import Integer
from quantpatch.layers.base import QuantizedLayer
from quantpatch.quantizer import TensorQuantizer, named_quantizers
from quantpatch.running import evaluating

__all__ = ["quantize_conv_outputs", "use_unsigned"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What quantization can be moved in front of.
_PASSED = (nn.ReLU, nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_PASSED_FUNCTIONS: tuple[Any, ...] = (torch.relu, nn.functional.relu, torch.flatten)


def quantize_conv_outputs(model: nn.Module) -> tuple[str, ...]:
    """Gives convolutions an output quantizer where nothing else quantizes their output.

    Call it after ``fold_batchnorm`` and before calibration. A convolution whose output goes, directly or
    through a ReLU, only into quantized inputs needs none, and gets none. Neither does one that gives the
    model's output, or one in a part of the model that torch.fx cannot trace.

    Args:
        model: A quantized model; changed in place.

    Returns:
        The names of the new quantizers.
    """
    added: list[str] = []
    _visit(model, "", added, whole=True)
    return tuple(added)


def _visit(module: nn.Module, prefix: str, added: list[str], *, whole: bool) -> None:
    if isinstance(module, (QuantizedLayer, TensorQuantizer)):
        return
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # data-dependent code raises what it likes
        for name, child in module.named_children():
            _visit(child, f"{prefix}{name}.", added, whole=False)
        return
    modules = dict(module.named_modules())
    for node in graph.nodes:
        layer: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer) or not isinstance(layer, _CONVOLUTIONS):
            continue
        source = layer.quantizer("input")
        if source is None or source.disabled or layer.quantizer("output") is not None:
            continue
        if not isinstance(source.format, Integer) or not node.users:
            continue
        if all(_is_quantized(user, modules) for user in node.users):
            continue
        descriptor = QuantDescriptor(num_bits=source.format.bits, calib_method=source.descriptor.calib_method)
        quantizer = TensorQuantizer(descriptor)
        quantizer.train(layer.training)
        layer._modules["output_quantizer"] = quantizer
        added.append(f"{prefix}{node.target}.output_quantizer")


def _is_quantized(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether what goes into a node is quantized by it, or by all that follow; or is what the graph gives."""
    if node.op == "output":
        return True
    passed = node.target in _PASSED_FUNCTIONS or (
        node.op == "call_method" and node.target in ("relu", "flatten")
    )
    if node.op == "call_module":
        layer: Any = modules[str(node.target)]
        if isinstance(layer, QuantizedLayer):
            quantizer = layer.quantizer("input")
            return quantizer is not None and not quantizer.disabled
        passed = isinstance(layer, _PASSED)
    return passed and all(_is_quantized(user, modules) for user in node.users)


def use_unsigned(model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any]) -> tuple[str, ...]:
    """Makes signed 8-bit ranges of activations unsigned where no batch has a negative value.

    The range stays what calibration found, so the result is the same or finer; a negative value that comes
    later becomes 0.

    Args:
        model: A calibrated model; changed in place.
        data: Batches, each a tensor, a tuple of arguments or a dict of keywords; or a function that gets
            the model and runs it.

    Returns:
        The names of the quantizers that are unsigned now.

    Raises:
        ExportError: The data holds no batch, or no quantizer saw any.
    """
    found = {
        operand.name: operand.quantizer
        for operand in operands(model)
        if operand.weight is None
        and operand.amax is not None
        and operand.axis is None
        and isinstance(operand.format, Integer)
        and not operand.format.unsigned
        and operand.format.bits == 8
    }
    lowest: dict[str, float] = {}
    handles = [
        quantizer.register_forward_pre_hook(_watching(name, lowest)) for name, quantizer in found.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            _run(model, data)
    finally:
        for handle in handles:
            handle.remove()
    if found and not lowest:
        raise ExportError("the data reached none of the quantizers", quantizers=tuple(found))
    every_name = named_quantizers(model, every_name=True)
    changed = []
    for name, quantizer in found.items():
        if lowest.get(name, -1.0) < 0:
            continue
        descriptor = attrs.evolve(quantizer.descriptor, unsigned=True, narrow_range=False, format=None)
        new = TensorQuantizer(descriptor)
        new.amax = quantizer.own_range
        new.train(quantizer.training)
        for place, module in every_name.items():
            if module is quantizer:
                parent, _, own = place.rpartition(".")
                model.get_submodule(parent)._modules[own] = new
        changed.append(name)
    return tuple(changed)


def _watching(name: str, lowest: dict[str, float]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel():
            lowest[name] = min(lowest.get(name, 0.0), float(args[0].min()))

    return watch


def _run(model: nn.Module, data: Any) -> None:
    if callable(data) and not isinstance(data, Iterable):
        data(model)
        return
    for batch in [data] if isinstance(data, Tensor) else data:
        if isinstance(batch, dict):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
