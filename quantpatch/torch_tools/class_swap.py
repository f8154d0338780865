"""Classes: where they are found, which one a layer is really of, and making it one of another."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from torch.nn.utils import parametrize


def dotted(thing: Any) -> str:
    """Where a class or function is found: ``module.Qualified.Name``."""
    return f"{thing.__module__}.{thing.__qualname__}"


def written_name(cls: type[Any]) -> str:
    """A class's name as its author wrote it; what a quantized block goes by is its float class's."""
    name: str = vars(cls).get("_written_name", cls.__name__)
    return name


def own_class(layer: nn.Module) -> type[Any]:
    """A layer's class, looking through the one that ``parametrize`` puts around it."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls


def change_class(layer: nn.Module, cls: type[Any]) -> None:
    """Makes a layer one of another class of the same layout; what ``parametrize`` put around it stays."""
    if parametrize.is_parametrized(layer):
        cls = _parametrized(cls, like=type(layer))
    object.__setattr__(layer, "__class__", cls)


class Overlay(property):
    """A property over what a class has under its name; a class made after that one has this as it was.

    Attributes:
        covers: What the class itself has under the name, if it has anything.
    """

    covers: tuple[Any, ...] = ()


class _Unseen:
    """First base of a class that is being made: no other ``__init_subclass__`` is called for it."""

    def __init_subclass__(cls) -> None:
        pass


def make_class(name: str, bases: tuple[type[Any], ...], members: Mapping[str, Any]) -> type[Any]:
    """A class that code which watches for new classes, such as a registry of subclasses, does not see.

    Neither the ``__init_subclass__`` of a base, nor a metaclass's ``__new__``, ``__init__`` and ``__call__``,
    nor the ``__set_name__`` of a member run. ``type.__subclasses__`` alone lists it, as long as it lives.

    Args:
        name: Its name.
        bases: Its base classes.
        members: What its dictionary holds.

    Raises:
        TypeError: Python cannot combine the bases.
    """
    meta: type[Any] = type
    for base in bases:
        if issubclass(type(base), meta):
            meta = type(base)
        elif not issubclass(meta, type(base)):
            raise TypeError(f"metaclass conflict between {meta.__qualname__} and {type(base).__qualname__}")
    # ABCMeta sets up the registry of an ABC; without one of its own the class would use its base's.
    maker = abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type
    namespace = {"__module__": members.get("__module__", bases[0].__module__)}
    made: type[Any] = maker.__new__(meta, name, (_Unseen, *bases), namespace)
    type.__setattr__(made, "__bases__", bases)
    for member, value in members.items():
        type.__setattr__(made, member, value)
    return made


# Members that say something of the very class that has them.
_OF_ONE_CLASS: Final = {
    *("__dict__", "__weakref__", "__slotnames__", "__signature__"),
    *("float_class", "_changed_from", "_with_stand_ins"),
}


def _parametrized(cls: type[Any], like: type[Any]) -> type[Any]:
    """A class that is to ``cls`` what ``parametrize`` made of a layer's class before it was changed."""
    members = {
        name: meant
        for name, value in vars(like).items()
        if name not in _OF_ONE_CLASS
        for meant in (value.covers if isinstance(value, Overlay) else (value,))
    }
    earlier: type[Any] | None = vars(like).get("_changed_from")
    if earlier is not None and earlier.__bases__ == (cls,) and members.keys() <= vars(earlier).keys():
        return earlier
    return make_class(f"Parametrized{cls.__name__}", (cls,), {**members, "_changed_from": like})
