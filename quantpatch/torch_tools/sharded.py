"""What ``torch.distributed`` holds in pieces: a DTensor's, those that FSDP2 puts together, its checkpoints.

Nothing here imports its modules: where there is such a tensor or such a checkpoint, other code has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part (or all, as the others do)."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; asks no other rank."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return held


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank, which all have to call this."""
    together: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return together


def beside(tensor: Tensor, other: Tensor, *, in_pieces: bool = False) -> Tensor:
    """A tensor that is the same on every rank, for computing with a sharded one; else as it is.

    A gradient that comes back is the sum of the ranks'.

    Args:
        tensor: The tensor.
        other: What it is to be computed with.
        in_pieces: Whether to cut it as the other is cut, instead of having all of it on every rank.
    """
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    tensors: Any = sys.modules["torch.distributed.tensor"]
    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    everywhere = [tensors.Replicate()] * mesh.ndim
    shared: Tensor = tensors.DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    return shared.redistribute(placements=placements) if in_pieces else shared  # type: ignore[attr-defined]


def sharding_of(modules: Iterable[nn.Module]) -> str:
    """What, of torch's, holds the parameters of some modules by a list of its own; empty if nothing does."""
    kinds: dict[str, Any] = {"DistributedDataParallel": nn.parallel.DistributedDataParallel}
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        kinds["FullyShardedDataParallel"] = fsdp.FullyShardedDataParallel
        kinds["fully_shard"] = fsdp.FSDPModule
    for module in modules:
        for name, kind in kinds.items():
            if isinstance(module, kind):
                return name
    return ""


def is_replicated() -> bool:
    """Whether this is the forward pass of a ``DistributedDataParallel``."""
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return active is not None


def is_in_checkpoint(key: str) -> bool | None:
    """Whether the checkpoint that ``torch.distributed.checkpoint.load`` is loading has a tensor.

    It fills what it finds in a model's ``state_dict``, fails where that has more and does not report what it
    has itself, so its own variables are looked at. It cannot be found out where it got a dictionary and no
    model.

    Args:
        key: Of the model's ``state_dict``.

    Returns:
        None: it is not running.
    """
    loader = sys.modules.get("torch.distributed.checkpoint.state_dict_loader")
    frame: FrameType | None = None if loader is None else sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(loader) and frame.f_code.co_name == "load":
            model, reader = (frame.f_locals.get(name) for name in ("key", "storage_reader"))
            if hasattr(reader, "read_metadata"):
                keys = _keys_in(reader, id(frame))
                wanted = f".{_unwrapped(key)}"
                return any(k.startswith(f"{model}.") and k.endswith(wanted) for k in keys)
        frame = frame.f_back
    return None


def _unwrapped(key: str) -> str:
    """A key without what wrappers put into it, which functions of torch's checkpoints take out."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")


@functools.lru_cache(maxsize=1)
def _keys_in(reader: Any, call: int) -> tuple[str, ...]:
    """The keys in a distributed checkpoint; read once in each call of ``load``."""
    return tuple(map(_unwrapped, reader.read_metadata().state_dict_metadata))
