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
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import FunctionType, MethodType, ModuleType
from typing import Any, Protocol

from quantpatch.mimicry import inheriting, is_made_here
from quantpatch.slots import MISSING, HookedAttribute, lock

__all__ = ["Activation", "Policy", "Slot", "current", "current_in_context", "is_being_replaced", "lock"]

Hook = Callable[..., Any]


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
    """

    __slots__ = ("__weakref__", "closed", "parent", "payload", "slots", "watch")

    def __init__(self, payload: Any, watch: Watch | None = None) -> None:
        self.slots: list[Slot] = []
        self.payload = payload
        self.watch = watch
        self.parent: Activation | None = None
        self.closed = False

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
                slot._take_out()
        Slot.sweep()
        # If a signal handler has opened a block meanwhile, that has taken out the rest.
        alone = self in _closing
        _closing.pop(self, None)
        return displaced if alone else []


_in_context: ContextVar[Activation | None] = ContextVar("quantpatch_activation", default=None)
_process_wide: list[Activation] = []
# Those that are being closed, or whose closing was interrupted.
_closing: dict[Activation, None] = {}
# Targets whose replacement is being built or called here: what it needs of its own target is float.
_within: ContextVar[tuple[Slot, Any] | None] = ContextVar("quantpatch_within", default=None)


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


def is_being_replaced(slot: Slot) -> bool:
    """Whether the target's replacement is at work here, to which its target is float."""
    return _is_within(slot, _within.get())


def _is_within(slot: Slot, link: tuple[Slot, Any] | None) -> bool:
    while link is not None:
        if link[0] is slot:
            return True
        link = link[1]
    return False


class Slot(HookedAttribute):
    """An attribute of a class or module that can carry a hook. One object for each, while in use.

    Attributes:
        target: The class or function.
    """

    _all: weakref.WeakValueDictionary[tuple[int, str], Slot] = weakref.WeakValueDictionary()

    __slots__ = ("target",)

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        super().__init__(owner, attribute)
        self.target = target

    @staticmethod
    def of(module: ModuleType, name: str) -> Slot:
        """The slot of a module's class or function.

        Raises:
            AttributeError: The module has no such name.
            TypeError: It is neither a class nor a function, or a class that cannot carry a hook.
        """
        target = getattr(module, name)
        if isinstance(target, type):
            return Slot.of_class(target)
        # A function that is hooked already is known by its slot, not by the hook seen from outside.
        return Slot._known(_FunctionSlot, module, name, target)

    @staticmethod
    def of_class(target: type) -> Slot:
        """The slot of a class.

        Raises:
            TypeError: It cannot carry a hook.
        """
        return Slot._known(_ClassSlot, target, "__init__", target)

    @staticmethod
    def of_root(target: type) -> Slot:
        """The slot of a class by whose ``__init__`` all objects of its subclasses come.

        Its hook replaces nothing: it tells of every object.
        """
        return Slot._known(_RootSlot, target, "__init__", target)

    @staticmethod
    def _known(kind: type[Slot], owner: Any, attribute: str, target: Any) -> Slot:
        with lock:
            slot = Slot._all.get((id(owner), attribute))
            if slot is None:  # it will keep its owner alive, so the id stays the owner's
                slot = kind(owner, attribute, target)
                Slot._all[id(owner), attribute] = slot
            return slot

    @abc.abstractmethod
    def check(self, replacement: Any) -> None:
        """Raises TypeError, saying why, if the replacement cannot take the target's place."""


def _as_function(init: Any, target: Any) -> Callable[..., Any]:
    """What a class's own ``__init__`` (or its lack of one) does to an object, called with the object."""
    if type(init) is FunctionType:
        return init

    def run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if init is MISSING:
            return super(target, self).__init__(*args, **kwargs)
        bind = getattr(type(init), "__get__", None)  # a mock, say, has none and does not get the object
        return (init if bind is None else bind(init, self, type(self)))(*args, **kwargs)

    return run


class _Init:
    """``__init__`` of a class while it is hooked: objects come by here, the class itself shows its own.

    What asks the class (``inspect``, ``help``, a builder that reads ``Target.__init__.__code__``, a library
    that saves it) gets the function that it would get without the hook.
    """

    __slots__ = ("__weakref__", "_act", "_below", "_inherited", "_target")

    def __init__(self, target: type, below: Any) -> None:
        self._target = target
        self._below = below
        self._inherited: Any = None  # made where it is asked for
        self._act: Callable[..., Any] = self.run_below

    def acts_by(self, function: Callable[..., Any]) -> None:
        """Sets what objects come by."""
        self._act = function

    def run_below(self, thing: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Does what the class would do without the hook."""
        return _as_function(self.displaced, self._target)(thing, *args, **kwargs)

    @property
    def displaced(self) -> Any:
        """What the class's dictionary held; or what a tool that edits functions has made of it since."""
        inherited = self._inherited
        if self._below is MISSING and inherited is not None and not is_made_here(inherited):
            return inherited
        return self._below

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._shown(owner) if instance is None else MethodType(self._act, instance)

    def _shown(self, owner: Any) -> Any:
        below = self._below
        if below is not MISSING:
            return below.__get__(None, owner) if hasattr(type(below), "__get__") else below
        if self._inherited is None:
            # Not the base's own function: who edits what it finds in this class must not edit the base.
            self._inherited = inheriting(self._target, "__init__")
        return self._inherited

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._act(*args, **kwargs)  # who has found it in the class's dictionary and wraps it

    def __getattr__(self, name: str) -> Any:
        if name == "_act":
            raise AttributeError(name)
        return getattr(self._act, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Who pickles the class by value takes what it is without the hook.
        return copy.copy, (self._shown(self._target),)


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
        shared = (set(replacement.__mro__) & set(target.__mro__)) - {object}
        if not issubclass(replacement, target) and not shared:
            raise TypeError(
                f"{replacement.__qualname__} is no subclass of {target.__qualname__}, and they share no base"
            )
        _check_creation(target, replacement)
        probe = object.__new__(target)
        try:
            object.__setattr__(probe, "__class__", replacement)
        except TypeError as error:
            raise TypeError(
                f"an object of {target.__qualname__} cannot become a {replacement.__qualname__} ({error})"
            ) from None

    def _write(self, value: Any) -> None:
        if value is not MISSING:
            type.__setattr__(self.owner, self.attribute, value)
        elif self.attribute in vars(self.owner):
            type.__delattr__(self.owner, self.attribute)

    def _displaced_by(self, hook: Any) -> Any:
        return hook.displaced

    def _make_hook(self, displaced: Any) -> Hook:
        slot, target = self, self.target
        become = object.__setattr__
        init = _Init(target, displaced)
        base_init = displaced if type(displaced) is FunctionType else init.run_below

        @functools.wraps(displaced if type(displaced) is FunctionType else target.__init__)
        def __init__(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            activation = current()
            if activation is None:
                return base_init(self, *args, **kwargs)
            within = _within.get()
            cls = type(self)
            if within is not None:
                if within[0] is slot and cls is not target:
                    # The replacement has come to its base: what the base builds inside is replaced again.
                    token = _within.set(within[1])
                    try:
                        return base_init(self, *args, **kwargs)
                    finally:
                        _within.reset(token)
                if _is_within(slot, within):
                    return base_init(self, *args, **kwargs)
            policy: Policy = activation.payload
            if cls is not target:
                result = base_init(self, *args, **kwargs)
                policy.subclass_came_out(slot, self)
                return result
            replacement = policy.replacement_for(slot)
            if replacement is None:
                result = base_init(self, *args, **kwargs)
            else:
                become(self, "__class__", replacement)
                token = _within.set((slot, within))
                try:
                    result = self.__init__(*args, **kwargs)
                finally:
                    _within.reset(token)
            policy.came_out(slot)
            return result

        init.acts_by(__init__)
        return init


def _check_creation(target: type, replacement: type) -> None:
    """Raises TypeError for what would not run: the object exists already when its replacement is known."""
    new = inspect.getattr_static(replacement, "__new__")
    if new is not inspect.getattr_static(target, "__new__") and new is not object.__dict__["__new__"]:
        owner = next(cls for cls in replacement.__mro__ if "__new__" in vars(cls))
        raise TypeError(
            f"the __new__ of {owner.__qualname__} would not run, as the object is made by "
            f"{target.__qualname__} before it becomes a {replacement.__qualname__}; do its work in __init__"
        )
    meta, call = type(replacement), inspect.getattr_static(type(replacement), "__call__")
    if call is not inspect.getattr_static(type(target), "__call__") and call is not type.__dict__["__call__"]:
        raise TypeError(
            f"the __call__ of its metaclass {meta.__qualname__} would not run, as {target.__qualname__} is "
            f"what is called; do its work in __init__"
        )


class _RootSlot(_ClassSlot):
    """``__init__`` of a class whose subclasses are watched."""

    __slots__ = ()

    def check(self, replacement: Any) -> None:
        raise TypeError(f"{self.target.__qualname__} is what all modules are made of")

    def _displaced_by(self, hook: Any) -> Any:
        return Slot._made[hook][1]

    def uninstall(self) -> bool:
        super().uninstall()
        return True  # what wraps it calls it, since no object is a module without

    def _make_hook(self, displaced: Any) -> Hook:
        slot, base_init = self, _as_function(displaced, self.target)

        @functools.wraps(self.target.__init__)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
            base_init(self, *args, **kwargs)
            activation = current()
            # One that other code has wrapped for good, as torch.compile does, leaves it to the one above.
            if activation is not None and slot._kept is not None and slot._kept[0] is __init__:
                activation.payload.passed_root(self)

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
        if value is not MISSING:
            vars(self.owner)[self.attribute] = value
        else:
            vars(self.owner).pop(self.attribute, None)

    def _make_hook(self, displaced: Any) -> Hook:
        slot, original = self, (self.target if displaced is MISSING else displaced)

        @functools.wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            activation = current()
            if activation is not None:
                within = _within.get()
                if not _is_within(slot, within):
                    policy: Policy = activation.payload
                    replacement = policy.replacement_for(slot)
                    if replacement is None:
                        result = original(*args, **kwargs)
                    else:
                        token = _within.set((slot, within))
                        try:
                            result = replacement(*args, **kwargs)
                        finally:
                            _within.reset(token)
                    policy.came_out(slot)
                    return result
            return original(*args, **kwargs)

        return dispatch
