"""Room for ranges whose shapes a checkpoint knows, where it is loaded by filling what is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.errors import ArgumentTypeError, CheckpointError, listed, warn_caller
from quantpatch.export.checkpoint.structure import device_near
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.layers.range_tensor import RANGE_KEY
from quantpatch.layers.zero_point_state import ZERO_POINT_KEY
from quantpatch.reports.report import ChangeReport
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import demand_model
from quantpatch.torch_tools.sharded import sharding_of


def expect_ranges(model: nn.Module, checkpoint: Any, *, prefix: str | None = None) -> ChangeReport:
    """Makes room in a model for the ranges in a checkpoint that is loaded by filling what is there.

    ::

        qp.expect_ranges(model, "checkpoint")  # before fully_shard, and before an optimizer is made
        torch.distributed.checkpoint.load({"model": model}, checkpoint_id="checkpoint")

    Mostly there is room from construction on. This is for what the checkpoint alone knows: the shapes of
    ranges that follow an axis of an activation, and the zero points that were found in data. A range that is
    not loaded then stays unknown.

    Args:
        model: Holds the quantizers.
        checkpoint: The folder of ``torch.distributed.checkpoint``, one of its ``StorageReader``, or a
            ``state_dict``.
        prefix: What stands before the model's keys in the checkpoint, such as ``"model."``; found out if it
            can be only one.

    Returns:
        The quantizers that expect a range now, and those whose range is not in the checkpoint.

    Raises:
        CheckpointError: The folder holds no checkpoint, or not one of this model, or no ranges; or it holds
            ranges that the model has no place for. The model is as it was.
        ArgumentTypeError: The first argument is not a model, or the second not a checkpoint.

    Warns:
        QuantPatchWarning: It holds no range for some of the quantizers.
    """
    demand_model(model, "expect_ranges")
    where, shapes_by_key = _entries(checkpoint)
    quantizers = named_quantizers(model)
    if prefix is None:
        prefix = _prefix(model, shapes_by_key, where)
    shapes = {
        key.removeprefix(prefix).removesuffix(RANGE_KEY).rstrip("."): shape
        for key, shape in shapes_by_key.items()
        if key.startswith(prefix) and key.rpartition(".")[2] == RANGE_KEY
    }
    if not shapes:
        raise CheckpointError(
            f"{where} holds no ranges: the model that was saved was not calibrated. Calibrate this one after "
            f"loading",
            path=where,
        )
    problems = []
    for name, shape in shapes.items():
        quantizer = quantizers.get(name)
        problem = "there is no quantizer here" if quantizer is None else _mismatch(quantizer, shape)
        if problem:
            problems.append(f"{name}: {problem}")
    new = [name for name, shape in shapes.items() if name in quantizers and _is_new(quantizers[name], shape)]
    learned = [name for name in new if quantizers[name].descriptor.learn_amax]
    if learned and (sharding := sharding_of(model.modules())):
        problems.append(
            f"{listed(learned)}: {sharding} would not average the gradients of learned ranges that "
            f"become parameters now. Expect them before it wraps the model"
        )
    if problems:
        raise CheckpointError(
            f"the ranges in {where} do not fit this model: {'; '.join(problems)}. Nothing was changed",
            path=where,
            problems=tuple(problems),
        )
    modules = dict(model.named_modules())
    with warning_of_late_ranges([model]):
        for name, shape in shapes.items():
            assert shape is not None
            key = f"{prefix}{name}.{ZERO_POINT_KEY}" if name else f"{prefix}{ZERO_POINT_KEY}"
            device = device_near(modules[name.rpartition(".")[0]])
            quantizers[name].expect_range(shape, device, zero_point=key in shapes_by_key)
    left = {
        name: "without a range: the checkpoint has none"
        for name, q in quantizers.items()
        if name not in shapes and q.amax is None and not q.disabled and not q.descriptor.dynamic
    }
    if left:
        warn_caller(
            f"{where} holds no range for {', '.join(left)}: they go on taking the range of each tensor"
        )
    changed = dict.fromkeys(shapes, "expecting a range of the checkpoint")
    return ChangeReport(written_name(type(model)), changed, left)


def _entries(checkpoint: Any) -> tuple[str, dict[str, tuple[int, ...] | None]]:
    """A checkpoint's name for messages, and the shape of each tensor in it by key (None: not a tensor)."""
    if isinstance(checkpoint, Mapping):
        return "the state_dict", {
            str(key): tuple(value.shape) if isinstance(value, Tensor) else None
            for key, value in checkpoint.items()
        }
    is_path = isinstance(checkpoint, (str, os.PathLike))
    where = os.fspath(checkpoint) if is_path else str(checkpoint)
    if is_path:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        checkpoint = FileSystemReader(checkpoint)
    elif not hasattr(checkpoint, "read_metadata"):
        raise ArgumentTypeError(
            f"expect_ranges takes the folder of a checkpoint of torch.distributed.checkpoint, a "
            f"StorageReader or a state_dict, not {type(checkpoint).__name__}. Write: "
            f"qp.expect_ranges(model, 'checkpoint')",
            checkpoint=checkpoint,
        )
    try:
        found = checkpoint.read_metadata().state_dict_metadata
    except OSError as error:
        raise CheckpointError(
            f"{where} is not a checkpoint of torch.distributed.checkpoint: {error}", path=where
        ) from error
    sizes = {key: getattr(entry, "size", None) for key, entry in found.items()}
    return where, {key: None if size is None else tuple(size) for key, size in sizes.items()}


def _prefix(model: nn.Module, entries: Mapping[str, Any], where: str) -> str:
    """What stands before the model's keys in a checkpoint that holds all of its weights."""
    keys = [key for key in model.state_dict() if key.rpartition(".")[2] != RANGE_KEY]
    if not keys:
        return ""
    first = keys[0]
    candidates = [key.removesuffix(first) for key in entries if key == first or key.endswith(f".{first}")]
    found = [prefix for prefix in candidates if all(prefix + key in entries for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or prefix=".join(map(repr, found))
        raise CheckpointError(
            f"{where} holds several models that could be this one; pass prefix={choices}",
            path=where,
        )
    raise CheckpointError(
        f"{where} does not hold the weights of this {type(model).__name__}: its keys are such as "
        f"{listed(entries, 3)}, the model's such as {listed(keys, 3)}",
        path=where,
    )


def _mismatch(quantizer: TensorQuantizer, shape: tuple[int, ...] | None) -> str:
    """Why a range of this shape cannot be the quantizer's; empty if it can."""
    if shape is None:
        return "what the checkpoint has there is not a tensor"
    expected = tuple(quantizer.shaped(torch.empty(shape, device="meta")).shape)
    held = quantizer.held
    if expected == shape and held is not None and not quantizer.may_become(shape):
        expected = tuple(held.shape)
    return "" if expected == shape else f"its shape is {shape} there and {expected} here"


def _is_new(quantizer: TensorQuantizer, shape: tuple[int, ...] | None) -> bool:
    """Whether its tensor, of this shape, is not there yet."""
    return quantizer.held is None or tuple(quantizer.held.shape) != shape
