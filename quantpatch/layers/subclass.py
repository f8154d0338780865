"""Users' subclasses of float layers: what makes one of them a quantized layer, and when that is right.

``class MyLinear(nn.Linear)`` that does not touch how a linear layer computes can be quantized as one. Its
quantized version is combined from the replacement and the subclass, ``class QuantMyLinear(QuantLinear,
MyLinear)``. Such a class exists in no module, so pickles and copies of its objects name the two classes that
it is made of, and combine them again.
"""

from __future__ import annotations

import copyreg
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, Final

import attrs

from quantpatch.errors import LayerError
from quantpatch.interception.slots import lock
from quantpatch.layers.base import QuantizedLayer, make_replacement
from quantpatch.layers.stand_ins import is_stand_in
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools.class_swap import change_class, dotted
from quantpatch.torch_tools.fast_paths import allow_fast_paths


@attrs.frozen
class Obstacle:
    """Why a subclass cannot be quantized as its base class is; reads on after "a subclass of Linear"."""


@attrs.frozen
class OwnMembers(Obstacle):
    """It does not compute as its base class does.

    Attributes:
        names: What of its base class's computation it has in a version of its own.
    """

    names: tuple[str, ...]

    def __str__(self) -> str:
        shown = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in self.names]
        return f"with {' and '.join(shown)} of its own"


@attrs.frozen
class OwnInit(Obstacle):
    """The base class's replacement can build layers, but not take over one that exists."""

    def __str__(self) -> str:
        return "whose replacement has an __init__ of its own, which makes new layers only"


@attrs.frozen
class WrittenOtherwise(Obstacle):
    """The base class's replacement was not written as its quantized layer."""

    def __str__(self) -> str:
        return "whose replacement is not a QuantizedLayer of it"


@attrs.frozen
class CannotCombine(Obstacle):
    """Python cannot combine the layouts or metaclasses of the two.

    Attributes:
        error: What it says.
    """

    error: str

    def __str__(self) -> str:
        return f"that Python cannot combine with its replacement ({self.error})"


#: Where a class that exists in no module says which replacement it is of, and what makes it of what.
MADE_OF: Final = "_made_of"

# Held as long as the class is in use, which holds the two classes that it is made of.
_combined: weakref.WeakValueDictionary[tuple[type, type], type[QuantizedLayer]] = (
    weakref.WeakValueDictionary()
)
# What was found out about a subclass, by replacement.
_found: weakref.WeakKeyDictionary[type, dict[Any, Obstacle | None]] = weakref.WeakKeyDictionary()

# Who overrides these decides what happens before any forward.
_ALWAYS_USED = {"__call__", "__getattr__", "__getattribute__"}
# What a class may define of its own and have it replaced, since nothing is computed with it.
_FOR_SHOW = {"_get_name", "extra_repr"}


def combine(replacement: type[QuantizedLayer], subclass: type[Any]) -> type[QuantizedLayer]:
    """The quantized version of a subclass of ``replacement.float_class``: one class for each pair.

    Args:
        replacement: The quantized version of its base class.
        subclass: A class of float layers.

    Raises:
        LayerError: The subclass computes in ways of its own, or Python cannot combine the two.
    """
    known = _combined.get((replacement, subclass))
    if known is not None:
        return known
    why = own_ways(replacement, subclass) or cannot_combine(replacement, subclass)
    if why is not None:
        raise LayerError(
            f"{dotted(subclass)} cannot be quantized as {replacement.__qualname__}: it is a subclass {why}",
            layer=subclass,
        )
    return _combined_now(replacement, subclass)


def take_over(layer: Any, replacement: type[QuantizedLayer], recipe: Recipe) -> None:
    """Makes a float layer that exists a quantized one: the same object, with quantizers."""
    change_class(layer, replacement)
    layer.add_quantizers(recipe)
    for name in type(layer).quantizers(layer):
        layer._modules[name].train(layer.training)


def give_back(layer: Any, cls: type[Any], children: tuple[str, ...]) -> None:
    """Makes a layer one of another class again, with those children alone."""
    change_class(layer, cls)
    allow_fast_paths(layer)
    for name in [name for name in layer._modules if name not in children]:
        del layer._modules[name]


def _combined_now(replacement: type[QuantizedLayer], subclass: type[Any]) -> type[QuantizedLayer]:
    with lock:
        known = _combined.get((replacement, subclass))
        if known is None:
            members = {
                "__module__": subclass.__module__,
                "__doc__": f"``{subclass.__name__}``, quantized as ``{replacement.__qualname__}`` is.",
                "__reduce_ex__": reduce_made,
                MADE_OF: (replacement, combine, (replacement, subclass)),
            }
            known = make_replacement(f"Quant{subclass.__name__}", (replacement, subclass), members)
            _combined[replacement, subclass] = known
        return known


def replacement_of(cls: type[Any]) -> type[Any]:
    """The importable class of a quantized layer: of one that exists in no module the replacement in it."""
    made_of = vars(cls).get(MADE_OF)
    return cls if made_of is None else made_of[0]


def reduce_made(layer: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` of classes that exist in no module."""
    cls: Any = next(cls for cls in type(layer).__mro__ if MADE_OF in vars(cls))
    made, arguments, *rest = super(cls, layer).__reduce_ex__(max(2, protocol))
    if made is copyreg.__newobj__ and arguments[0] is cls:  # type: ignore[attr-defined]
        _, maker, parts = vars(cls)[MADE_OF]
        return (_new, (maker, parts, *arguments[1:]), *rest)
    return (made, arguments, *rest)  # the subclass has its own way, and its own function to undo it


def _new(maker: Callable[..., Any], parts: tuple[Any, ...], *arguments: Any) -> Any:
    cls = maker(*parts)
    return cls.__new__(cls, *arguments)


def own_ways(replacement: Any, subclass: type[Any]) -> Obstacle | None:
    """In what a subclass does not compute as its base class does; None if it does.

    It must leave alone the ``forward`` of the base class, all that this uses of the object (its methods, and
    theirs), and all that the replacement is made of.

    Args:
        replacement: What replaces the base class.
        subclass: The subclass.
    """
    known = _found.setdefault(subclass, {})
    if replacement not in known:
        known[replacement] = _own_ways(replacement, subclass)
    return known[replacement]


def _own_ways(replacement: Any, subclass: type[Any]) -> Obstacle | None:
    base = getattr(replacement, "float_class", None)
    if base is None or not issubclass(replacement, QuantizedLayer) or not issubclass(subclass, base):
        return WrittenOtherwise()
    if replacement.__init__ is not QuantizedLayer.__init__:
        return OwnInit()
    own = _members(itertools.takewhile(lambda c: c is not base, subclass.__mro__))
    members = _members(c for c in replacement.__mro__ if c not in base.__mro__)
    added = {
        name for name, member in members.items() if not name.startswith("__") and not is_stand_in(member)
    }
    clash = (added & own.keys()) - _FOR_SHOW
    used = {name for name in attributes_used(base, "forward") | _ALWAYS_USED if _overrides(base, own, name)}
    return OwnMembers(tuple(sorted(clash | used))) if clash | used else None


def cannot_combine(replacement: Any, subclass: type[Any]) -> Obstacle | None:
    """Whether Python cannot combine a replacement with a subclass that computes as its base class does."""
    try:
        object.__setattr__(object.__new__(subclass), "__class__", _combined_now(replacement, subclass))
    except Exception as error:  # layouts or metaclasses that do not go together
        return CannotCombine(f"{type(error).__name__}: {error}")
    return None


def _members(classes: Iterator[type]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in classes:
        found = {**vars(cls), **found}
    return found


def _overrides(base: type, own: dict[str, Any], name: str) -> bool:
    """Whether a name that the base class uses means something else in the subclass.

    What the base class does not have is an attribute of the object, or of another one; of these only a
    property would change it.
    """
    if name not in own:
        return False
    return hasattr(base, name) or not isinstance(own[name], FunctionType)


def attributes_used(cls: type, method: str) -> set[str]:
    """The names of attributes in a method's code, and in that of the methods of the class behind them."""
    used = {method}
    waiting = [method]
    while waiting:
        found = inspect.getattr_static(cls, waiting.pop(), None)
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if isinstance(function, FunctionType):
            new = _names_in(function.__code__) - used
            used |= new
            waiting += new
    return used


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
