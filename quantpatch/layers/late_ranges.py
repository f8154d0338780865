"""Ranges that come too late for what works on a model's tensors.

A learned range is a parameter from construction on, where its shape is known then. One whose shape only data
or a checkpoint shows, or that is made a learned one later, is missed by an optimizer that exists already: it
would never be trained. An average of weights pairs the tensors of two models one by one, so that it would
average others in the place of such a range, or of a zero point that was found later; and one that was updated
before a range was known has averaged NaN, which it stays.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from quantpatch.errors import listed, warn_caller
from quantpatch.layers.range_tensor import RangeTensor

#: Quantizers that were copied or pickled. Kept beside them: what is in a model is as it was after a copy.
copied: Final[weakref.WeakSet[RangeTensor]] = weakref.WeakSet()

# What the latest load_state_dict collects errors in, and hands to every module: one warning is enough.
_latest_loading: list[list[str]] = []


@contextlib.contextmanager
def warning_of_late_ranges(models: Iterable[nn.Module]) -> Iterator[None]:
    """A block that warns of ranges that became parameters, or known, in it, too late for others.

    Args:
        models: Those whose ranges change in it.

    Warns:
        QuantPatchWarning: There is an optimizer, or a wrapper that averages gradients, of other parameters of
            these models; or an ``AveragedModel`` has averaged ranges that were not known.
    """
    models = list(models)
    before = {id(parameter) for parameter in _learned(models).values()}
    copies = [{n: q for n, q in _ranges(model).items() if q in copied} for model in models]
    tensors = [{name: _tensors(q) for name, q in quantizers.items()} for quantizers in copies]
    unknown = [{name for name, q in quantizers.items() if q.amax is None} for quantizers in copies]
    yield
    for model, had, names in zip(models, tensors, unknown, strict=True):
        now = _ranges(model)
        late = {name for name, keys in had.items() if name in now and not _tensors(now[name]) <= keys}
        if late or any(name in now and now[name].amax is not None for name in names):
            _warn_of_averages(model, late, names)
    learned = {name: p for name, p in _learned(models).items() if id(p) not in before}
    if learned:
        _warn_of_lists(models, learned)


def warn_of_loaded_range(quantizer: RangeTensor, prefix: str, loading: list[str]) -> None:
    """Warns of a tensor that ``load_state_dict`` made, once for all of a model.

    Args:
        quantizer: Its range is, or has, that tensor.
        prefix: Its name in the model that is loaded, and a dot.
        loading: What collects this loading's errors.

    Warns:
        QuantPatchWarning: As above.
    """
    learned = isinstance(quantizer.held, nn.Parameter)
    if not (learned or quantizer in copied) or any(known is loading for known in _latest_loading):
        return
    _latest_loading[:] = [loading]
    model = _holder(quantizer, prefix.split(".")[:-1])
    if model is None:
        return
    # What else the checkpoint has is not known here: it is of such a model, and has ranges.
    found = {n: q for n, q in _ranges(model).items() if q is quantizer or q.held is None}
    _warn_of_averages(model, {name for name, q in found.items() if q in copied}, set())
    if learned:
        _warn_of_lists([model], {name: q.held for name, q in found.items() if q.descriptor.learn_amax})


def _holder(quantizer: RangeTensor, path: list[str]) -> nn.Module | None:
    """The module that has a quantizer under a name; None if it was given none."""
    for found in gc.get_objects() if path else ():
        inner = found if issubclass(type(found), nn.Module) else None
        for name in path:
            inner = None if inner is None else vars(inner).get("_modules", {}).get(name)
        if inner is quantizer:
            return found  # type: ignore[no-any-return]
    return None


def _ranges(model: nn.Module) -> dict[str, RangeTensor]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RangeTensor)}


def _tensors(quantizer: RangeTensor) -> set[str]:
    state = (*quantizer._parameters.items(), *quantizer._buffers.items())
    return {name for name, tensor in state if tensor is not None}


def _learned(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    held = {name: q.held for model in models for name, q in _ranges(model).items()}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, nn.Parameter)}


def _warn_of_lists(models: Iterable[nn.Module], late: Mapping[str, Any]) -> None:
    """Warns of what has listed other parameters of the models, and not these (None: it is to come)."""
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


def _warn_of_averages(model: nn.Module, lacking: set[str], unknown: set[str]) -> None:
    """Warns of averages of such a model that lack the tensors of ranges, or have NaN in their place.

    Args:
        model: The model.
        lacking: Names of quantizers whose range or zero point had no tensor until now.
        unknown: Names of those whose ranges were not known until now.
    """
    quantizers = _ranges(model)
    for found in gc.get_objects():
        if not issubclass(type(found), AveragedModel) or not vars(found).get("_modules"):
            continue
        average = found.module
        own = _ranges(average) if type(average) is type(model) else {}
        if own.keys() != quantizers.keys() or average is model:
            continue
        kind = type(found).__name__
        missed = [
            name
            for name, q in own.items()
            if name in lacking and (q.held is None or not _tensors(quantizers[name]) <= _tensors(q))
        ]
        if missed:
            warn_caller(
                f"there is an {kind} of a model like this one that was made before the ranges or zero "
                f"points of {listed(missed, 5)} had tensors. If it is of this one, it lacks these, and "
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
