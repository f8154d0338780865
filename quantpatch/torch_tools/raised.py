"""What code of others raised: what it says, and whether that code is to blame at all."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType, TracebackType
from typing import Any

from quantpatch.errors import shown


def said(error: BaseException, most: int = 1000) -> str:
    """The type and message of an error, whatever those are."""
    try:
        message = str(error)
    except BaseException:  # what an error raises when it is shown does not help
        message = "(its message cannot be shown)"
    return shown(f"{type(error).__name__}: {message}", most, keep="\n")


def is_from_outside(error: BaseException) -> bool:
    """Whether an error only came up while the code ran: Ctrl-C, or out of a signal's handler, as timeouts."""
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return any(code in handlers for code in _codes(error.__traceback__))


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    code = getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _codes(traceback: TracebackType | None) -> Iterator[CodeType]:
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next
