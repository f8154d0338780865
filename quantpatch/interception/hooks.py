"""Stand between a caller and a class it constructs (or a function it calls), and leave no trace after.

The requirement: while a block wants it, ``Target(...)`` may come out as an instance of another
class, in the contexts that asked for it and in no other; afterwards every class and module dictionary
is what it was, keys in order and values by identity, whatever happened in between. This file knows
nothing of quantization and imports no torch.

A *slot* is the one attribute that carries a hook: ``__init__`` in a class's own dictionary, or a
function's name in its module. A hook asks the *block* in force in its context which replacement
applies.
"""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from quantpatch.interception import block as blocks
from quantpatch.interception.block import current, is_within, within
from quantpatch.interception.fitness import check_class
from quantpatch.interception.hooked_init import HookedInit, as_function
from quantpatch.interception.slots import MISSING, HookedAttribute, lock

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

        Its hook replaces nothing: it reports every object.
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


_MARK = "__quantpatch__"


class _Mark:
    """On a function that is a hook: whose it is, and what it displaced."""

    __slots__ = ("displaced", "hook", "slot")

    def __init__(self, hook: Any, slot: Slot, displaced: Any) -> None:
        self.hook = hook
        self.slot = slot
        self.displaced = displaced

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a function that is pickled by value is not a hook any more

    @staticmethod
    def on(hook: Any, slot: Slot, displaced: Any) -> None:
        vars(hook)[_MARK] = _Mark(hook, slot, displaced)

    @staticmethod
    def of(found: Any, slot: Slot) -> _Mark | None:
        mark = vars(found).get(_MARK) if type(found) is FunctionType else None
        # functools.wraps copies what it finds on a function, this as well.
        return mark if mark is not None and mark.hook is found and mark.slot is slot else None


class _ClassSlot(Slot):
    """``__init__`` of a class: construction turns the new object into the replacement's before it runs."""

    __slots__ = ()

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        heap, immutable = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE
        if not target.__flags__ & heap or target.__flags__ & immutable:
            raise TypeError(f"{target.__qualname__} is implemented in C and cannot be replaced")
        super().__init__(owner, attribute, target)

    def check(self, replacement: Any) -> None:
        check_class(self.target, replacement)

    def _write(self, value: Any) -> None:
        if value is not MISSING:
            type.__setattr__(self.owner, self.attribute, value)
        elif self.attribute in vars(self.owner):
            type.__delattr__(self.owner, self.attribute)

    def _is_hook_of_mine(self, found: Any) -> bool:
        return type(found) is HookedInit and found.slot is self

    def _displaced_by(self, hook: Any) -> Any:
        return hook.displaced

    def _make_hook(self, displaced: Any) -> Hook:
        slot, target = self, self.target
        become = object.__setattr__
        init = HookedInit(self, target, displaced)
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


class _MarkedSlot(Slot):
    """One whose hook is a plain function, with a mark."""

    __slots__ = ()

    def _is_hook_of_mine(self, found: Any) -> bool:
        return _Mark.of(found, self) is not None

    def _displaced_by(self, hook: Any) -> Any:
        return vars(hook)[_MARK].displaced


class _RootSlot(_MarkedSlot, _ClassSlot):
    """``__init__`` of a class whose subclasses are watched."""

    __slots__ = ()

    def check(self, replacement: Any) -> None:
        raise TypeError(f"{self.target.__qualname__} is the base class of all modules")

    def uninstall(self) -> bool:
        super().uninstall()
        return True  # what wraps it calls it, since no object is a module without

    def _make_hook(self, displaced: Any) -> Hook:
        slot, base_init = self, as_function(displaced, self.target)

        @functools.wraps(self.target.__init__)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
            base_init(self, *args, **kwargs)
            block = current()
            # One that other code has wrapped for good, as torch.compile does, leaves it to the one above.
            if block is not None and slot._kept is not None and slot._kept[0] is __init__:
                block.passed_root(self)

        _Mark.on(__init__, slot, displaced)
        return __init__


class _FunctionSlot(_MarkedSlot):
    """A function under its name in a module: a dispatcher stands in its place."""

    __slots__ = ()

    def __init__(self, owner: Any, attribute: str, target: Any) -> None:
        if not callable(target):
            raise TypeError(f"it is {target!r}, neither a class nor a function")
        super().__init__(owner, attribute, target)

    def check(self, replacement: Any) -> None:
        if isinstance(replacement, type) or not callable(replacement):
            raise TypeError(f"the target is a function, and {replacement!r} is not")
        if replacement is self.target:
            raise TypeError("it is the target itself")

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
