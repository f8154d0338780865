"""torch's C++ fast paths for transformers, which read the weights inside and call none of the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def _look_here(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing."""


def refuse_fast_paths(module: nn.Module) -> None:
    """Makes sure that no quantizer inside a module is passed over: torch looks for hooks in there."""
    module.__dict__["_forward_pre_hooks"]["quantpatch"] = _look_here


def allow_fast_paths(module: nn.Module) -> None:
    """Undoes :func:`refuse_fast_paths`."""
    module.__dict__["_forward_pre_hooks"].pop("quantpatch", None)


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """A block in which transformer layers of torch run as written, and hand each other no nested tensors.

    It is a setting of the process.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
