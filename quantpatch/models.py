"""Models that are built already: ``convert``, ``revert`` and ``with quantized(model):``.

A layer is converted where it stands: the same object changes its class and gains quantizers, so its
weights, hooks, tied parameters and place in an optimizer are kept. Reverting is the same backwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from quantpatch.classes import change_class, dotted, own_class
from quantpatch.descriptor import Recipe
from quantpatch.entries import EntryLike
from quantpatch.errors import ConversionError
from quantpatch.interception import Slot
from quantpatch.layers.base import QuantizedLayer
from quantpatch.outcome import Outcome, Replaced, Skipped
from quantpatch.recipes import DEFAULT_RECIPE
from quantpatch.registry import registry
from quantpatch.table import Choice, Pattern, compose, load_checked

__all__ = ["Conversion", "convert", "quantized", "revert"]


@attrs.frozen
class Conversion:
    """What ``convert`` did.

    Attributes:
        replaced: The layers that were quantized, by class.
        skipped: The layers that were left float, by class, and why.
    """

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]


@attrs.frozen
class _Step:
    """One layer to convert."""

    name: str
    layer: nn.Module
    replacement: type[QuantizedLayer]
    choice: Choice


def convert(
    model: nn.Module,
    skip: Iterable[Pattern] = (),
    custom: Iterable[EntryLike] = (),
    recipe: str | Recipe | None = None,
    plugins: Iterable[str] | None = None,
    *,
    include: Iterable[Pattern] = (),
) -> Conversion:
    """Quantizes the layers of an existing model in place, by the same table as a block.

    Parameters, buffers, hooks, parametrizations, tied weights, ``requires_grad``, training modes,
    devices and dtypes stay as they are. If anything fails, the model is as it was.

    Args:
        model: The model. It may be a layer itself: the object stays, its class changes.
        skip: As in ``quantize_modules``, like the rest.
        custom: See there; replacements have to be ``QuantizedLayer`` subclasses of their target.
        recipe: See there; default int8.
        plugins: See there.
        include: See there.

    Returns:
        What was replaced and what was left float.

    Raises:
        ConversionError: The model is quantized already, has nothing to quantize, is scripted, or an
            entry's replacement cannot take over a layer that exists.
    """
    _refuse_wrapped(model, "convert")
    already = [name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    if already:
        raise ConversionError(
            f"{type(model).__name__} is quantized already ({len(already)} layers, such as {already[0]!r}); "
            f"revert(model) first, or change its quantizers with configure(model, rules)",
            layers=tuple(already),
        )
    chosen = registry.recipe(DEFAULT_RECIPE if recipe is None else recipe)
    names = None if plugins is None else tuple(plugins)
    table = compose(
        {},
        registry.offers(names),
        plugins=names,
        skip=tuple(skip),
        include=(*chosen.include, *include),
        custom=tuple(custom),
    )
    choices = {key.target: (key, c) for key, c in table.items() if isinstance(key, Slot)}
    outcome = Outcome()
    steps = _plan(model, choices, outcome)
    if not steps:
        seen = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ConversionError(
            f"{type(model).__name__} holds nothing to quantize: its modules are {seen}. Give an entry for "
            f"your own layers: convert(model, custom=[(module, 'Name', QuantName)])"
        )
    with contextlib.ExitStack() as undo:
        for step in steps:
            undo.callback(_unconvert, step.layer, own_class(step.layer), tuple(step.layer._modules))
            _convert_layer(step, chosen)
        undo.pop_all()  # all went well: keep it
    return Conversion(outcome.replaced, outcome.skipped)


def _refuse_wrapped(model: nn.Module, verb: str) -> None:
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"cannot {verb} {where}: it is a scripted module, whose code is fixed. Work on the module "
                f"that it was scripted from",
                layers=(name,),
            )
        if isinstance(module, nn.DataParallel):
            raise ConversionError(
                f"cannot {verb} {where}: nn.DataParallel runs copies of the layers. {verb.capitalize()} "
                f"model.module and wrap it afterwards",
                layers=(name,),
            )


def _plan(model: nn.Module, choices: dict[type, tuple[Slot, Choice]], outcome: Outcome) -> list[_Step]:
    steps: list[_Step] = []
    loaded: dict[type, type[QuantizedLayer]] = {}
    for name, layer in model.named_modules():
        cls = own_class(layer)
        found = choices.get(cls)
        if found is None:
            base = next((base for base in cls.__mro__ if base in choices), None)
            if base is not None:
                target = choices[base][1].offer.entry.dotted
                outcome.count(dotted(cls), f"a subclass of {target}, for which there is no entry")
            continue
        slot, choice = found
        outcome.count(choice.offer, choice.float_because)
        if choice.float_because:
            continue
        if cls not in loaded:
            loaded[cls] = _fit_for_conversion(load_checked(choice.offer, slot), choice)
        steps.append(_Step(name, layer, loaded[cls], choice))
    return steps


def _fit_for_conversion(replacement: Any, choice: Choice) -> type[QuantizedLayer]:
    entry = choice.offer.entry
    target = entry.name
    is_layer = isinstance(replacement, type) and issubclass(replacement, QuantizedLayer)
    if is_layer and hasattr(replacement, "float_class"):
        fit: type[QuantizedLayer] = replacement
        return fit
    raise ConversionError(
        f"{choice.offer.source}: {entry} can build new layers but not take over existing ones: the "
        f"replacement is no QuantizedLayer. Write: class Quant{target}(quantpatch.QuantizedLayer, {target})",
        entry=entry,
    )


def _convert_layer(step: _Step, recipe: Recipe) -> None:
    layer: Any = step.layer
    change_class(layer, step.replacement)
    layer.add_quantizers(recipe)
    for name in layer.quantizers():
        layer._modules[name].train(layer.training)


def _unconvert(layer: Any, cls: type, children: tuple[str, ...]) -> None:
    change_class(layer, cls)
    for name in [name for name in layer._modules if name not in children]:
        del layer._modules[name]


def revert(model: nn.Module) -> None:
    """Takes a quantized model back to float: the same classes, attributes and weights, bit for bit.

    Works on models that ``convert`` quantized and on those built inside a block.

    Raises:
        ConversionError: The model holds no quantized layer.
    """
    _refuse_wrapped(model, "revert")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    if not layers:
        raise ConversionError(f"{type(model).__name__} holds no quantized layer, so nothing can be reverted")
    for layer in layers:
        own: Any = layer
        kept = tuple(name for name in own._modules if name not in layer.quantizers())
        _unconvert(own, layer.float_class, kept)


@contextlib.contextmanager
def quantized(
    model: nn.Module,
    skip: Iterable[Pattern] = (),
    custom: Iterable[EntryLike] = (),
    recipe: str | Recipe | None = None,
    plugins: Iterable[str] | None = None,
    *,
    include: Iterable[Pattern] = (),
) -> Iterator[Conversion]:
    """A block in which an existing model is quantized; ``convert`` before and ``revert`` after it.

    Ranges found inside are gone afterwards, as all else that the float model does not have.

    Raises:
        ConversionError: See ``convert``.
    """
    conversion = convert(model, skip, custom, recipe, plugins, include=include)
    try:
        yield conversion
    finally:
        revert(model)
