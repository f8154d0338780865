"""What tensors of a model were before they were tuned, so that ``revert`` can give them back.

It is held in the dictionary of the module that has the tensor, as plain tuples, so that copies and pickles
have it; files that ``save`` writes do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_KEY = "_before_tuning"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensor: Tensor) -> int:
    """A number that differs where a bit of a tensor does, on any device."""
    integers = _INTEGERS[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))


def held(module: nn.Module) -> dict[str, tuple[Tensor, int, str]]:
    """For each tensor that was tuned its value before, a digest of it now, and what rounded it (or empty)."""
    found: dict[str, tuple[Tensor, int, str]] = vars(module).get(_KEY, {})
    return found


def remember(module: nn.Module, name: str, before: Tensor, *, rounded_by: str = "") -> None:
    """Notes what a tensor was, once it holds its new value; what it was before the first time counts.

    Args:
        module: Has the tensor.
        name: Its name there.
        before: A copy of what it was.
        rounded_by: The method that has put it on its quantizer's grid.
    """
    first, _, rounded = held(module).get(name, (before, 0, ""))
    now = _digest(getattr(module, name))
    vars(module)[_KEY] = {**held(module), name: (first, now, rounded_by or rounded)}


def restore(module: nn.Module, notes: dict[str, tuple[Tensor, int, str]]) -> None:
    """Makes the notes of a module those that it had."""
    if notes:
        vars(module)[_KEY] = notes
    else:
        vars(module).pop(_KEY, None)


def rounded_by(module: nn.Module, name: str) -> str:
    """The method that has rounded a tensor, if it still is what that made of it; else empty."""
    _, digest, method = held(module).get(name, (None, 0, ""))
    tensor: Any = module._parameters.get(name)
    return method if method and tensor is not None and _digest(tensor) == digest else ""


def put_back(model: nn.Module) -> dict[bool, list[str]]:
    """Makes all tensors what they were before they were tuned, but for those that have changed since.

    Returns:
        The names of those that are what they were, by True, and of the others.
    """
    names: dict[bool, list[str]] = {True: [], False: []}
    for prefix, module in model.named_modules():
        for name, (before, digest, _) in held(module).items():
            tensor: Any = module._parameters.get(name)
            same = tensor is not None and tensor.shape == before.shape and _digest(tensor) == digest
            if same:
                with torch.no_grad():
                    tensor.copy_(before)
            names[same].append(f"{prefix}.{name}".lstrip("."))
        restore(module, {})
    return names
