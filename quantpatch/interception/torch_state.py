"""Whether PyTorch is what it was: its dictionaries, keys in order and values by identity."""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

import attrs
import torch
from torch import nn

from quantpatch.interception.block import Block, opened_here
from quantpatch.interception.torch_settings import Setting, Settings


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


#: Stands for an attribute that there is not.
ABSENT: Final = _Absent()


@attrs.frozen(eq=False)
class Change:
    """An attribute of torch that is another than it was.

    Attributes:
        owner: The module or class.
        name: Name of the attribute; empty if only the order of the attributes changed.
        old: What it was, or ``ABSENT``.
        new: What it is, or ``ABSENT``.
    """

    owner: Any
    name: str
    old: Any = ABSENT
    new: Any = ABSENT

    def __str__(self) -> str:
        owner = self.owner
        where = (
            owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        )
        if not self.name:
            return f"{where}: the order of its attributes"
        return f"{where}.{self.name}: {self.old!r} became {self.new!r}"

    def undo(self) -> None:
        """Puts back what was there."""
        if not self.name:
            return
        # Straight to where it lies: torch's modules have a __setattr__ of their own.
        write = type.__setattr__ if isinstance(self.owner, type) else ModuleType.__setattr__
        remove = type.__delattr__ if isinstance(self.owner, type) else ModuleType.__delattr__
        if self.old is ABSENT:
            remove(self.owner, self.name)
        else:
            write(self.owner, self.name, self.old)


@functools.cache
def owners() -> tuple[Any, ...]:
    """The classes of ``torch.nn``, ``Tensor``, and the modules ``torch``, ``nn`` and ``nn.functional``."""
    parts = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(nn.modules.__path__, "torch.nn.modules.")
    ]
    classes = {
        value: None
        for module in (nn, *parts)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("torch.nn")
    }
    return (*classes, torch.Tensor, nn, nn.functional, torch)


# Where code of others may put things too; what these keep for themselves has a name with an underscore.
_FURTHER = (
    "amp autograd distributions fft linalg nn.init nn.utils optim optim.lr_scheduler random special "
    "utils.data"
)


@functools.cache
def further_owners() -> tuple[Any, ...]:
    """Other parts of torch that are there once it is imported, and the classes in them."""
    named = (sys.modules.get(f"torch.{name}") for name in _FURTHER.split())
    modules = [module for module in named if module is not None]
    classes = {
        value: None
        for module in modules
        for name, value in vars(module).copy().items()
        if isinstance(value, type) and value.__module__.startswith("torch.") and not name.startswith("_")
    }
    return (*modules, *(cls for cls in classes if cls not in owners()))


class Snapshot:
    """What torch is made of at this moment, to be compared with later.

    Args:
        further: Whether to take those of ``further_owners`` as well.
    """

    def __init__(self, *, further: bool = False) -> None:
        parts = (*owners(), *further_owners()) if further else owners()
        held = [(owner, vars(owner).copy()) for owner in parts]
        self._dicts = [(owner, list(found), list(found.values())) for owner, found in held]
        self._meta_path = list(sys.meta_path)

    def changes(self) -> list[Change]:
        """What is different now. What torch or Python add by themselves in use does not count."""
        return [change for owner, keys, values in self._dicts for change in _changes(owner, keys, values)]

    def differences(self) -> list[str]:
        """The same as sentences, and whether ``sys.meta_path`` is different."""
        found = [str(change) for change in self.changes()]
        now = sys.meta_path
        if len(now) != len(self._meta_path) or not all(map(operator.is_, now, self._meta_path)):
            found.append(f"sys.meta_path: {self._meta_path} became {now}")
        return found

    def had(self, value: Any) -> bool:
        """Whether a value was there, under whatever name."""
        return any(value is held for _, _, values in self._dicts for held in values)


def _is_added_in_use(owner: Any, key: str, value: Any) -> bool:
    if isinstance(owner, ModuleType):  # a submodule that torch imports when it is first used
        return key == "__warningregistry__" or sys.modules.get(f"{owner.__name__}.{key}", owner) is value
    # Notes on a class: Python's, when an object of it is first copied or pickled, and the compiler's.
    return key == "__slotnames__" or key.startswith("___")


def _changes(owner: Any, keys: list[str], values: list[Any]) -> list[Change]:
    now = vars(owner).copy()  # in one piece: other threads may come in between two steps of a loop
    if list(now) == keys and all(map(operator.is_, now.values(), values)):
        return []
    was = dict(zip(keys, values, strict=True))
    new = [key for key in now if key not in was and not _is_added_in_use(owner, key, now[key])]
    found = [
        *(Change(owner, key, was[key], now[key]) for key in keys if key in now and now[key] is not was[key]),
        *(Change(owner, key, was[key], ABSENT) for key in keys if key not in now),
        *(Change(owner, key, ABSENT, now[key]) for key in new),
    ]
    if not found and [key for key in now if key in was] != keys:
        found.append(Change(owner, ""))
    return found


# --- code that may not change torch ------------------------------------------------------------


@attrs.frozen(eq=False)
class LeftOpen:
    """A block that was opened and not closed.

    Attributes:
        block: The block.
    """

    block: Block

    def __str__(self) -> str:
        return f"a block was left open: {self.block.scope!r}"

    def undo(self) -> None:
        """Closes it."""
        self.block.close()


#: What code of others has done to torch.
Trace = Change | Setting | LeftOpen

_last: Snapshot | None = None  # good as long as nothing has changed since: comparing is cheaper than taking


@contextlib.contextmanager
def protected(changes: list[Trace]) -> Iterator[None]:
    """A block after which torch is what it was before, whatever code of others did in it.

    What torch itself changes (some of its parts do when they are imported) stays, and so do the hooks
    of blocks that other threads open or leave meanwhile.

    Args:
        changes: What was taken back is added to it.
    """
    global _last
    if _last is None or _last.changes():
        _last = Snapshot(further=True)
    before, settings, blocks = _last, Settings(), opened_here()
    try:
        yield
    finally:
        left = [LeftOpen(block) for block in opened_here() if block not in blocks]
        found = [c for c in before.changes() if _is_foreign(c, before)]
        traces: list[Trace] = [*left, *found, *settings.changes()]
        for change in traces:
            change.undo()
            changes.append(change)


def _is_foreign(change: Change, before: Snapshot) -> bool:
    """Whether it is neither torch's own doing nor a hook of quantpatch that came or went."""
    if not change.name or _home(change.old) == "quantpatch":
        return False
    is_private = change.name.startswith("_") and not change.name.startswith("__")
    if is_private and any(change.owner is owner for owner in further_owners()):
        return False
    home = _home(change.new)
    # A part of torch in another part's place comes from the code that ran.
    return home != "quantpatch" and (home != "torch" or before.had(change.new))


def _home(value: Any) -> str:
    """The top-level package whose code made a value."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    if value is ABSENT:
        return ""
    module = value.__module__ if isinstance(value, type) else type(value).__module__
    # A decorator may have given a function the name of another's module; what it runs in cannot lie.
    return str(getattr(value, "__globals__", {}).get("__name__", module)).partition(".")[0]
