"""When the construction of an object is over.

``type.__call__`` cannot be hooked, and a class may do what it likes before and after it calls its base's
``__init__``. What can be seen is the outermost function at work on the object; when it returns, the object is
done. Python reports returns to a profiler, which is set for that long only.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Then = Callable[[], None]

_RETURNS = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in dis.opmap}


class _Waiting(threading.local):
    """What is to be done in this thread, by the frame whose return is waited for."""

    def __init__(self) -> None:
        self.by_frame: dict[FrameType, list[Then]] = {}


_waiting = _Waiting()


def when_constructed(thing: Any, then: Then) -> None:
    """Calls ``then`` as soon as the object is constructed; not if its construction fails.

    Under another profiler, which cannot be asked to share, that is with the next object, or at ``settle``.

    Args:
        thing: An object whose ``__init__`` is running.
        then: What to do.
    """
    settle()
    frame = _outermost(thing)
    if frame is None:
        then()
        return
    _waiting.by_frame.setdefault(frame, []).append(then)
    if sys.getprofile() is None:
        sys.setprofile(_watch)


def settle() -> None:
    """Does what waits in this thread for functions that are over."""
    if not _waiting.by_frame:
        return
    running = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    for over in [frame for frame in _waiting.by_frame if frame not in running]:
        _done(over)


def _outermost(thing: Any) -> FrameType | None:
    """The outermost running function whose first argument is the object."""
    found = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _first_argument(frame) is thing:
            found = frame
        frame = frame.f_back
    return found


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        arguments = frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount])
        return arguments[0] if arguments else None
    return None


def _watch(frame: FrameType, event: str, argument: Any) -> None:
    if event == "return" and frame in _waiting.by_frame:
        if len(_waiting.by_frame) == 1:
            sys.setprofile(None)
        _done(frame)


def _done(frame: FrameType) -> None:
    functions = _waiting.by_frame.pop(frame)
    # An exception that leaves a function shows as a return of None.
    if frame.f_code.co_code[frame.f_lasti] in _RETURNS:
        for function in functions:
            function()
