"""Attributes that can carry a hook, and get back what they held.

Nothing here trusts its own notes: whether a hook is in place, and what it stands for, is read from where
it lies. So every step can be interrupted, also by a signal handler that opens a block of its own, and made
again.
"""

from __future__ import annotations

import abc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

Hook = Callable[..., Any]


class _Missing:
    """What an attribute held before, when its owner had none of its own: absent is a value."""


MISSING: Final = _Missing()

#: Held for a few instructions at a time, never while user code runs. Re-entrant, because the garbage
#: collector may close a generator, and so a block, at any allocation, and signal handlers may open one.
lock: Final = threading.RLock()

if hasattr(os, "register_at_fork"):  # the child's copy is whole, and not held by a thread it does not have
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class HookedAttribute(abc.ABC):
    """An attribute that holds a hook as long as it has users.

    If other code has wrapped a hook when its last user leaves, it stays where it is, passes every
    call through, and is taken out once it is on top again.

    Attributes:
        users: The blocks that want it. Code that changes them calls ``install`` or ``uninstall`` after; all
            of this with the lock held.
    """

    # Those whose hook may lie under another library's. Here as everywhere on the way into a block and out
    # of it, references have no callbacks: an interrupt that comes in one is swallowed by Python.
    _buried: dict[int, weakref.ref[HookedAttribute]] = {}

    __slots__ = ("__weakref__", "_kept", "attribute", "owner", "users")

    def __init__(self, owner: Any, attribute: str) -> None:
        self.owner = owner
        self.attribute = attribute
        self.users: set[Any] = set()
        # A hook and what it displaces, in place or not: making one is most of the cost.
        self._kept: tuple[Hook, Any] | None = None

    def install(self) -> None:
        """Makes sure that a hook is in place, for the users that there are."""
        found, kept = self._read(), self._kept
        if kept is None or (found is not kept[0] and found is not kept[1]):
            if self._is_hook_of_mine(found):
                return
            if kept is not None:  # it may be under what was found: one more on top does no harm
                self._bury()
            self._kept = kept = self._make_hook(found), found
        if found is not kept[0]:
            self._write(kept[0])

    def uninstall(self) -> bool:
        """Gives back what the hook displaced, if there are no users.

        Returns:
            Whether a hook was still in place.
        """
        found, kept = self._read(), self._kept
        in_place = (kept is not None and found is kept[0]) or self._is_hook_of_mine(found)
        if self.users:
            return in_place
        if in_place:
            self._write(self._displaced_by(found))
            if self.users:  # of a signal handler that ran meanwhile
                self.install()
        else:
            self._kept = None
            self._bury()
        return in_place

    def _bury(self) -> None:
        HookedAttribute._buried[id(self)] = weakref.ref(self)

    @staticmethod
    def sweep() -> None:
        """Takes out every idle hook that was under another library's and has come up again."""
        for key, reference in list(HookedAttribute._buried.items()):
            attribute = reference()
            if attribute is None:
                HookedAttribute._buried.pop(key, None)
            else:
                attribute.clear()

    def clear(self) -> None:
        """Takes out what is on top, if there are no users."""
        while not self.users and self._is_hook_of_mine(found := self._read()):
            self._write(self._displaced_by(found))

    @abc.abstractmethod
    def _is_hook_of_mine(self, found: Any) -> bool:
        """Whether something was made by ``_make_hook``."""

    @abc.abstractmethod
    def _displaced_by(self, hook: Any) -> Any:
        """What a hook of this attribute stands for."""

    def _read(self) -> Any:
        return self.owner.__dict__.get(self.attribute, MISSING)

    @abc.abstractmethod
    def _make_hook(self, displaced: Any) -> Hook:
        """A hook to stand for ``displaced``."""

    @abc.abstractmethod
    def _write(self, value: Any) -> None:
        """Sets the owner's own attribute, or removes it if the value is ``MISSING``."""
