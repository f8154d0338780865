"""Running a user's model: that it is one, its modes, its batches, and what to say when these do not fit."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.errors import ArgumentTypeError, CalibrationError, InputError, QuantPatchError
from quantpatch.torch_tools.progress import progress_over

T = TypeVar("T")


def demand_model(model: Any, function: str) -> None:
    """Checks what a function was given for a model.

    Args:
        model: What was given.
        function: Name of the function.

    Raises:
        ArgumentTypeError: It is not a module, or holds quantizers of another library that say that they are
            not for this function.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            instead = getattr(type(module), "instead", None)
            if isinstance(instead, Mapping) and function in instead:
                if module is model:
                    raise ArgumentTypeError(
                        f"{function} does not take a {type(model).__name__}. Instead write: "
                        f"{instead[function]}",
                        model=model,
                    )
                raise ArgumentTypeError(
                    f"{function} does not know the quantizers in {type(model).__name__}, such as {name!r}, a "
                    f"{type(module).__name__} of {type(module).__module__.partition('.')[0]}. Instead write: "
                    f"{instead[function]}",
                    model=model,
                )
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentTypeError(
            f"{function} takes a model, not its class: write {function}({model.__name__}(...))", model=model
        )
    shown = repr(model)
    if len(shown) > 60 or "\n" in shown:
        shown = f"a {type(model).__name__}"
    raise ArgumentTypeError(f"{function} takes a model (an nn.Module), not {shown}", model=model)


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wraps, whose code can be followed; the model itself where nothing does."""
    modules = model.__dict__.get("_modules", {})
    if "_orig_mod" not in modules:  # a scripted model's are not a dictionary, and may lack get
        return model
    wrapped = modules["_orig_mod"]
    return wrapped if isinstance(wrapped, nn.Module) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """What runs by itself: no compiled model, nor one whose ranks wait for each other in every batch."""
    runner = uncompiled(model)
    return runner.module if isinstance(runner, nn.parallel.DistributedDataParallel) else runner


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
def explaining(model: nn.Module, inputs: Any) -> Iterator[None]:
    """A block that runs a model; of what fails in it it says where in the model, and on which device.

    Args:
        model: The model.
        inputs: Its inputs, nested as they may be.

    Raises:
        InputError: It failed, and the inputs are on a device where the model is not.
    """
    try:
        with naming_quantizers(model):
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


@contextlib.contextmanager
def naming_quantizers(model: nn.Module) -> Iterator[None]:
    """A block whose errors begin with the name of the quantizer that they come from."""
    try:
        yield
    except QuantPatchError as error:
        own = getattr(error, "quantizer", None)
        names = [name for name, module in model.named_modules() if module is own]
        if names and f"{names[0]}: " not in str(error):  # by itself, or a block inside
            error.args = (f"{names[0]}: {error}",)
        if names and isinstance(error, CalibrationError):
            error.quantizers = (names[0],)
        raise


def as_batches(data: Any) -> Iterable[Any]:
    """The batches that a user gave; one tensor, or one dict of keywords, is one batch.

    Raises:
        ArgumentTypeError: They are not batches.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, nn.Module)):
        return data
    raise ArgumentTypeError(
        f"data is {type(data).__name__}, expected batches: tensors, tuples of arguments or dicts of keywords",
        data=data,
    )


def arguments(
    args: tuple[Any, ...] | Tensor | Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with once, as functions take it: what is not a tuple is the one argument.

    Raises:
        ArgumentTypeError: The keywords are not a mapping.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentTypeError(
            f"kwargs is a {type(kwargs).__name__}, expected the model's keywords: kwargs={{'name': value}}",
            kwargs=kwargs,
        )
    # A named tuple, such as a PackedSequence, is one argument.
    return args if type(args) is tuple else (args,), dict(kwargs or {})


def as_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a model is called with once, as a batch; arguments beside keywords get their names."""
    if not (args and kwargs):
        return dict(kwargs) if kwargs else args
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def run_batch(model: nn.Module, batch: Any) -> Any:
    """What a model gives for a batch: a tensor, a tuple of arguments or a dict of keywords.

    Raises:
        InputError: It failed, and the batch is on a device where the model is not.
    """
    with explaining(model, batch):
        return _run_batch(model, batch)


def _run_batch(model: nn.Module, batch: Any) -> Any:
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = batch
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    else:
        args = (batch,)
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        why = _unfit(model, args, kwargs)
        if why:
            raise InputError(why) from error
        raise


def _unfit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why the model's forward cannot be called with a batch, and what to write; empty if it can."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # as of code that is not Python's
        return ""
    takes_any_key = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    ordered = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [n for n, p in parameters.items() if p.default is p.empty and n in {*by_name, *ordered}]
    given = {*ordered[: len(args)], *kwargs}
    missing = [n for n in required if n not in given]
    takes = f"{type(model).__name__}.forward takes ({', '.join(parameters)})"
    if unknown := [key for key in kwargs if key not in by_name and not takes_any_key]:
        kept = tuple(key for key in kwargs if key in by_name)
        return (
            f"a batch is a dict with {_quoted(unknown)}, but {takes}. Give batches without: "
            f"({{key: batch[key] for key in {kept!r}}} for batch in data)"
        )
    if len(args) > len(ordered) and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        names = ", ".join(ordered)
        what = names if len(ordered) == 1 else f"({names})"
        return (
            f"a batch of {len(args)} is taken as that many arguments, but {takes}. If the last are labels, "
            f"give batches without: ({what} for {names}, *_ in data)"
        )
    if missing:
        has = f"a dict with {_quoted(kwargs)}" if kwargs else f"taken as {len(args)} of the arguments"
        return f"a batch is {has} and lacks {_quoted(missing)}: {takes}. Give batches that have all of these"
    return ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class EnoughOfBatch(BaseException):
    """Ends the run of a model on a batch, since nothing that comes is of interest."""


def run_over(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    progress: bool,
    description: str = "Calibrating",
) -> None:
    """Runs a model over data; of what wraps it the module inside.

    Where data is batches, what watches the model may raise ``EnoughOfBatch``.

    Args:
        model: The model.
        data: As ``calibrate`` takes it.
        progress: Whether to show a progress bar (on a terminal or in a notebook only).
        description: Stands before the bar.

    Raises:
        CalibrationError: There is no batch.
        ArgumentTypeError: The data is neither batches nor a function.
        InputError: It is on a device where the model is not.
    """
    # A compiled model would be compiled anew for a run that is over after a few batches.
    runner = unwrapped(model)
    if callable(data) and not isinstance(data, Iterable):
        data(runner)
        return
    count = 0
    with progress_over(as_batches(data), description, progress=progress) as shown:
        for batch in shown:
            with contextlib.suppress(EnoughOfBatch):
                run_batch(runner, batch)
            count += 1
    if not count:
        raise CalibrationError("the data holds no batch, so there is nothing to run the model on")
