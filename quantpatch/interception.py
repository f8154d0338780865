"""Stand between a caller and a class it constructs (or a function it calls), and leave no trace after.

The requirement: while somebody is interested, ``Target(...)`` may come out as an instance of another
class, in the contexts that asked for it and in no other; afterwards every class and module dictionary
is what it was, keys in order and values by identity, whatever happened in between. This file knows
nothing of quantization and imports no torch.

A *slot* is the one attribute that carries a hook: ``__init__`` in a class's own dictionary, or a
function's name in its module. A hook asks the *activation* in force in its context which replacement
applies. Activations form a stack through their ``parent``; one that was closed is passed over, so
scopes may end in any order, in other threads, tasks and generators, and none outlives its end.
"""

from __future__ import annotations

import abc
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any, Final

__all__ = ["Activation", "Policy", "Slot", "current", "current_in_context", "lock"]


Hook = Callable[..., Any]


class _Missing:
    """What a slot held before, when its owner had no such attribute of its own: absent is a value."""


_MISSING: Final = _Missing()

#: Held for a few instructions at a time, never while user code runs. Re-entrant, because the garbage
#: collector may close a generator, and so a scope, at any allocation.
lock: Final = threading.RLock()

if hasattr(os, "register_at_fork"):  # the child's copy is whole, and not held by a thread it does not have
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


class Policy(abc.ABC):
    """Who decides what is built while an activation is in force."""

    @abc.abstractmethod
    def replacement_for(self, slot: Slot) -> Any | None:
        """What to use instead of the target now, or None to leave it alone.

        Args:
            slot: Where the call came in: an object of exactly the target is being built, or the function
                called.
        """

    def adopter_for(self, slot: Slot, cls: type) -> Callable[[Any], None] | None:
        """What to do with an object that is not replaced once the target's own ``__init__`` has run.

        Args:
            slot: Where the call came in.
            cls: The exact class under construction: the target, or a subclass whose own ``__init__`` may
                have more to do.

        Returns:
            A function that gets the object, or None to leave it alone.
        """
        return None


class Activation:
    """One opening of a scope.

    Attributes:
        slots: Where its hooks are. May grow while it is open (a target imported later).
        payload: The policy that decides, to be found again through ``current()``.
        parent: The activation in force where this one was opened.
        closed: Set once, when the scope ends; a closed activation decides nothing.
    """

    __slots__ = ("__weakref__", "closed", "parent", "payload", "slots")

    def __init__(self, slots: Iterable[Slot], payload: Any) -> None:
        self.slots: list[Slot] = []
        self.payload = payload
        self.parent: Activation | None = None
        self.closed = False
        with lock:
            try:
                for slot in slots:
                    slot.install()
                    self.slots.append(slot)
            except BaseException:
                self.close()
                raise

    def add(self, slot: Slot) -> None:
        """Installs one more slot's hook."""
        with lock:
            if not self.closed and slot not in self.slots:
                slot.install()
                self.slots.append(slot)

    def enter(self) -> None:
        """Takes force in the current context (and those copied from it later)."""
        self.parent = current_in_context()
        _in_context.set(self)

    def start(self) -> None:
        """Takes force in every context that has no activation of its own."""
        _process_wide.append(self)

    def close(self) -> list[Slot]:
        """Ends it everywhere, and takes out the hooks that nobody else needs.

        Returns:
            The slots where somebody else's value stood instead of a hook.
        """
        with lock:
            if self.closed:
                return []
            self.closed = True
            if self in _process_wide:
                _process_wide.remove(self)
            displaced = [slot for slot in self.slots if not slot.uninstall()]
            Slot.sweep()
        if _in_context.get() is not None:
            _in_context.set(current_in_context())
        return displaced


_in_context: ContextVar[Activation | None] = ContextVar("quantpatch_activation", default=None)
_process_wide: list[Activation] = []
# Targets whose replacement is being built or called here: what it needs of its own target is float.
_within: ContextVar[tuple[Slot, Any] | None] = ContextVar("quantpatch_within", default=None)


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
    try:
        return _process_wide[-1] if _process_wide else None
    except IndexError:  # another thread has just stopped it
        return None


def _is_within(slot: Slot, link: tuple[Slot, Any] | None) -> bool:
    while link is not None:
        if link[0] is slot:
            return True
        link = link[1]
    return False


class Slot(abc.ABC):
    """An attribute of a class or module that can carry a hook. One object for each, while in use.

    If somebody else has wrapped a hook when its last user leaves, it stays where it is, passes every
    call through, and is taken out once it is on top again.
    """

    _all: weakref.WeakValueDictionary[tuple[int, str], Slot] = weakref.WeakValueDictionary()
    # Hooks that somebody has written over, each with what it displaced. They live as long as somebody may
    # write them back; the slot is held by its hook, and held here it would in turn hold the hook.
    _lost: weakref.WeakKeyDictionary[Hook, tuple[weakref.ref[Slot], Any]] = weakref.WeakKeyDictionary()

    __slots__ = ("__weakref__", "_below", "_hook", "_users", "attribute", "owner", "target")

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        self.owner = owner
        self.attribute = attribute
        self.target = target
        self._users = 0
        self._hook: Hook | None = None  # kept when it is out, since making one is most of the cost
        self._below: Any = None  # what the hook displaces

    @staticmethod
    def of(module: ModuleType, name: str) -> Slot:
        """The slot of a module's class or function.

        Raises:
            AttributeError: The module has no such name.
            TypeError: It is neither a class nor a function, or a class that cannot carry a hook.
        """
        target = getattr(module, name)
        is_class = isinstance(target, type)
        owner, attribute = (target, "__init__") if is_class else (module, name)
        with lock:
            # A function that is hooked already is known by its slot, not by the hook seen from outside.
            slot = Slot._all.get((id(owner), attribute))
            if slot is None:  # it will keep its owner alive, so the id stays the owner's
                slot = (_ClassSlot if is_class else _FunctionSlot)(owner, attribute, target)
                Slot._all[id(owner), attribute] = slot
            return slot

    def install(self) -> None:
        """Makes sure that a hook is in place, for one more user. The caller holds the lock."""
        found, hook = self._read(), self._hook
        if hook is None or found is not hook:
            if hook is not None and found is self._below and not self._users:
                self._write(hook)
            elif not self._is_lost(found):
                # Nobody's yet, or somebody has written over ours since: one more on top does no harm.
                if self._users:
                    self._lose()
                hook = self.make_hook(found)
                self._write(hook)
                self._hook, self._below = hook, found
        self._users += 1

    def uninstall(self) -> bool:
        """Gives back what the hook displaced once its last user leaves. The caller holds the lock.

        Returns:
            Whether a hook was still in place.
        """
        found, hook = self._read(), self._hook
        self._users -= 1
        if hook is not None and found is hook:
            if not self._users:
                self._write(self._below)
            return True
        if not self._users:
            self._lose()  # for sweep to find
        return self._is_lost(found)

    def _lose(self) -> None:
        if self._hook is not None:
            Slot._lost[self._hook] = weakref.ref(self), self._below
            self._hook = None

    def _is_lost(self, found: Any) -> bool:
        return type(found) is FunctionType and found in Slot._lost and Slot._lost[found][0]() is self

    @classmethod
    def sweep(cls) -> None:
        """Takes out every idle hook that was under somebody else's and has come up again."""
        for hook, (reference, below) in list(cls._lost.items()):
            slot = reference()
            if slot is not None and not slot._users and slot._read() is hook:
                slot._write(below)

    def _read(self) -> Any:
        return self.owner.__dict__.get(self.attribute, _MISSING)

    @abc.abstractmethod
    def check(self, replacement: Any) -> None:
        """Raises TypeError, saying why, if the replacement cannot take the target's place."""

    @abc.abstractmethod
    def make_hook(self, displaced: Any) -> Hook:
        """A hook that asks the current activation, and otherwise does what ``displaced`` does."""

    @abc.abstractmethod
    def _write(self, value: Any) -> None:
        """Sets the owner's own attribute, or removes it if the value is ``_MISSING``."""


def _shared_bases(first: type, second: type) -> set[type]:
    return (set(first.__mro__) & set(second.__mro__)) - {object}


def _as_function(init: Any, target: Any) -> Callable[..., Any]:
    """What a class's own ``__init__`` (or its lack of one) does to an object, called with the object."""
    if type(init) is FunctionType:
        return init

    def run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if init is _MISSING:
            return super(target, self).__init__(*args, **kwargs)
        bind = getattr(type(init), "__get__", None)  # a mock, say, has none and does not get the object
        return (init if bind is None else bind(init, self, type(self)))(*args, **kwargs)

    return run


class _ClassSlot(Slot):
    """``__init__`` of a class: construction turns the new object into the replacement's before it runs."""

    __slots__ = ()

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        heap, immutable = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE
        if not target.__flags__ & heap or target.__flags__ & immutable:
            raise TypeError(f"{target.__qualname__} is implemented in C and cannot be replaced")
        super().__init__(owner, attribute, target)

    def check(self, replacement: Any) -> None:
        target = self.target
        if not isinstance(replacement, type):
            raise TypeError(f"{replacement!r} is no class")
        if replacement is target:
            raise TypeError("it is the target itself")
        if issubclass(target, replacement):
            raise TypeError(f"{replacement.__qualname__} is a base class of the target")
        if not issubclass(replacement, target) and not _shared_bases(replacement, target):
            raise TypeError(
                f"{replacement.__qualname__} is no subclass of {target.__qualname__}, and they share no base"
            )
        probe = object.__new__(target)
        try:
            object.__setattr__(probe, "__class__", replacement)
        except TypeError as error:
            raise TypeError(
                f"an object of {target.__qualname__} cannot become a {replacement.__qualname__} ({error})"
            ) from None

    def _write(self, value: Any) -> None:
        if value is _MISSING:
            type.__delattr__(self.owner, self.attribute)
        else:
            type.__setattr__(self.owner, self.attribute, value)

    def make_hook(self, displaced: Any) -> Hook:
        slot, target = self, self.target
        become = object.__setattr__
        base_init = _as_function(displaced, target)

        @functools.wraps(target.__init__)
        def __init__(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            activation = current()
            if activation is not None:
                within = _within.get()
                if within is not None and within[0] is slot and type(self) is not target:
                    # The replacement has come to its base: what the base builds inside is replaced again.
                    token = _within.set(within[1])
                    try:
                        return base_init(self, *args, **kwargs)
                    finally:
                        _within.reset(token)
                if within is None or not _is_within(slot, within):
                    cls = type(self)
                    replacement = activation.payload.replacement_for(slot) if cls is target else None
                    if replacement is not None:
                        become(self, "__class__", replacement)
                        token = _within.set((slot, within))
                        try:
                            return replacement.__init__(self, *args, **kwargs)
                        finally:
                            _within.reset(token)
                    adopt = activation.payload.adopter_for(slot, cls)
                    if adopt is not None:
                        base_init(self, *args, **kwargs)
                        return adopt(self)
            return base_init(self, *args, **kwargs)

        return __init__


class _FunctionSlot(Slot):
    """A function under its name in a module: a dispatcher stands in its place."""

    __slots__ = ()

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        if not callable(target):
            raise TypeError(f"it is {target!r}, neither a class nor a function")
        super().__init__(owner, attribute, target)

    def check(self, replacement: Any) -> None:
        if isinstance(replacement, type) or not callable(replacement):
            raise TypeError(f"the target is a function, and {replacement!r} is none")
        if replacement is self.target:
            raise TypeError("it is the target itself")

    def _write(self, value: Any) -> None:
        if value is _MISSING:
            del vars(self.owner)[self.attribute]
        else:
            vars(self.owner)[self.attribute] = value

    def make_hook(self, displaced: Any) -> Hook:
        slot, original = self, (self.target if displaced is _MISSING else displaced)

        @functools.wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            activation = current()
            if activation is not None:
                within = _within.get()
                if not _is_within(slot, within):
                    replacement = activation.payload.replacement_for(slot)
                    if replacement is not None:
                        token = _within.set((slot, within))
                        try:
                            return replacement(*args, **kwargs)
                        finally:
                            _within.reset(token)
            return original(*args, **kwargs)

        return dispatch
