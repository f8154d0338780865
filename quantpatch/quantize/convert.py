"""Models that are built already: ``convert``, ``revert`` and ``with quantized(model):``.

A layer is converted where it stands: the same object changes its class and gains quantizers, so its
weights, hooks, tied parameters and place in an optimizer are kept. Reverting is the same backwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from quantpatch.errors import ConversionError
from quantpatch.layers.base import QuantizedLayer, named_layers, parts_of
from quantpatch.layers.before_tuning import put_back
from quantpatch.layers.input_factor import INPUT_FACTOR, drop_input_factor, named_input_factors
from quantpatch.layers.placed import placed_in, take_out
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.layers.subclass import give_back, take_over
from quantpatch.plugins.entry import EntryLike
from quantpatch.plugins.registry import registry
from quantpatch.quantize.configure import apply_rules
from quantpatch.quantize.operations import OperationRules, quantize_operations
from quantpatch.quantize.options import Options
from quantpatch.quantize.outcome import Conversion, Outcome
from quantpatch.quantize.reasons import Pattern
from quantpatch.quantize.resolve import Decision, Table, resolver
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import Recipe
from quantpatch.reports.report import ChangeReport
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.class_swap import dotted, own_class, written_name
from quantpatch.torch_tools.forward import demand_model


def convert(
    model: nn.Module,
    recipe: str | Recipe | None = None,
    *,
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
    include: Iterable[Pattern] | Pattern = (),
    plugins: Iterable[str] | None = None,
    subclasses: bool | None = None,
    operations: OperationRules | None = None,
    strict: bool = False,
) -> Conversion:
    """Quantizes the layers of an existing model in place, by the same table as a block.

    Parameters, buffers, hooks, parametrizations, tied weights, ``requires_grad``, training modes,
    devices and dtypes stay as they are. If anything fails, the model is as it was.

    Args:
        model: The model. It may be a layer itself: the object stays, its class changes.
        recipe: As in ``quantize_modules``, like the rest; default int8. Rules in it are applied at once.
        skip: See there.
        custom: See there; replacements have to be ``QuantizedLayer`` subclasses of their target.
        include: See there.
        plugins: See there.
        subclasses: See there; default False.
        operations: See there.
        strict: See there.

    Returns:
        What was replaced and what was left float.

    Raises:
        ConversionError: The model is quantized already, has nothing to quantize, is scripted, or an
            entry's replacement cannot take over a layer that exists.
        ArgumentError: A rule of the recipe matches nothing, or is malformed.
    """
    options = Options.of(recipe, skip, custom, include, plugins, subclasses, operations, strict)
    _refuse_wrapped(model, "convert")
    already = list(named_layers(model))
    if already:
        raise ConversionError(
            f"{type(model).__name__} is quantized already ({len(already)} layers, such as {already[0]!r}); "
            f"revert(model) first, or change its quantizers with configure(model, rules)",
            layers=tuple(already),
        )
    chosen = registry.recipe(DEFAULT_RECIPE if recipe is None else recipe)
    outcome = Outcome()
    planned = _plan(model, options.table(chosen), outcome)
    if not planned and options.operations is None:
        seen = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ConversionError(
            f"{type(model).__name__} holds nothing to quantize: its modules are {seen}. Give an entry for "
            f"your own layers: convert(model, custom=[(module, 'Name', QuantName)])"
        )
    before = [(module, own_class(module), tuple(module._modules)) for module in model.modules()]
    try:
        for layer, replacement in planned:
            take_over(layer, replacement, chosen)
        if options.operations is not None:
            quantize_operations([model], options.operations, chosen, outcome, strict=options.strict)
        if chosen.rules:
            apply_rules([model], chosen.rules)
    except BaseException:
        for layer, cls, children in before:
            if own_class(layer) is not cls:
                give_back(layer, cls, children)
        raise
    return Conversion(outcome.replaced, outcome.skipped)


def _refuse_wrapped(model: nn.Module, verb: str) -> None:
    demand_model(model, verb)
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


def _plan(model: nn.Module, table: Table, outcome: Outcome) -> list[tuple[nn.Module, type[QuantizedLayer]]]:
    """The layers to convert, each with the class that it gets."""
    planned = []
    decide = resolver(table)
    parts: set[int] = set()
    for layer in model.modules():  # what holds parts comes before them
        decision = decide(own_class(layer))
        parts.update(map(id, parts_of(layer, decision.replacement)))
        if decision.entry is None or id(layer) in parts:
            continue
        if decision.reason is None:
            planned.append((layer, _fit_for_conversion(decision)))
        outcome.count(decision)
    return planned


def _fit_for_conversion(decision: Decision) -> type[QuantizedLayer]:
    entry, replacement = decision.entry, decision.replacement
    is_layer = isinstance(replacement, type) and issubclass(replacement, QuantizedLayer)
    if is_layer and hasattr(replacement, "float_class"):
        fit: type[QuantizedLayer] = replacement
        return fit
    assert entry is not None
    raise ConversionError(
        f"{entry.source}: {entry} can build new layers but not take over existing ones: the replacement is "
        f"not a QuantizedLayer. Write: class Quant{entry.name}(quantpatch.QuantizedLayer, {entry.name})",
        entry=entry,
    )


def revert(model: nn.Module) -> ChangeReport:
    """Takes a quantized model back to float: the same classes, attributes and weights, bit for bit.

    Works on models that ``convert`` quantized and on those built inside a block. Tensors that ``tune`` has
    changed are what they were before, but for those that have changed again since.

    Returns:
        The layers and tensors that are float again, and what stays: quantizers that are neither a layer's nor
        placed by quantpatch, tensors that have changed since they were tuned.

    Raises:
        ConversionError: The model holds no quantized layer.
    """
    _refuse_wrapped(model, "revert")
    layers = named_layers(model)
    if not layers:
        raise ConversionError(f"{type(model).__name__} holds no quantized layer, so nothing can be reverted")
    for layer in layers.values():
        layer.make_float()
    placed = placed_in(model)
    for module in placed.values():
        take_out(module)
    changed = {name: dotted(own_class(layer)) for name, layer in layers.items()}
    changed |= {name: "without a quantizer at its output" for name in placed if name not in changed}
    left = {name: quantizer.extra_repr() for name, quantizer in named_quantizers(model).items()}
    changed_since = put_back(model)
    for name, layer in named_input_factors(model).items():
        if f"{name}.weight".lstrip(".") in changed_since[False]:
            left[f"{name}.{INPUT_FACTOR}".lstrip(".")] = "before its layer, whose weight has changed"
        else:
            drop_input_factor(layer)
    changed |= dict.fromkeys(changed_since[True], "what it was before it was tuned")
    left |= dict.fromkeys(changed_since[False], "tuned, since it has changed after that")
    return ChangeReport(written_name(type(model)), changed, left)


@contextlib.contextmanager
def quantized(
    model: nn.Module,
    recipe: str | Recipe | None = None,
    *,
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
    include: Iterable[Pattern] | Pattern = (),
    plugins: Iterable[str] | None = None,
    subclasses: bool | None = None,
    operations: OperationRules | None = None,
    strict: bool = False,
) -> Iterator[Conversion]:
    """A block in which an existing model is quantized; ``convert`` before and ``revert`` after it.

    Ranges found inside are gone afterwards, as all else that the float model does not have.

    Raises:
        ConversionError: See ``convert``.
    """
    conversion = convert(
        model,
        recipe,
        skip=skip,
        custom=custom,
        include=include,
        plugins=plugins,
        subclasses=subclasses,
        operations=operations,
        strict=strict,
    )
    try:
        yield conversion
    finally:
        if named_layers(model):  # not reverted in there
            revert(model)
