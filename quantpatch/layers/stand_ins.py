"""A layer whose own code finds quantized tensors in the place of its parameters, for the length of a call.

The forward of the float class reads ``self.weight``, and ``self`` is the layer itself: code that keeps data
by module, writes attributes or asks for its class finds the one that is in the model. So each name that has
ever had a stand-in is a property of the quantized class. It looks among the calls that run in its thread, and
is otherwise what the attribute was: other threads, and code that reads ``layer.weight`` from outside, see the
parameter.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Final

import torch
from torch.utils import checkpoint

from quantpatch.torch_tools.class_swap import Overlay


class _Missing:  # a class, since that stays itself in a pickle
    """What a class has under a name that it does not have."""


class _Calls(threading.local):
    """The calls that run in a thread, by the id of the layer: what stands in, and how autograd records."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[dict[str, Any], Any]] = {}


_calls = _Calls()
_lock = threading.Lock()
# Where a class says which of its attributes have ever had a stand-in.
_NAMES: Final = "_with_stand_ins"
# Whether torch.compile takes layer.__dict__["name"] for layer.name, which is the property again, without end.
_COMPILES_TO_ITSELF: Final = torch.__version__ < "2.12"


def call_with(
    stand_ins: Mapping[str, Any],
    function: Callable[..., Any],
    layer: Any,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a function of a layer, which finds the stand-ins in place of the attributes of their names.

    Args:
        stand_ins: By the attribute's name, what the function finds there.
        function: Called with the layer and the other arguments.
        layer: The layer.
        *args: Arguments.
        **kwargs: Keyword arguments.
    """
    if torch.compiler.is_dynamo_compiling():
        return function(_View(layer, stand_ins) if stand_ins else layer, *args, **kwargs)
    running, key = _calls.running, id(layer)
    outer = running.get(key)  # of a call around this one: the layer calls itself
    if outer is None and not stand_ins:
        return function(layer, *args, **kwargs)
    cls = type(layer)
    for name in stand_ins:
        if type(getattr(cls, name, None)) is not _StandIn:
            _make_property(cls, name)
    try:
        running[key] = dict(stand_ins), _recording()
        return function(layer, *args, **kwargs)
    finally:
        if outer is None:
            running.pop(key, None)
        else:
            running[key] = outer


# Layers that have read a weight under a checkpoint inside their own forward. The backward pass runs that part
# again, in no call of the layer.
_repeated: weakref.WeakSet[Any] = weakref.WeakSet()


def _recording() -> Any:
    """Whether code runs under a checkpoint: it records for autograd in another way."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False)


def _repeated_weight(layer: Any, name: str) -> Any:
    """A quantized weight for code that a checkpoint runs again; None for any other."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    if frame is None or name not in layer.weight_axes():
        return None
    if not _recording():  # what this records is used
        return layer.quantize_weights().get(name)
    with torch.no_grad():  # only what is saved of it is used, and must be as much as the first time
        weight = layer.quantize_weights().get(name)
    return None if weight is None else weight.requires_grad_(without_stand_in(layer, name).requires_grad)


def without_stand_in(layer: Any, name: str) -> Any:
    """An attribute of a layer as it is outside of calls."""
    found = getattr(type(layer), name, None)
    return found.plain(layer) if type(found) is _StandIn else getattr(layer, name)


def is_stand_in(member: Any) -> bool:
    """Whether a member of a class is there for stand-ins, and so means what the attribute always meant."""
    return type(member) is _StandIn


def _make_property(cls: type[Any], name: str) -> None:
    with _lock:
        own = vars(cls).get(name, _Missing)
        if type(own) is not _StandIn:
            type.__setattr__(cls, _NAMES, frozenset({*getattr(cls, _NAMES, ()), name}))
            type.__setattr__(cls, name, _StandIn(name, own, any(name in vars(c) for c in cls.__mro__[1:])))


class _StandIn(Overlay):
    """An attribute that may have a stand-in.

    Args:
        name: Its name.
        own: What the class itself has under the name.
        inherited: Whether a base class has something under the name.

    Attributes:
        plain: Gives a layer's attribute as if there were no stand-ins.
    """

    def __init__(self, name: str, own: Any = _Missing, inherited: bool = False) -> None:
        self._made_of = (name,) if own is _Missing and not inherited else (name, own, inherited)
        self.covers = () if own is _Missing else (own,)
        plain = self._of_object(name) if own is _Missing and not inherited else self._of_class(name, own)
        self.plain = plain

        def get(layer: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                found = _calls.running.get(id(layer))
                if found is not None and name in found[0]:
                    if found[1] != _recording():
                        _repeated.add(layer)
                    return found[0][name]
                if layer in _repeated and torch._C._current_graph_task_id() != -1:
                    weight = _repeated_weight(layer, name)
                    if weight is not None:
                        return weight
            return plain(layer)

        def put(layer: Any, value: Any) -> None:
            found = _calls.running.get(id(layer))
            if found is not None and name in found[0]:
                found[0][name] = value
                return
            member = self._below(layer, name, own)
            if hasattr(type(member), "__set__"):
                member.__set__(layer, value)
            else:
                layer.__dict__[name] = value

        def remove(layer: Any) -> None:
            if name not in layer.__dict__:
                raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
            del layer.__dict__[name]

        super().__init__(get, put, remove)

    def __reduce__(self) -> Any:
        return type(self), self._made_of

    @staticmethod
    def _of_object(name: str) -> Callable[[Any], Any]:
        """A parameter, a submodule or a plain attribute: what no class has."""

        def plain(layer: Any) -> Any:
            own = layer.__dict__
            if name not in own:
                return layer.__getattr__(name)
            if _COMPILES_TO_ITSELF and torch.compiler.is_dynamo_compiling():
                kind = type(layer).__name__
                torch._dynamo.graph_break(msg=f"{name!r} of {kind} is in the same graph from torch 2.12 on")
            return own[name]

        return plain

    def _of_class(self, name: str, own: Any) -> Callable[[Any], Any]:
        """A property, a method, or an attribute with a default in a class."""

        def plain(layer: Any) -> Any:
            member = self._below(layer, name, own)
            if not hasattr(type(member), "__set__"):
                if name in layer.__dict__:
                    return layer.__dict__[name]
                if member is _Missing:
                    return layer.__getattr__(name)
            bind = getattr(type(member), "__get__", None)
            return member if bind is None else bind(member, layer, type(layer))

        return plain

    def _below(self, layer: Any, name: str, own: Any) -> Any:
        """What the layer's class would have under the name if this were not there."""
        if own is not _Missing:
            return own
        classes = iter(type(layer).__mro__)
        for cls in classes:
            if vars(cls).get(name) is self:
                break
        return next((vars(cls)[name] for cls in classes if name in vars(cls)), _Missing)


class _View:
    """A layer as its own forward sees it where ``torch.compile`` traces it.

    The compiler follows neither what belongs to a thread, nor a layer that changes for the length of a call;
    what it makes of this is the layer's computation on the stand-ins, in which no view is left.
    """

    def __init__(self, layer: Any, stand_ins: Mapping[str, Any]) -> None:
        # One by one: the compiler of torch 2.8 does not follow an update of the dictionary.
        for name, value in {**stand_ins, "_layer": layer}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        layer = self._layer
        # Methods and properties run on this object, so that they see the stand-ins as well; static and
        # class methods have no object to run on.
        member = getattr(type(layer), name, None)
        # The compiler takes a subclass of property for a property: names say which is which.
        is_stand_in = name in getattr(type(layer), _NAMES, ())
        if isinstance(member, property) and not is_stand_in and member.fget is not None:
            return member.fget(self)
        value = getattr(layer, name)
        if isinstance(value, MethodType) and value.__self__ is layer:
            return functools.partial(value.__func__, self)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_layer"], name, value)
