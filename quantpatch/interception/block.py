"""A block: who decides what is built in a context, from its opening to its end.

Blocks form a stack through their ``parent``; one that was closed is passed over, so blocks may end
in any order, in other threads, tasks and generators, and none outlives its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from quantpatch.interception.construction import settle
from quantpatch.interception.slots import HookedAttribute, lock

if TYPE_CHECKING:
    from quantpatch.interception.hooks import Slot


class _Watch(Protocol):
    """What a block starts and stops with its hooks; stopping twice is harmless."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Block:
    """One opening of a block; a subclass decides what comes of what is built in it.

    Attributes:
        slots: Where its hooks are. May grow while it is open (a target imported later).
        scope: What was opened, to be shown in messages.
        watch: What it starts and stops with its hooks.
        parent: The block in force where this one was opened.
        closed: Set once, when it ends; a closed block decides nothing.
        thread: The thread that opened it.
    """

    __slots__ = ("__weakref__", "closed", "parent", "scope", "slots", "thread", "watch")

    def __init__(self, scope: object = None, watch: _Watch | None = None) -> None:
        self.slots: list[Slot] = []
        self.scope = scope
        self.watch = watch
        self.parent: Block | None = None
        self.closed = False
        self.thread = threading.get_ident()

    # --- what is built in it -------------------------------------------------------------------

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

    # --- opening and closing -------------------------------------------------------------------

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
        """Takes force in every context that has no block of its own."""
        _process_wide.append(self)

    def close(self) -> list[Slot]:
        """Ends it everywhere, and takes out the hooks that no other block needs.

        May be interrupted anywhere: it decides nothing from its first steps on, and what is left to be
        taken out then, the next call, or the next block that opens or closes, takes out.

        Returns:
            The slots where another library's value stood instead of a hook.
        """
        with lock:
            _closing[self] = None
            self.closed = True
            _finish_closing(but=self)
            displaced = self._take_out()
        if _in_context.get() is not None:
            _in_context.set(current_in_context())
        settle()
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


_in_context: ContextVar[Block | None] = ContextVar("quantpatch_block", default=None)
_process_wide: list[Block] = []
# Those that are being closed, or whose closing was interrupted.
_closing: dict[Block, None] = {}
# Targets whose replacement is being built or called here: what it needs of its own target is float. With the
# block that decided so: what an interrupt has left here goes with that.
within: ContextVar[tuple[Slot, Block, Any] | None] = ContextVar("quantpatch_within", default=None)


def _finish_closing(but: Block | None = None) -> None:
    """Takes out what an interrupted ``close`` has left."""
    for block in list(_closing):
        if block is not but:
            block.closed = True
            block._take_out()


def current_in_context() -> Block | None:
    """The innermost open block of this context alone."""
    block = _in_context.get()
    while block is not None and block.closed:
        block = block.parent
    return block


def current() -> Block | None:
    """The block in force: this context's, or else the last one started process-wide."""
    block = _in_context.get()
    while block is not None:
        if not block.closed:
            return block
        block = block.parent
    if _process_wide:
        return next((started for started in reversed(_process_wide[:]) if not started.closed), None)
    return None


def open_here() -> list[Block]:
    """All that are open in this context or process-wide, the innermost first."""
    found = []
    block = current_in_context()
    while block is not None:
        if not block.closed:
            found.append(block)
        block = block.parent
    return found + [started for started in reversed(_process_wide[:]) if not started.closed]


def opened_here() -> list[Block]:
    """The open blocks of this context, and those that this thread has started process-wide."""
    here = threading.get_ident()
    return [a for a in open_here() if a not in _process_wide or a.thread == here]


def is_being_replaced(slot: Slot) -> bool:
    """Whether the target's replacement is at work here, to which its target is float."""
    return is_within(slot, within.get())


def is_within(slot: Slot, link: tuple[Slot, Block, Any] | None) -> bool:
    """Whether a slot is among those whose replacement is at work."""
    while link is not None:
        if link[0] is slot and not link[1].closed:
            return True
        link = link[2]
    return False
