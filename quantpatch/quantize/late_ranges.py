"""Ranges that come too late for what works on a model's tensors.

A learned range is a parameter from construction on, where its shape is known then. One whose shape only data
shows, or that is made a learned one later, is missed by an optimizer that exists already: it would never be
trained. An average of weights pairs the tensors of two models one by one, so that it would average others in
the place of such a range; and one that was updated before a range was known has averaged NaN, which it stays.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from quantpatch.errors import listed, warn_caller
from quantpatch.layers.quantizer import copied, named_quantizers


@contextlib.contextmanager
def telling_of_late_ranges(models: Iterable[nn.Module]) -> Iterator[None]:
    """A block that warns of ranges that became parameters, or known, in it, too late for others.

    Args:
        models: Those whose ranges change in it.

    Warns:
        QuantPatchWarning: There is an optimizer, or a wrapper that averages gradients, of other parameters of
            these models; or an ``AveragedModel`` has averaged ranges that were not known.
    """
    models = list(models)
    before = {id(parameter) for parameter in _learned(models).values()}
    copies = [{n: q for n, q in named_quantizers(model).items() if q in copied} for model in models]
    shapeless = [{name for name, q in quantizers.items() if q.held is None} for quantizers in copies]
    unknown = [{name for name, q in quantizers.items() if q.amax is None} for quantizers in copies]
    yield
    for model, lacking, names in zip(models, shapeless, unknown, strict=True):
        now = named_quantizers(model)
        lacking = {name for name in lacking if name in now and now[name].held is not None}
        if lacking or any(name in now and now[name].amax is not None for name in names):
            _tell_of_averages(model, lacking, names)
    late = {name: p for name, p in _learned(models).items() if id(p) not in before}
    if late:
        _tell(models, late)


def _learned(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    held = {name: q.held for model in models for name, q in named_quantizers(model).items()}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, nn.Parameter)}


def _tell(models: Iterable[nn.Module], late: Mapping[str, nn.Parameter]) -> None:
    others = {id(p) for model in models for p in model.parameters()} - {id(p) for p in late.values()}
    for kind, known in _lists_of_parameters():
        missed = [name for name, parameter in late.items() if id(parameter) not in known]
        if not missed or others.isdisjoint(known):
            continue
        if issubclass(kind, Optimizer):
            warn_caller(
                f"the learned ranges of {listed(late, 5)} became parameters after {kind.__name__} was made, "
                f"which does not train them. Create it again, or write optimizer.add_param_group({{'params': "
                f"[quantizer.amax, ...]}})"
            )
        else:
            warn_caller(
                f"the learned ranges of {listed(late, 5)} became parameters after {kind.__name__} took the "
                f"model, which does not average their gradients over the ranks. Wrap it again"
            )


def _lists_of_parameters() -> Iterable[tuple[type[Any], set[int]]]:
    """Every optimizer and wrapper that there is, by its class, with the identities of what it has listed."""
    for found in gc.get_objects():
        kind = type(found)  # not isinstance, which asks what pretends to be of another class
        if issubclass(kind, Optimizer):
            groups = vars(found).get("param_groups", [])
            yield kind, {id(parameter) for group in groups for parameter in group["params"]}
        elif issubclass(kind, nn.parallel.DistributedDataParallel):
            yield kind, {id(parameter) for parameter in vars(found).get("_module_parameters", [])}


def _tell_of_averages(model: nn.Module, lacking: set[str], unknown: set[str]) -> None:
    """Warns of averages of such a model that lack the tensors of ranges, or have NaN in their place.

    Args:
        model: The model.
        lacking: Names of quantizers whose ranges had no tensor until now.
        unknown: Names of those whose ranges were not known until now.
    """
    quantizers = named_quantizers(model).keys()
    for found in gc.get_objects():
        if not issubclass(type(found), AveragedModel) or not vars(found).get("_modules"):
            continue
        average = found.module
        own = named_quantizers(average) if type(average) is type(model) else {}
        if own.keys() != quantizers or average is model:
            continue
        kind = type(found).__name__
        missed = [name for name, q in own.items() if name in lacking and q.held is None]
        if missed:
            warn_caller(
                f"there is an {kind} of a model like this one that was made before data showed the shape of "
                f"the ranges of {listed(missed, 5)}. If it is of this one, it has no tensors for them, and "
                f"would average others in their place. Create it again"
            )
            continue
        if not int(found.n_averaged):
            continue
        # Buffers that are not averaged are copied anew at each update.
        lost = [
            name
            for name, q in own.items()
            if name in unknown
            and q.amax is None
            and (isinstance(q.held, nn.Parameter) or (found.use_buffers and q.held is not None))
        ]
        if lost:
            warn_caller(
                f"there is an {kind} of a model like this one that was updated before the ranges of "
                f"{listed(lost, 5)} were known. If it is of this one, it has NaN in their place, as has any "
                f"average of NaN, and takes a range from each tensor. Create it again, or write "
                f"average.module.load_state_dict({{key: value for key, value in model.state_dict().items() "
                f"if '_quantizer.' in key}}, strict=False)"
            )
