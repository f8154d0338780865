"""What a test may not leave behind: a block that is open, or a torch that is changed."""

from __future__ import annotations

import sys
from collections.abc import Container

import torch
import torch._dynamo
import torch.onnx

from quantpatch.interception.block import Block, open_here


def warm_up() -> None:
    """Has torch do what it does by itself, for good, when something is first compiled."""
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(1))


def close_blocks(but: Container[Block] = ()) -> list[str]:
    """Ends the blocks that are open here, and reports each.

    Args:
        but: Those that were open before, such as one of a fixture for several tests.
    """
    found = []
    for block in open_here():
        if block not in but:
            block.close()
            found.append(
                f"a block was left open: {block.scope!r}. Use it in a `with` statement, or call "
                f"stop() for every start(), also where the test fails"
            )
    return found


def import_hooks() -> list[str]:
    """Names what quantpatch has left on ``sys.meta_path``; packages put hooks of their own there."""
    return [f"left on sys.meta_path: {hook!r}" for hook in sys.meta_path if _is_ours(type(hook))]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "quantpatch"
