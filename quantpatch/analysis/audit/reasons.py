"""Why an operand was float: a type for each reason. All are printed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from torch.jit import ScriptModule

from quantpatch.analysis.audit.trace import Seen
from quantpatch.dataflow import FAST_PATHS
from quantpatch.errors import EntryError
from quantpatch.layers.base import QuantizedLayer, quantizers_of
from quantpatch.layers.operations import PRODUCTS, named, quantizer_name
from quantpatch.layers.with_operations import find_operations
from quantpatch.quantize.reasons import FloatBase, IsPart, Reason, SubclassOf
from quantpatch.quantize.resolve import Decision
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.class_swap import own_class, written_name


@attrs.frozen
class OfAWeight(Reason):
    """It is a step in the making of a weight."""

    def __str__(self) -> str:
        return "a weight is made of it, the same for every input: not counted"


@attrs.frozen
class FastPath(Reason):
    """torch's C++ code ran the layer.

    Attributes:
        layer: Its class.
    """

    layer: str

    def __str__(self) -> str:
        return f"torch's fast path ran {self.layer} in one piece and read the weights itself"


@attrs.frozen
class SwitchedOff(Reason):
    """Quantizers of the layer are disabled, or do not quantize.

    Attributes:
        layer: Its class.
        quantizers: Their names in it.
    """

    layer: str
    quantizers: tuple[str, ...]

    def __str__(self) -> str:
        verb = "is" if len(self.quantizers) == 1 else "are"
        return f"{' and '.join(self.quantizers)} of {self.layer} {verb} switched off"


@attrs.frozen
class HiddenState(Reason):
    """The recipe leaves the hidden state of a recurrent layer float.

    Attributes:
        layer: Its class.
    """

    layer: str

    def __str__(self) -> str:
        return (
            f"the hidden state of {self.layer} stays in torch's fused kernel; Recipe(hidden=...) has it "
            f"quantized at each step"
        )


@attrs.frozen
class FloatOperands(Reason):
    """The layer is quantized, and has no quantizer for these operands.

    Attributes:
        layer: Its class.
        by_recipe: Those for which another recipe would have one.
        inside: Those that are made inside the layer.
    """

    layer: str
    by_recipe: tuple[str, ...]
    inside: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.by_recipe:
            alone = len(self.by_recipe) == 1 and not self.inside
            parts.append(f"the recipe leaves {'it' if alone else ' and '.join(self.by_recipe)} float")
        if self.inside:
            verb = "is" if len(self.inside) == 1 else "are"
            parts.append(f"{' and '.join(self.inside)} {verb} made inside {self.layer}")
        return "; ".join(parts)


@attrs.frozen
class Scripted(Reason):
    """The code of the layer is fixed.

    Attributes:
        layer: Its class, before it was scripted.
    """

    layer: str

    def __str__(self) -> str:
        return f"{self.layer} is a scripted module, whose code is fixed; quantize it before scripting"


@attrs.frozen
class LeftFloat(Reason):
    """The layer is of a target's class, or of a subclass of one.

    Attributes:
        layer: Its class.
        why: Why a block leaves it float; None if it does not.
    """

    layer: str
    why: Reason | None

    def __str__(self) -> str:
        if self.why is None:
            return f"{self.layer} was left float: it was skipped, or built outside a block"
        if isinstance(self.why, (SubclassOf, FloatBase)):
            return f"{self.layer} is {self.why}"
        return f"{self.layer} was left float: {self.why}"


@attrs.frozen
class OfAFunction(Reason):
    """A function that is called in a forward made the product.

    Attributes:
        layer: The class with that forward.
        reads: The layers whose weights it reads itself.
        hidden: Why ``operations`` does not quantize it either; None if it does.
    """

    layer: str
    reads: tuple[str, ...]
    hidden: str | None

    def __str__(self) -> str:
        reading = f", which reads the weight of {' and '.join(self.reads)} itself" if self.reads else ""
        found = "operations='products' quantizes it" if self.hidden is None else self.hidden
        return f"a function called in the forward of {self.layer}{reading}: {found}"


@attrs.frozen
class CannotBeUsed(Reason):
    """The entry for the class cannot be used.

    Attributes:
        error: What is wrong with it.
    """

    error: str

    def __str__(self) -> str:
        return self.error


def reason_for(seen: Seen, decide: Callable[[Any], Decision]) -> Reason | None:
    """Why some operand of a product did not come out of a quantizer; None if all did.

    Args:
        seen: The product.
        decide: Gives what becomes of a class in a block without options.
    """
    if seen.quantized:
        return None
    if seen.of_weight:
        return OfAWeight()
    layer: Any = seen.layer
    cls = own_class(layer)
    name = written_name(cls)
    if seen.operator in FAST_PATHS:
        return FastPath(name)
    if isinstance(layer, QuantizedLayer):
        return _about_quantized(layer, name, tuple(o.role for o in seen.operands if o.quantizer is None))
    if isinstance(layer, ScriptModule):
        return Scripted(str(layer.original_name))
    try:
        decision = decide(cls)
    except EntryError as error:
        return LeftFloat(cls.__name__, CannotBeUsed(str(error)))
    if decision.entry is not None or isinstance(decision.reason, IsPart):
        return LeftFloat(cls.__name__, decision.reason)
    return OfAFunction(cls.__name__, _reads(seen), why_hidden(layer, cls))


def why_hidden(layer: nn.Module, cls: type[Any]) -> str | None:
    """Why ``operations="products"`` quantizes nothing of what a layer multiplies; None if it does."""
    found = find_operations(layer, cls, named([PRODUCTS]))
    if found.made is not None:
        return None
    return "; ".join(found.hidden) or (
        "no code that its forward is known to run multiplies. Let it call a function by its name, or modules "
        "of quantpatch.layers (MatMul, ScaledDotProductAttention ...), which are quantized like any layer"
    )


def _about_quantized(layer: Any, name: str, missing: tuple[str, ...]) -> Reason:
    off = [
        quantizer
        for quantizer, several in quantizers_of(layer).items()
        if any(q.disabled or not q.quantizing for q in several)
    ]
    if off:
        return SwitchedOff(name, tuple(off))
    if missing == ("hidden",):
        return HiddenState(name)
    could_have = {*type(layer).inputs, *layer.weight_axes(), *layer._inner}
    left = [role for role in missing if role in could_have and not layer._modules.get(quantizer_name(role))]
    return FloatOperands(name, tuple(left), tuple(role for role in missing if role not in left))


def _reads(seen: Seen) -> tuple[str, ...]:
    """The layers whose weights a product reads itself."""
    own = {name for name, _ in seen.layer.named_parameters(recurse=False)}
    names = (o.parameter for o in seen.operands if o.parameter is not None)
    others = dict.fromkeys(name for name in names if name.removeprefix(f"{seen.module}.") not in own)
    return tuple(name.rpartition(".")[0] or name for name in others)
