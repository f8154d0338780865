"""Where a module stands in the model that is running, for messages about it: no module knows its own name."""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

from torch import nn


def place_in_running_model(module: nn.Module) -> str | None:
    """The qualified name of a module within the outermost one whose forward is running and that holds it.

    It is found by looking at the callers, which takes time: for errors only.

    Returns:
        The name; None if no other module is running, or none that holds it.
    """
    frame: FrameType | None = inspect.currentframe()
    found = None
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        # By its type: what a layer's own forward sees may pass for a module.
        if issubclass(type(caller), nn.Module) and caller is not module:
            names = (name for name, inner in caller.named_modules() if inner is module)
            found = next(names, found)
        frame = frame.f_back
    return found
