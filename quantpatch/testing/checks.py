"""The register of checks, and what checks are written with.

A check is a function that raises ``Broken`` with what it saw; what to change is said once, beside its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch import nn

from quantpatch.testing.subject import Broken, NotApplicable, Subject, differ, floats

Function = Callable[[Subject], None]


@attrs.frozen
class Check:
    """A rule.

    Attributes:
        name: Its name.
        function: Raises ``Broken`` if it does not hold, ``NotApplicable`` if it says nothing here.
        advice: What to change in the layer's code.
        traces: Whether it compiles or exports the layer, which takes seconds.
    """

    name: str
    function: Function
    advice: str
    traces: bool


#: Every check by name, in the order they are made.
CHECKS: dict[str, Check] = {}


def check(advice: str, *, traces: bool = False) -> Callable[[Function], Function]:
    """Registers a check under its function's name."""

    def add(function: Function) -> Function:
        CHECKS[function.__name__] = Check(function.__name__, function, advice, traces)
        return function

    return add


def demand_equal(ours: Any, theirs: Any, what: str) -> None:
    """Raises ``Broken`` unless two outputs are the same bit for bit."""
    difference = differ(ours, theirs)
    if difference:
        raise Broken(f"{what}: {difference}")


def or_float_neither(subject: Subject, error: Exception, attempt: Callable[[nn.Module], Any]) -> None:
    """Raises ``NotApplicable`` if the float layer fails as well, else the error again."""
    try:
        attempt(subject.fresh_float())
    except Exception as same:
        raise NotApplicable(f"the float layer cannot either: {type(same).__name__}: {same}") from same
    raise error


def demand_close(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Raises ``Broken`` if outputs are further apart than a share of the expected one's norm."""
    mine, others = floats(ours), floats(theirs)
    if len(mine) != len(others):
        raise Broken(f"{what}: {len(mine)} tensors, expected {len(others)}")
    for a, b in zip(mine, others, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Broken(f"{what}: {a.dtype} of shape {tuple(a.shape)}, expected {b.dtype}, {tuple(b.shape)}")
        ours_, theirs_ = a.double().nan_to_num(), b.double().nan_to_num()
        distance, norm = (ours_ - theirs_).norm().item(), theirs_.norm().item()
        if not distance <= tolerance * max(norm, 1e-3):
            raise Broken(f"{what}: they differ by {distance:.3g}, where the expected norm is {norm:.3g}")
