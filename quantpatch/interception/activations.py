"""In force or not: who decides what is built in a context, from the opening of a block to its end.

Activations form a stack through their ``parent``; one that was closed is passed over, so scopes may end
in any order, in other threads, tasks and generators, and none outlives its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from quantpatch.interception.slots import HookedAttribute, lock

if TYPE_CHECKING:
    from quantpatch.interception.hooks import Slot

__all__ = [
    "Activation",
    "Policy",
    "current",
    "current_in_context",
    "is_being_replaced",
    "is_within",
    "open_here",
    "opened_here",
    "within",
]


class Policy:
    """Who decides what is built while an activation is in force."""

    def replacement_for(self, slot: Slot) -> Any | None:
        """What to use instead of the target now, or None to leave it alone.

        Args:
            slot: Where the call came in: an object of exactly the target is being built, or the function
                called.
        """
        return None

    def came_out(self, slot: Slot) -> None:
        """Learns that what ``replacement_for`` was asked for is built, or the call over, without an error."""

    def subclass_came_out(self, slot: Slot, thing: Any) -> None:
        """Learns that the target's ``__init__`` has run on an object of a subclass."""

    def passed_root(self, thing: Any) -> None:
        """Learns that the ``__init__`` of a root (see ``Slot.of_root``) has run on an object."""


class Watch(Protocol):
    """What an activation starts and stops with its hooks; stopping twice is harmless."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Activation:
    """One opening of a scope.

    Attributes:
        slots: Where its hooks are. May grow while it is open (a target imported later).
        payload: The policy that decides, to be found again through ``current()``.
        watch: What it starts and stops with its hooks.
        parent: The activation in force where this one was opened.
        closed: Set once, when the scope ends; a closed activation decides nothing.
        thread: The thread that opened it.
    """

    __slots__ = ("__weakref__", "closed", "parent", "payload", "slots", "thread", "watch")

    def __init__(self, payload: Any, watch: Watch | None = None) -> None:
        self.slots: list[Slot] = []
        self.payload = payload
        self.watch = watch
        self.parent: Activation | None = None
        self.closed = False
        self.thread = threading.get_ident()

    def open(self, slots: Iterable[Slot]) -> None:
        """Puts in the hooks; if anything goes wrong, none stays."""
        try:
            with lock:
                _finish_closing()
                for slot in slots:
                    self._add(slot)
                if self.watch is not None:
                    self.watch.start()
        except BaseException:
            self.close()
            raise

    def add(self, slot: Slot) -> None:
        """Installs one more slot's hook, or puts it in again."""
        with lock:
            if not self.closed:
                self._add(slot)

    def _add(self, slot: Slot) -> None:
        if self not in slot.users:
            self.slots.append(slot)
            slot.users.add(self)
        slot.install()

    def enter(self) -> None:
        """Takes force in the current context (and those copied from it later)."""
        self.parent = current_in_context()
        _in_context.set(self)

    def start(self) -> None:
        """Takes force in every context that has no activation of its own."""
        _process_wide.append(self)

    def close(self) -> list[Slot]:
        """Ends it everywhere, and takes out the hooks that nobody else needs.

        May be interrupted anywhere: it decides nothing from its first steps on, and what is left to be
        taken out then, the next call, or the next activation that opens or closes, takes out.

        Returns:
            The slots where somebody else's value stood instead of a hook.
        """
        with lock:
            _closing[self] = None
            self.closed = True
            _finish_closing(but=self)
            displaced = self._take_out()
        if _in_context.get() is not None:
            _in_context.set(current_in_context())
        return displaced

    def _take_out(self) -> list[Slot]:
        displaced = []
        while self in _process_wide:
            _process_wide.remove(self)
        if self.watch is not None:
            self.watch.stop()
        for slot in self.slots:
            if self in slot.users:
                slot.users.discard(self)
                if not slot.uninstall():
                    displaced.append(slot)
            elif not slot.users:  # an earlier try may have come this far
                slot.clear()
        HookedAttribute.sweep()
        # If a signal handler has opened a block meanwhile, that has taken out the rest.
        alone = self in _closing
        _closing.pop(self, None)
        return displaced if alone else []


_in_context: ContextVar[Activation | None] = ContextVar("quantpatch_activation", default=None)
_process_wide: list[Activation] = []
# Those that are being closed, or whose closing was interrupted.
_closing: dict[Activation, None] = {}
# Targets whose replacement is being built or called here: what it needs of its own target is float. With the
# activation that decided so: what an interrupt has left here goes with that.
within: ContextVar[tuple[Slot, Activation, Any] | None] = ContextVar("quantpatch_within", default=None)


def _finish_closing(but: Activation | None = None) -> None:
    """Takes out what an interrupted ``close`` has left."""
    for activation in list(_closing):
        if activation is not but:
            activation.closed = True
            activation._take_out()


def current_in_context() -> Activation | None:
    """The innermost open activation of this context alone."""
    activation = _in_context.get()
    while activation is not None and activation.closed:
        activation = activation.parent
    return activation


def current() -> Activation | None:
    """The activation in force: this context's, or else the last one started process-wide."""
    activation = _in_context.get()
    while activation is not None:
        if not activation.closed:
            return activation
        activation = activation.parent
    if _process_wide:
        return next((started for started in reversed(_process_wide[:]) if not started.closed), None)
    return None


def open_here() -> list[Activation]:
    """All that are open in this context or process-wide, the innermost first."""
    found = []
    activation = current_in_context()
    while activation is not None:
        if not activation.closed:
            found.append(activation)
        activation = activation.parent
    return found + [started for started in reversed(_process_wide[:]) if not started.closed]


def opened_here() -> list[Activation]:
    """The open activations of this context, and those that this thread has started process-wide."""
    here = threading.get_ident()
    return [a for a in open_here() if a not in _process_wide or a.thread == here]


def is_being_replaced(slot: Slot) -> bool:
    """Whether the target's replacement is at work here, to which its target is float."""
    return is_within(slot, within.get())


def is_within(slot: Slot, link: tuple[Slot, Activation, Any] | None) -> bool:
    """Whether a slot is among those whose replacement is at work."""
    while link is not None:
        if link[0] is slot and not link[1].closed:
            return True
        link = link[2]
    return False
