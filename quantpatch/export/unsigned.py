"""Ranges without negative values become unsigned: twice the resolution in as many bits, and no ReLU before.

What is never negative is known from the operators (after a ReLU, a softmax) or from data (images).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.errors import ExportError
from quantpatch.export.dataflow import MOVING, Value
from quantpatch.export.targets import operands
from quantpatch.formats import Integer
from quantpatch.quantizer import TensorQuantizer, named_quantizers
from quantpatch.running import evaluating, run_batch

__all__ = ["is_never_negative", "make_unsigned", "may_be_unsigned", "replace_quantizer", "use_unsigned"]

_NEVER_NEGATIVE = frozenset(
    f"aten::{name}{end}"
    for name in ("relu", "sigmoid", "hardsigmoid", "_softmax", "abs", "exp", "square", "softplus")
    for end in ("", "_")
)
# Of values that are not negative these make none that are.
_KEEPING = frozenset(
    f"aten::{name}{end}"
    for name in (
        "add", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "dropout", "mean", "mul",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_bilinear2d",
    )
    for end in ("", "_")
)  # fmt: skip


def is_never_negative(value: Value) -> bool:
    """Whether an operator's result cannot be negative, whatever goes in."""
    operator = value.maker
    if operator is None:
        return False
    if operator.name in _NEVER_NEGATIVE:
        return True
    if operator.name.rstrip("_") in ("aten::hardtanh", "aten::clamp", "aten::clamp_min"):
        # ReLU6 is hardtanh(x, 0, 6); left out, hardtanh's bound is -1 and clamp has none.
        lowest = operator.args[1] if len(operator.args) > 1 else None
        return isinstance(lowest, (int, float)) and lowest >= 0
    keeps = operator.quantizer is not None or operator.name in MOVING or operator.name in _KEEPING
    numbers = [x for x in operator.args if isinstance(x, float)]
    return keeps and all(x >= 0 for x in numbers) and all(map(is_never_negative, operator.inputs))


def may_be_unsigned(quantizer: TensorQuantizer) -> bool:
    """Whether it is one of activations of signed 8-bit integers, with one range."""
    format, descriptor = quantizer.format, quantizer.descriptor
    return (
        isinstance(format, Integer)
        and not format.unsigned
        and format.bits == 8
        and descriptor.kept_axes is None
        and not descriptor.dynamic
    )


def replace_quantizer(model: nn.Module, old: TensorQuantizer, new: TensorQuantizer) -> list[str]:
    """Puts a quantizer in every place of another; gives the names of those places."""
    names = [name for name, m in named_quantizers(model, every_name=True).items() if m is old]
    for name in names:
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._modules[own] = new
    return names


def make_unsigned(model: nn.Module, names: Iterable[str]) -> None:
    """Makes signed quantizers unsigned; a range that is known stays."""
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, TensorQuantizer)
        new = TensorQuantizer(attrs.evolve(old.descriptor, unsigned=True, narrow_range=False, format=None))
        new.amax = old.own_range
        new.disabled, new.quantizing = old.disabled, old.quantizing
        new.train(old.training)
        replace_quantizer(model, old, new)


def use_unsigned(model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any]) -> tuple[str, ...]:
    """Makes signed 8-bit ranges of activations unsigned where no batch has a negative value.

    ``prepare`` does that where the operators show it; data shows it for the rest, such as the model's input.
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
        InputError: A batch is on a device where the model is not.
    """
    found = {
        operand.name: operand.quantizer
        for operand in operands(model)
        if operand.weight is None and operand.amax is not None and may_be_unsigned(operand.quantizer)
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
    changed = tuple(name for name in found if lowest.get(name, -1.0) >= 0)
    make_unsigned(model, changed)
    return changed


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
        run_batch(model, batch)
