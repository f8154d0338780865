"""Stand between a caller and a class it constructs (or a function it calls), and leave no trace after.

The requirement: while somebody is interested, ``Target(...)`` may come out as an instance of another
class, in the contexts that asked for it and in no other; afterwards every class and module dictionary
is what it was, keys in order and values by identity, whatever happened in between. This file knows
nothing of quantization and imports no torch.

A *slot* is the one attribute that carries a hook: ``__init__`` in a class's own dictionary, or a
function's name in its module. A hook asks the *block* in force in its context which replacement
applies.
"""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from quantpatch.interception import block as blocks
from quantpatch.interception.block import (
    Block,
    current,
    current_in_context,
    is_being_replaced,
    is_within,
    within,
)
from quantpatch.interception.mimicry import inheriting, is_made_here
from quantpatch.interception.slots import MISSING, HookedAttribute, lock

__all__ = ["Block", "Slot", "current", "current_in_context", "is_being_replaced", "lock"]

Hook = Callable[..., Any]


class Slot(HookedAttribute):
    """An attribute of a class or module that can carry a hook. One object for each, while in use.

    Attributes:
        target: The class or function.
    """

    _all: dict[tuple[int, str], weakref.ref[Slot]] = {}

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # it is of this process; hooks that are pickled by value do without

    @staticmethod
    def _known(kind: type[Slot], owner: Any, attribute: str, target: Any) -> Slot:
        with lock:
            reference = Slot._all.get((id(owner), attribute))
            slot = None if reference is None else reference()
            if slot is None:  # it will keep its owner alive, so the id stays the owner's
                if len(Slot._all) > 1000:
                    Slot._all = {key: known for key, known in Slot._all.items() if known() is not None}
                slot = kind(owner, attribute, target)
                Slot._all[id(owner), attribute] = weakref.ref(slot)
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


_MARK = "__quantpatch__"


class _Mark:
    """On a function that is a hook: whose it is, and what it displaced."""

    __slots__ = ("displaced", "hook", "slot")

    def __init__(self, hook: Any, slot: Slot, displaced: Any) -> None:
        self.hook = hook
        self.slot = slot
        self.displaced = displaced

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a function that is pickled by value is no hook any more

    @staticmethod
    def on(hook: Any, slot: Slot, displaced: Any) -> None:
        vars(hook)[_MARK] = _Mark(hook, slot, displaced)

    @staticmethod
    def of(found: Any, slot: Slot) -> _Mark | None:
        mark = vars(found).get(_MARK) if type(found) is FunctionType else None
        # functools.wraps copies what it finds on a function, this as well.
        return mark if mark is not None and mark.hook is found and mark.slot is slot else None


class _Init:
    """``__init__`` of a class while it is hooked: objects come by here, the class itself shows its own.

    What asks the class (``inspect``, ``help``, a builder that reads ``Target.__init__.__code__``, a library
    that saves it) gets the function that it would get without the hook.
    """

    __slots__ = ("__weakref__", "_act", "_below", "_inherited", "_target", "slot")

    def __init__(self, slot: Slot, below: Any) -> None:
        self.slot = slot
        self._target = slot.target
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

    def _is_hook_of_mine(self, found: Any) -> bool:
        return type(found) is _Init and found.slot is self

    def _displaced_by(self, hook: Any) -> Any:
        return hook.displaced

    def _make_hook(self, displaced: Any) -> Hook:
        slot, target = self, self.target
        become = object.__setattr__
        init = _Init(self, displaced)
        base_init = displaced if type(displaced) is FunctionType else init.run_below

        @functools.wraps(displaced if type(displaced) is FunctionType else target.__init__)
        def __init__(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            block = current()
            if block is None:
                return base_init(self, *args, **kwargs)
            inside = within.get()
            cls = type(self)
            if inside is not None:
                if inside[0] is slot and cls is not target:
                    # The replacement has come to its base: what the base builds inside is replaced again.
                    try:
                        within.set(inside[2])
                        return base_init(self, *args, **kwargs)
                    finally:
                        within.set(inside)
                if is_within(slot, inside):
                    return base_init(self, *args, **kwargs)
            if cls is not target:
                result = base_init(self, *args, **kwargs)
                block.subclass_came_out(slot, self)
                return result
            replacement = block.replacement_for(slot)
            if replacement is None:
                result = base_init(self, *args, **kwargs)
            else:
                become(self, "__class__", replacement)
                try:
                    within.set((slot, block, inside))
                    result = self.__init__(*args, **kwargs)
                finally:
                    within.set(inside)
            block.came_out(slot)
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

    def _is_hook_of_mine(self, found: Any) -> bool:
        return _Mark.of(found, self) is not None

    def _displaced_by(self, hook: Any) -> Any:
        return vars(hook)[_MARK].displaced

    def uninstall(self) -> bool:
        super().uninstall()
        return True  # what wraps it calls it, since no object is a module without

    def _make_hook(self, displaced: Any) -> Hook:
        slot, base_init = self, _as_function(displaced, self.target)

        @functools.wraps(self.target.__init__)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
            base_init(self, *args, **kwargs)
            block = current()
            # One that other code has wrapped for good, as torch.compile does, leaves it to the one above.
            if block is not None and slot._kept is not None and slot._kept[0] is __init__:
                block.passed_root(self)

        _Mark.on(__init__, slot, displaced)
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

    def _is_hook_of_mine(self, found: Any) -> bool:
        return _Mark.of(found, self) is not None

    def _displaced_by(self, hook: Any) -> Any:
        return vars(hook)[_MARK].displaced

    def _write(self, value: Any) -> None:
        if value is not MISSING:
            vars(self.owner)[self.attribute] = value
        else:
            vars(self.owner).pop(self.attribute, None)

    def _make_hook(self, displaced: Any) -> Hook:
        slot: Slot | None = self
        original = self.target if displaced is MISSING else displaced

        @functools.wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            block = current()
            if block is not None and slot is not None:  # None where a pickle has brought this
                inside = blocks.within.get()  # as the module's, since no pickle holds a ContextVar
                if not is_within(slot, inside):
                    replacement = block.replacement_for(slot)
                    if replacement is None:
                        result = original(*args, **kwargs)
                    else:
                        try:
                            blocks.within.set((slot, block, inside))
                            result = replacement(*args, **kwargs)
                        finally:
                            blocks.within.set(inside)
                    block.came_out(slot)
                    return result
            return original(*args, **kwargs)

        _Mark.on(dispatch, self, displaced)
        return dispatch
