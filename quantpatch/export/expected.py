"""Room for the ranges in a checkpoint of ``torch.distributed.checkpoint``, which fills only what is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantpatch.errors import CheckpointError, warn_caller
from quantpatch.export.structure import device_near
from quantpatch.held_range import RANGE_KEY, ZERO_POINT_KEY
from quantpatch.quantizer import named_quantizers
from quantpatch.sharded import sharding_of

__all__ = ["expect_ranges"]


def expect_ranges(model: nn.Module, checkpoint: Any, *, prefix: str | None = None) -> tuple[str, ...]:
    """Makes room in a model for the ranges that ``torch.distributed.checkpoint`` is about to load.

    ::

        qp.expect_ranges(model, "checkpoint")  # before fully_shard, and before an optimizer is made
        torch.distributed.checkpoint.load({"model": model}, checkpoint_id="checkpoint")

    That module loads what it finds in the model's ``state_dict``, in which a range appears only once it is
    known: without this call it would load the weights alone, and every tensor would go on being quantized by
    its own range. If it was given the model, or an object that holds it, that is an error, which names the
    ranges; if it was given what ``model.state_dict()`` returned, nobody can tell. Until it is loaded a range
    is NaN, and so is what is quantized by it.

    Args:
        model: Holds the quantizers.
        checkpoint: The folder, or a ``torch.distributed.checkpoint.StorageReader``.
        prefix: What stands before the model's keys in the checkpoint, such as ``"model."``; found out if it
            can be only one.

    Returns:
        The names of the quantizers whose range is expected.

    Raises:
        CheckpointError: The folder holds no checkpoint, or not one of this model, or no ranges; or it holds
            ranges that the model has no place for. The model is as it was.

    Warns:
        QuantPatchWarning: It holds no range for some of the quantizers.
    """
    where = os.fspath(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else str(checkpoint)
    entries = _entries(checkpoint, where)
    quantizers = named_quantizers(model)
    if prefix is None:
        prefix = _prefix(model, entries, where)
    shapes: dict[str, Any] = {
        key.removeprefix(prefix).removesuffix(RANGE_KEY).rstrip("."): getattr(entry, "size", None)
        for key, entry in entries.items()
        if key.startswith(prefix) and key.rpartition(".")[2] == RANGE_KEY
    }

    def misfit(name: str, shape: torch.Size | None) -> str:
        if name not in quantizers:
            return "there is no quantizer here"
        return _mismatch(quantizers[name], shape)

    if not shapes:
        raise CheckpointError(
            f"{where} holds no ranges: the model that was saved was not calibrated. Calibrate this one after "
            f"loading",
            path=where,
        )
    problems = [f"{name}: {problem}" for name, shape in shapes.items() if (problem := misfit(name, shape))]
    learned = [name for name in shapes if name in quantizers and quantizers[name].descriptor.learn_amax]
    if learned and (sharding := sharding_of(model.modules())):
        problems.append(
            f"{sharding} would not average the gradients of learned ranges: expect them before it wraps the "
            f"model"
        )
    if problems:
        raise CheckpointError(
            f"the ranges in {where} do not fit this model: {'; '.join(problems)}. Nothing was changed",
            path=where,
            problems=tuple(problems),
        )
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        key = f"{prefix}{name}.{ZERO_POINT_KEY}" if name else f"{prefix}{ZERO_POINT_KEY}"
        device = device_near(modules[name.rpartition(".")[0]])
        quantizers[name].expect_range(shape, device, zero_point=key in entries)
    left = [
        name
        for name, q in quantizers.items()
        if q.amax is None and not q.disabled and not q.descriptor.dynamic
    ]
    if left:
        warn_caller(
            f"{where} holds no range for {', '.join(left)}: they go on taking the range of each tensor"
        )
    return tuple(shapes)


def _entries(checkpoint: Any, where: str) -> Mapping[str, Any]:
    """What there is in the checkpoint, by its key."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    reader = FileSystemReader(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    try:
        found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise CheckpointError(
            f"{where} is no checkpoint of torch.distributed.checkpoint: {error}", path=where
        ) from error
    return found


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
        f"{', '.join(list(entries)[:3])}, the model's such as {', '.join(keys[:3])}",
        path=where,
    )


def _mismatch(quantizer: Any, shape: torch.Size | None) -> str:
    """Why a range of this shape cannot be the quantizer's; empty if it can."""
    if shape is None:
        return "what is there is no tensor"
    expected = quantizer.shaped(torch.empty(shape, device="meta")).shape
    if quantizer.amax is not None:
        expected = quantizer.amax.shape
    return "" if expected == shape else f"its shape is {tuple(shape)} there and {tuple(expected)} here"
