"""What a test may not leave behind: a block that is open, or a torch that is changed."""

from __future__ import annotations

import torch
import torch._dynamo
import torch.onnx

from quantpatch import interception

__all__ = ["close_blocks", "warm_up"]


def warm_up() -> None:
    """Has torch do what it does by itself, for good, when something is first compiled."""
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(1))


def close_blocks() -> list[str]:
    """Ends the blocks that are open here, and tells of each."""
    found = []
    while (activation := interception.current()) is not None:
        activation.close()
        found.append(
            f"a block was left open: {activation.payload.scope!r}. Use it in a `with` statement, or call "
            f"stop() for every start(), also where the test fails"
        )
    return found
