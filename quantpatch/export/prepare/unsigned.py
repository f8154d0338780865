"""Which values are never negative, whatever the data: their integers need no sign.

Unsigned ones have twice the resolution in as many bits, and cost no ReLU before. ``fit_zero_points`` finds
what the data shows.
"""

from __future__ import annotations

from quantpatch.export.prepare.dataflow import Value
from quantpatch.export.prepare.moving import MOVING

__all__ = ["is_never_negative"]

_NEVER_NEGATIVE = frozenset(
    f"aten::{name}{end}"
    for name in ("relu", "sigmoid", "hardsigmoid", "_softmax", "abs", "exp", "square", "softplus")
    for end in ("", "_")
)
# Of values that are not negative these make none that are.
_KEEPING = frozenset(
    f"aten::{name}{end}"
    for name in (
        "add", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "dropout", "mean", "mul",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_bilinear2d",
    )
    for end in ("", "_")
)  # fmt: skip


def is_never_negative(value: Value) -> bool:
    """Whether an operator's result cannot be negative, whatever goes in."""
    operator = value.maker
    if operator is None:
        return False
    if operator.name in _NEVER_NEGATIVE:
        return True
    if operator.name.rstrip("_") in ("aten::hardtanh", "aten::clamp", "aten::clamp_min"):
        # ReLU6 is hardtanh(x, 0, 6); left out, hardtanh's bound is -1 and clamp has none.
        lowest = operator.args[1] if len(operator.args) > 1 else None
        return isinstance(lowest, (int, float)) and lowest >= 0
    keeps = operator.quantizer is not None or operator.name in MOVING or operator.name in _KEEPING
    numbers = [x for x in operator.args if isinstance(x, float)]
    return keeps and all(x >= 0 for x in numbers) and all(map(is_never_negative, operator.inputs))
