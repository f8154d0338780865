"""Running somebody's model: that it is one, its modes, its batches, and what to say when these do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.errors import CalibrationError, InputError

__all__ = [
    "as_batches",
    "demand_model",
    "evaluating",
    "explaining_devices",
    "run_batch",
    "run_over",
    "uncompiled",
]


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
    shown = repr(model)
    if len(shown) > 60 or "\n" in shown:
        shown = f"a {type(model).__name__}"
    raise InputError(f"{function} takes a model (an nn.Module), not {shown}")


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wraps, whose code can be followed; the model itself where nothing does."""
    modules = model.__dict__.get("_modules", {})
    if "_orig_mod" not in modules:  # a scripted model's are no dictionary, and may lack get
        return model
    wrapped = modules["_orig_mod"]
    return wrapped if isinstance(wrapped, nn.Module) else model


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


def as_batches(data: Any) -> Iterable[Any]:
    """The batches that a user gave; one tensor, or one dict of keywords, is one batch.

    Raises:
        InputError: They are no batches.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, nn.Module)):
        return data
    raise InputError(
        f"data is {type(data).__name__}, expected batches: tensors, tuples of arguments or dicts of keywords"
    )


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


def run_over(model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any], *, progress: bool) -> None:
    """Runs a model over data; of what wraps it the module inside.

    Args:
        model: The model.
        data: As ``calibrate`` takes it.
        progress: Whether to show a progress bar (on a terminal only).

    Raises:
        CalibrationError: There is no batch.
        InputError: The data is neither batches nor a function, or on a device where the model is not.
    """
    # A compiled model would be compiled anew for a run that is over after a few batches.
    runner = uncompiled(model)
    if isinstance(runner, nn.parallel.DistributedDataParallel):
        runner = runner.module  # whose ranks would wait for each other in every batch
    if callable(data) and not isinstance(data, Iterable):
        data(runner)
        return
    data = as_batches(data)
    total = len(data) if isinstance(data, Sized) else None
    console = Console(stderr=True)
    count = 0
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        for batch in bar.track(data, total=total, description="Calibrating"):
            run_batch(runner, batch)
            count += 1
    if not count:
        raise CalibrationError("the data holds no batch, so there is nothing to calibrate from")
