"""Which values are never negative, whatever the data: their integers need no sign.

Unsigned ones have twice the resolution in as many bits, and cost no ReLU before. ``fit_zero_points`` finds
what the data shows.
"""

from __future__ import annotations

from quantpatch.dataflow import Value, traits

# Those that compute with the numbers among their arguments.
_ARITHMETIC = frozenset({"aten::add", "aten::mul"})


def is_never_negative(value: Value) -> bool:
    """Whether an operator's result cannot be negative, whatever goes in."""
    operator = value.maker
    if operator is None:
        return False
    known, plain = traits(operator.name), operator.name.removesuffix("_")
    if known.never_negative:
        return True
    if plain in ("aten::hardtanh", "aten::clamp", "aten::clamp_min"):
        # ReLU6 is hardtanh(x, 0, 6); left out, hardtanh's bound is -1 and clamp has none.
        lowest = operator.args[1] if len(operator.args) > 1 else None
        return isinstance(lowest, (int, float)) and lowest >= 0
    if operator.quantizer is None and not known.keeps_sign:
        return False
    numbers = (*operator.args, *operator.kwargs.values()) if plain in _ARITHMETIC else ()
    if any(isinstance(x, (int, float)) and x < 0 for x in numbers):
        return False
    return all(map(is_never_negative, operator.inputs))
