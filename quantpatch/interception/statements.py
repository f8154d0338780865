"""``with`` statements that an interrupt cannot leave half done.

Between the end of ``__enter__`` and the first step of ``__exit__``, and at the first step itself, Python may
run a signal handler that raises; ``__exit__`` is not called then. But the statement has looked it up
before it called ``__enter__``, and drops what it found when it is over: so what it finds here is an object of
its own, which ends the block when it is dropped, if the block is still open.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any


class Statement:
    """One ``with`` statement.

    Attributes:
        opening: What is to be closed at its end, once that is known; anything with ``close()``, which may be
            called more than once.
        is_real: Whether there is one, rather than a call of ``__enter__`` by other code.
    """

    __slots__ = ("is_real", "opening")

    def __init__(self, is_real: bool = False) -> None:
        self.opening: Any = None
        self.is_real = is_real

    @staticmethod
    def entering(scope: Any) -> Statement:
        """The statement that is about to enter a block here; a new one if none does."""
        reference = _found.get()
        found = None if reference is None else reference()
        if found is None or found.scope is not scope or found.statement.opening is not None:
            return Statement()
        return found.statement


class _Guard:
    """Closes what its statement has opened, if it is dropped with that."""

    statement: Statement | None = None

    def __del__(self) -> None:
        if self.statement is not None and self.statement.opening is not None:
            self.statement.opening.close()


class _Relieved:
    """A guard that has nothing left to do. Code that runs as it is dropped might swallow an interrupt."""


class _Leave(functools.partial):  # type: ignore[type-arg]
    """What a ``with`` statement holds, and calls at its end.

    It is called by Python's own code in C, so that the traceback of an interrupt holds its arguments but not
    itself, and so not the guard.
    """

    scope: Any
    statement: Statement
    guard: Any


# What this context has looked up last.
_found: ContextVar[weakref.ref[_Leave] | None] = ContextVar("quantpatch_found", default=None)


class Exit:
    """The ``__exit__`` of a block.

    Args:
        leave: Called with what was entered, the statement that is left, and whether it is with an exception.
    """

    def __init__(self, leave: Callable[[Any, Statement, bool], None]) -> None:
        self._leave = leave

    def __get__(self, scope: Any, owner: Any = None) -> Any:
        if scope is None:
            return lambda scope, *error: self._leave(scope, Statement(), error[1] is not None)
        statement = Statement(is_real=True)
        reference: list[Any] = []
        leave = _Leave(self._left, scope, statement, reference)
        leave.scope = scope
        leave.statement = statement
        leave.guard = _Guard()
        leave.guard.statement = statement
        reference.append(weakref.ref(leave))
        _found.set(reference[0])
        return leave

    def _left(self, scope: Any, statement: Statement, reference: Any, *error: Any) -> None:
        self._leave(scope, statement, error[1] is not None)
        reference[0]().guard.__class__ = _Relieved
