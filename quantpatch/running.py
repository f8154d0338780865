"""Running somebody's model: that it is one, its modes, its batches, and what to say when these do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.errors import InputError

__all__ = ["demand_model", "evaluating", "explaining_devices", "run_batch"]


def demand_model(model: Any, function: str) -> None:
    """Checks what a function was given for a model.

    Args:
        model: What was given.
        function: Name of the function.

    Raises:
        InputError: It is no module.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(f"{function} takes a model, not its class: write {function}({model.__name__}(...))")
    raise InputError(f"{function} takes a model (an nn.Module), not {model!r}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in eval mode; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def explaining_devices(model: nn.Module, inputs: Any) -> Iterator[None]:
    """A block that runs a model; if it fails, and the inputs are on a device where the model is not, says so.

    Args:
        model: The model.
        inputs: Its inputs, nested as they may be.

    Raises:
        InputError: That is so.
    """
    try:
        yield
    except Exception as error:
        model_on = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
        inputs_on = sorted({str(leaf.device) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)})
        if not model_on or set(inputs_on) <= set(model_on):
            raise
        raise InputError(
            f"{type(model).__name__} is on {' and '.join(model_on)} and its inputs on "
            f"{' and '.join(inputs_on)}: move them with .to({model_on[0]!r}) first ({error})",
            devices=(" ".join(inputs_on), " ".join(model_on)),
        ) from error


def run_batch(model: nn.Module, batch: Any) -> None:
    """Runs a model on a batch: a tensor, a tuple of arguments or a dict of keywords.

    Raises:
        InputError: It failed, and the batch is on a device where the model is not.
    """
    with explaining_devices(model, batch):
        _run_batch(model, batch)


def _run_batch(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        try:
            model(*batch)
        except TypeError as error:
            if len(batch) > 1:
                raise TypeError(
                    f"{error} (a batch of {len(batch)} is taken as that many arguments of the model; for a "
                    f"loader of inputs with labels write: calibrate(model, (x for x, _ in loader)))"
                ) from error
            raise
    else:
        model(batch)
