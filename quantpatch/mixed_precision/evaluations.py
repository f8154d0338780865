"""Evaluations of a model in several configurations: counted, limited, and what they return understood."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import attrs
from torch import Tensor

from quantpatch.analysis.measuring import Results, number_of
from quantpatch.errors import ArgumentError, ArgumentTypeError, shown, warn_caller

#: Switches a model to the candidate of each layer, those that are not named to float, and evaluates it.
Ask = Callable[[Mapping[str, int]], Any]
#: Gets the float model's metric and another, and says whether that is good enough.
Keeps = Callable[[Any, Any], bool]

_ROUNDING = 1e-9  # of a difference of two metrics


class OutOfBudget(Exception):
    """There may be no further evaluation."""


@attrs.define
class Budget:
    """How much may be evaluated.

    Attributes:
        evaluations: How many times; None for as often as it takes.
        seconds: How long; None for as long as it takes.
    """

    evaluations: int | None = None
    seconds: float | None = None
    spent: int = 0
    _start: float = attrs.field(factory=lambda: time.monotonic())

    @classmethod
    def of(cls, given: int | timedelta | None) -> Budget:
        """The budget that a user gave.

        Raises:
            ArgumentTypeError: It is of another type.
            ArgumentError: It is not positive.
        """
        if given is None:
            return cls()
        is_count = isinstance(given, int) and not isinstance(given, bool)
        if not is_count and not isinstance(given, timedelta):
            raise ArgumentTypeError(
                f"budget={given!r}: expected a number of evaluations, or a datetime.timedelta such as "
                f"timedelta(minutes=30)",
                budget=given,
            )
        seconds = given.total_seconds() if isinstance(given, timedelta) else None
        count = None if isinstance(given, timedelta) else given
        if (count if seconds is None else seconds) <= 0:  # type: ignore[operator]
            raise ArgumentError(f"budget={given!r}: expected more than 0", budget=given)
        return cls(count, seconds)

    @property
    def left(self) -> int | None:
        """How many evaluations; None if they are not counted."""
        return None if self.evaluations is None else self.evaluations - self.spent

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start

    def spend(self) -> None:
        """Counts an evaluation.

        Raises:
            OutOfBudget: It is one too many.
        """
        over_time = self.seconds is not None and self.elapsed >= self.seconds
        if over_time or (self.left is not None and self.left <= 0):
            raise OutOfBudget
        self.spent += 1


class Evaluations:
    """What configurations were found to give.

    Args:
        ask: Evaluates one.
        results: Those that are known, by key.
        budget: How many others there may be.
        is_kept: Whether a file keeps results.

    Attributes:
        resumed: Keys of those that were known.
    """

    def __init__(self, ask: Ask, results: Results, budget: Budget, *, is_kept: bool) -> None:
        self.resumed: set[str] = set()
        self._ask, self._results, self._budget, self._is_kept = ask, results, budget, is_kept

    def __call__(self, key: str, assignment: Mapping[str, int], of: str, metric: Any = None) -> Any:
        """The metric of a configuration.

        Args:
            key: Says which.
            assignment: The candidate of each layer.
            of: What it is, for messages.
            metric: What it is known to be.

        Raises:
            OutOfBudget: It is not known, and may not be evaluated.
        """
        if key in self._results:
            self.resumed.add(key)
            return self._results[key]
        if metric is None:
            self._budget.spend()
            metric = as_metric(self._ask(assignment), of)
        if self._is_kept:
            demand_storable(metric)
        self._results.put(key, metric)
        return metric


def as_metric(value: Any, of: str) -> Any:
    """What ``evaluate`` returned, as a value to compare: a number where it is one.

    Raises:
        ArgumentError: It is NaN.
        ArgumentTypeError: It has no order.
    """
    metric = value
    if isinstance(value, Tensor):
        value = value.detach()
    if not isinstance(value, str):
        try:
            metric = float(value)
        except (TypeError, ValueError, RuntimeError):
            metric = tuple(value) if isinstance(value, list) else value
    parts = metric if isinstance(metric, tuple) else (metric,)
    if any(isinstance(part, float) and math.isnan(part) for part in parts):
        raise ArgumentError(f"evaluate returned NaN for {of}", evaluate=value)
    try:
        bool(metric < metric)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ArgumentTypeError(
            f"evaluate returned a {type(value).__name__}{shape} for {of}, expected something with an order, "
            f"of which more is better: a number, such as an accuracy, or a tuple of them",
            evaluate=value,
        ) from None
    return metric


def read_metric(value: Any) -> Any:
    """A metric from a file.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return tuple(map(read_metric, value))
    return number_of(value)


def demand_storable(metric: Any) -> None:
    """Checks that a file can keep a metric.

    Raises:
        ArgumentTypeError: It cannot.
    """
    for part in metric if isinstance(metric, tuple) else (metric,):
        if not isinstance(part, (str, int, float)):
            raise ArgumentTypeError(
                f"evaluate returned {shown(repr(metric))}, which the file of resume= cannot keep: return "
                f"numbers, texts or tuples of them, or leave out resume",
                resume=metric,
            )


def keeps_within(max_drop: float | Keeps) -> Keeps:
    """The function that says whether a metric is good enough.

    Raises:
        ArgumentTypeError: ``max_drop`` is neither a number nor a function.
        ArgumentError: It is negative or not finite.
    """
    if callable(max_drop):
        return max_drop
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)):
        raise ArgumentTypeError(
            f"max_drop={max_drop!r}: expected the largest loss of the metric, such as 0.01, or a function of "
            f"the float model's metric and another that says whether that is good enough",
            max_drop=max_drop,
        )
    if not 0 <= max_drop < math.inf:
        raise ArgumentError(
            f"max_drop={max_drop!r}: expected a finite number from 0 on; of the metric more is better",
            max_drop=max_drop,
        )

    def keeps(reference: Any, metric: Any) -> bool:
        drop = difference(reference, metric)
        if drop is None:
            raise ArgumentTypeError(
                f"evaluate returned {shown(repr(metric))}, and of what is not a number the drop is unknown: "
                f"give max_drop a function, such as max_drop=lambda reference, metric: metric >= reference",
                max_drop=metric,
            )
        return drop <= max_drop + _ROUNDING * max(1.0, abs(float(reference)))

    return keeps


def difference(reference: Any, metric: Any) -> float | None:
    """How much less a metric is; None if that cannot be said in a number."""
    if isinstance(reference, float) and isinstance(metric, float):
        return 0.0 if reference == metric else reference - metric
    return None


def warn_of_spread(first: Any, second: Any, max_drop: Any) -> float | None:
    """Warns of an ``evaluate`` that does not return the same for the same model.

    Returns:
        By how much it differs; None if that cannot be said in a number.
    """
    if first == second:
        return 0.0
    spread = difference(first, second)
    spread = None if spread is None else abs(spread)
    text = f"evaluate returned {shown(repr(first))} and {shown(repr(second))} for the same float model"
    if spread is not None:
        beside = f" beside max_drop={max_drop!r}" if not callable(max_drop) else ""
        text += f": a spread of {spread:.3g}{beside}"
    warn_caller(
        f"{text}. What the search finds is as uncertain. Let evaluate use the same data in the same order, "
        f"and call torch.manual_seed in it if it draws numbers"
    )
    return spread
