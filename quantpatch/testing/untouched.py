"""What a test may not leave behind: a block that is open, or a torch that is changed."""

from __future__ import annotations

import sys

import torch
import torch._dynamo
import torch.onnx

from quantpatch import interception

__all__ = ["close_blocks", "import_hooks", "warm_up"]


def warm_up() -> None:
    """Has torch do what it does by itself, for good, when something is first compiled."""
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(1))


def close_blocks() -> list[str]:
    """Ends the blocks that are open here, and tells of each."""
    found = []
    while (activation := interception.current()) is not None:
        activation.payload.close()
        found.append(
            f"a block was left open: {activation.payload.scope!r}. Use it in a `with` statement, or call "
            f"stop() for every start(), also where the test fails"
        )
    return found


def import_hooks() -> list[str]:
    """Tells of what quantpatch has left on ``sys.meta_path``; packages put hooks of their own there."""
    return [f"left on sys.meta_path: {hook!r}" for hook in sys.meta_path if _is_ours(type(hook))]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "quantpatch"
