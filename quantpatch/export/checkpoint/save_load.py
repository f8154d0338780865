"""Checkpoints: a quantized model in one safetensors file, and back.

``save`` writes weights and ranges, and in the file's metadata how the model is quantized. ``load`` makes a
model be what was saved: it converts and reverts layers, rebuilds quantizers and fills in tensors. All that
can be wrong with a file or a model is found before the model is touched. There is no pickle in the file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from rich.table import Table
from torch import Tensor, nn

from quantpatch.errors import ArgumentTypeError, CheckpointError, listed, shown
from quantpatch.export.checkpoint import packing
from quantpatch.export.checkpoint.description import describe
from quantpatch.export.checkpoint.restore import Plan
from quantpatch.export.checkpoint.saved import Packed, read_json
from quantpatch.layers.base import inner_weights, quantized_weights
from quantpatch.layers.input_factor import named_input_factors
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers, outside_of
from quantpatch.reports.report import Report, facts_table
from quantpatch.torch_tools.atomic_files import written_whole
from quantpatch.torch_tools.extras import safetensors_for
from quantpatch.torch_tools.forward import demand_model

FILE_VERSION = 1


@attrs.frozen
class SaveReport(Report):
    """What ``save`` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        unpacked_bytes: The size of the tensors without packing.
        packed: Names of the weights that were written as codes.
        skipped: Weights that were asked to be and could not, by name, and why.
    """

    path: Path
    bytes: int
    unpacked_bytes: int
    packed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def saved(self) -> float:
        """The share of the size that packing saved, from 0 to 1."""
        return max(0.0, 1 - self.bytes / self.unpacked_bytes) if self.unpacked_bytes else 0.0

    _rows = ()

    def __rich__(self) -> Table:
        packed = f"{len(self.packed)}, {self.saved:.0%} smaller than {self.unpacked_bytes:,} bytes"
        return facts_table(
            str(self.path),
            {
                "bytes": f"{self.bytes:,}",
                "weights packed": packed if self.packed else None,
                **{f"{name} is not packed": why for name, why in self.skipped.items()},
            },
        )


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` without the quantizers' ranges: loads strictly into the float model.

    The float model of one whose batch norm was folded is the float model with its batch norm folded, and
    within ``folded_weights`` the weights are the quantized ones.

    Args:
        model: A quantized model, in whatever state.

    Returns:
        What ``model.state_dict()`` returns, in its order and with its versions, but for what quantizers hold.

    Raises:
        CheckpointError: Weights have the scale of inputs in them that are multiplied by a factor.
    """
    demand_model(model, "float_state_dict")
    if factors := named_input_factors(model):
        raise CheckpointError(
            f"{listed(factors, 3)}: tune has moved scale from their inputs into their weights. "
            f"Revert a copy: qp.revert(copied), copied.state_dict()"
        )
    state = model.state_dict()
    quantizers = named_quantizers(model, every_name=True)
    found = OrderedDict(outside_of(quantizers, state))
    versions = {
        name: kept for name, kept in getattr(state, "_metadata", {}).items() if name not in quantizers
    }
    found._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # where torch has them
    return found


def save(model: nn.Module, path: str | os.PathLike[str], *, packed: bool = False) -> SaveReport:
    """Writes a quantized model into one safetensors file, whole or not at all.

    The file holds every parameter and buffer, the ranges among them, and describes the quantizers: their
    descriptors, and which are disabled. Statistics of a calibration that is going on are not in it.

    Args:
        model: The model, on any device.
        path: Where to write; a file that is there is replaced.
        packed: Write weights of integer formats as their codes, two in a byte up to 4 bits. What comes
            back is then the quantized weight: the model computes the same, bit for bit, but does not train
            on from where it was.

    Returns:
        Sizes, and what was packed.

    Raises:
        CheckpointError: The model holds something that cannot be written.
        MissingExtraError: safetensors is not installed.
    """
    demand_model(model, "save")
    safetensors = safetensors_for("qp.save")
    path = Path(path)
    unknown = {name: None for name, q in named_quantizers(model, every_name=True).items() if q.amax is None}
    state = outside_of(unknown, model.state_dict())
    _check_writable(state, path)
    first_name: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for key, tensor in state.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first_name.setdefault(identity, key) != key:
            tied[key] = first_name[identity]
    tensors = {key: _own_memory(tensor) for key, tensor in state.items() if key not in tied}
    unpacked_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    how_packed: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    if packed:
        for key, quantizer in _packable(model).items():
            if key not in tensors:
                continue
            reason = _pack_into(tensors, how_packed, key, quantizer)
            if reason:
                skipped[key] = reason
        why = "the forward of its class reads the weight by itself, which stays a float"
        skipped.update((name, why) for name, quantizer in inner_weights(model) if not quantizer.disabled)
    description = {
        "file_version": FILE_VERSION,
        **describe(model),
        "tied": tied,
        "packed": how_packed,
    }
    with written_whole(path) as folder:
        safetensors.torch.save_file(
            tensors, folder / path.name, metadata={"quantpatch": json.dumps(description)}
        )
    return SaveReport(path, path.stat().st_size, unpacked_bytes, tuple(how_packed), skipped)


def _check_writable(state: Mapping[str, Any], path: Path) -> None:
    problems = [
        f"{key} is {type(value).__name__}, not a tensor (it comes from get_extra_state)"
        for key, value in state.items()
        if not isinstance(value, Tensor)
    ]
    problems += [
        f"{key} is on the meta device and has no values"
        for key, value in state.items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if problems:
        raise CheckpointError(
            f"the model cannot be saved: {'; '.join(problems)}", path=str(path), problems=tuple(problems)
        )


def _own_memory(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and without memory that another tensor holds as well."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if shared else tensor


def _packable(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Weights that nothing but one active quantizer reads, by their key in the ``state_dict``."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for _, layer, operand, quantizer in quantized_weights(model):
        weight = id(getattr(layer, operand, None))
        if quantizer.quantizing and not quantizer.disabled and weight in names and users[weight] == 1:
            found[names[weight]] = quantizer
    return found


def _pack_into(
    tensors: dict[str, Tensor], how: dict[str, Any], key: str, quantizer: TensorQuantizer
) -> str | None:
    """Replaces a weight by its codes; returns why it cannot be."""
    weight = tensors[key]
    element = packing.integer_element(quantizer.format)
    if element is None:
        format = quantizer.format
        return f"its format is {format.name}, a {type(format).__name__}, and only integers are packed"
    twin = TensorQuantizer(quantizer.descriptor)
    twin.amax = None if quantizer.own_range is None else quantizer.own_range.detach().cpu()
    if quantizer.zero_point is not None and quantizer.zero_point_is_found:
        twin.use_zero_point(quantizer.zero_point)
    codes, own = packing.packed_weight(weight, twin)
    amax = twin.amax if own is None else own
    assert amax is not None
    shape = tuple(weight.shape)
    data = packing.pack(codes, element.bits)
    axis = quantizer.descriptor.kept_axes
    back = packing.unpacked_weight(
        packing.unpack(data, shape, element),
        quantizer.format,
        axis,
        amax.detach(),
        weight.dtype,
        own_range=own is None,
        zero_point=twin.zero_point,
    )
    if not packing.same_when_quantized(weight, back, twin):
        return f"as {weight.dtype} its codes do not come back exactly"
    del tensors[key]
    tensors[f"{key}.codes"] = data
    if own is not None:
        tensors[f"{key}.range"] = own.contiguous()
    how[key] = attrs.asdict(Packed(shape, str(weight.dtype).removeprefix("torch."), own is None))
    return None


def load(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Makes a model be what was saved: its layers, its quantizers, its weights and ranges.

    ::

        qp.load(model, "model.safetensors")
        model = qp.load(MyModel, "model.safetensors")

    The model may be float or quantized, in part or otherwise than the saved one: layers are converted and
    reverted as the file says. Parameters keep their device and dtype; those on the meta device are put on
    the CPU. No calibration is needed, and no code that the file names is imported or run.

    Args:
        model: The model to load into, changed in place; or a class or function without arguments that builds
            it, also on the meta device.
        path: What ``save`` wrote.

    Returns:
        The model.

    Raises:
        CheckpointError: The file was not written by ``save``, is incomplete or newer, or does not fit the
            model; a plugin is not installed; a range is missing, negative or not finite. The model is as it
            was.
        ArgumentTypeError: ``model`` is neither a model nor builds one.
        MissingExtraError: safetensors is not installed.
    """
    if isinstance(path, nn.Module) or isinstance(model, (str, os.PathLike)):
        raise ArgumentTypeError(
            "load takes the model first: write load(model, path), or load(MyModel, path)", model=model
        )
    build = None if isinstance(model, nn.Module) or not callable(model) else model
    if build is None:
        demand_model(model, "load")
    path = Path(path)
    description, tensors = _read(path)
    if build is not None:
        model = build()
        demand_model(model, "load")
    assert isinstance(model, nn.Module)
    plan = Plan(model, description, tensors)
    if plan.problems:
        raise CheckpointError(
            f"{path} cannot be loaded into {type(model).__name__}, which is as it was:\n  "
            + listed(plan.problems, 12, "\n  "),
            path=str(path),
            problems=tuple(plan.problems),
        )
    try:
        plan.carry_out()
    except Exception as error:
        raise CheckpointError(
            f"{path} fits {type(model).__name__}, and loading it failed in the model's own code or for lack "
            f"of memory: {type(error).__name__}: {shown(error, 600)}. The layers are what they were; some "
            f"weights may be the file's",
            path=str(path),
        ) from error
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    safetensors = safetensors_for("qp.load")

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}", path=str(path), problems=(what,))

    if not path.is_file():
        raise wrong("there is no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if zipfile.is_zipfile(path):
            raise wrong(
                "torch.save wrote it, or code that calls that. Build the model in a block as it was "
                "quantized, and load it there: with qp.quantize_modules(recipe=...): model = build(); "
                "model.load_state_dict(torch.load(path)). Of a Lightning module write "
                "LitModel.load_from_checkpoint(path) in the block"
            ) from error
        raise wrong(f"it is truncated or not a safetensors file ({shown(error)})") from error
    if "quantpatch" not in metadata:
        raise wrong(
            "it does not say how its model is quantized, so qp.save did not write it. For the weights of a "
            "float model write: model.load_state_dict(safetensors.torch.load_file(path))"
        )
    try:
        description = read_json(metadata["quantpatch"])
    except ValueError as error:
        raise wrong(f"its description cannot be read ({shown(error)})") from error
    version = description.get("file_version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise wrong("its description cannot be read: it does not say in which version of the format it is")
    if version > FILE_VERSION:
        raise wrong(
            f"it was written by quantpatch {shown(description.get('quantpatch'), 40)} in version {version} "
            f"of the format, and this one reads version {FILE_VERSION}. Write: pip install --upgrade "
            f"quantpatch"
        )
    return description, tensors
