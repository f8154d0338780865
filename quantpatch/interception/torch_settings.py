"""How torch is set: what code of others may change beside its dictionaries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn


@attrs.frozen(eq=False)
class Setting:
    """A setting of torch, or a list that it keeps, that is another than it was.

    Attributes:
        name: What it is called.
        old: What it was.
        new: What it is.
        put: Sets it.
    """

    name: str
    old: Any
    new: Any
    put: Callable[[Any], object]

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} became {self.new!r}"

    def undo(self) -> None:
        """Puts back what was there."""
        self.put(self.old)


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.8, once it has been set to None
        return torch.device("cpu")


def _put_device(device: torch.device) -> None:
    # None takes away the mode that makes every new tensor go to a device.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _put_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


_SETTINGS: tuple[tuple[str, Callable[[], Any], Callable[[Any], object]], ...] = (
    ("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("the default device", _default_device, _put_device),
    ("whether gradients are recorded", torch.is_grad_enabled, torch._C._set_grad_enabled),
    (
        "the precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    ("the number of threads", torch.get_num_threads, torch.set_num_threads),
    (
        "whether algorithms are deterministic",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _put_deterministic,
    ),
)
_HOOKS: tuple[tuple[str, dict[int, Any]], ...] = tuple(
    (f"torch.nn.modules.module.{name}", hooks)
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
)


def _refilled(hooks: dict[int, Any], entries: Iterable[tuple[int, Any]]) -> None:
    hooks.clear()
    hooks.update(entries)


class Settings:
    """How torch is set at this moment, and the hooks that every module runs."""

    def __init__(self) -> None:
        self._values = [get() for _, get, _ in _SETTINGS]
        self._hooks = [list(hooks.items()) for _, hooks in _HOOKS]

    def changes(self) -> Iterator[Setting]:
        """What is different now."""
        for (name, get, put), old in zip(_SETTINGS, self._values, strict=True):
            if (new := get()) != old:
                yield Setting(name, old, new, put)
        for (name, hooks), old in zip(_HOOKS, self._hooks, strict=True):
            if list(hooks.items()) != old:
                yield Setting(name, old, list(hooks.items()), functools.partial(_refilled, hooks))
