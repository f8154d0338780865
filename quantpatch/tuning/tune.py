"""``tune``: methods that make a quantized model more accurate with a few batches and no labels."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.errors import ArgumentError, ArgumentTypeError, TuningError, UnknownNameError
from quantpatch.layers.fingerprint import fingerprint
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.fast_paths import without_fast_paths
from quantpatch.torch_tools.forward import demand_model
from quantpatch.torch_tools.sharded import sharding_of
from quantpatch.tuning.report import TuningReport
from quantpatch.tuning.resuming import Records
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]
Method = str | Tuner


def tune(
    model: nn.Module,
    data: Batches | Callable[[nn.Module], Any],
    *,
    method: Method | Sequence[Method] | None = None,
    recipe: str | Recipe | None = None,
    calibration: Mapping[str, Any] | None = None,
    seed: int = 0,
    offload: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> TuningReport:
    """Changes the weights of a quantized model so that it loses less, with a few batches and no labels.

    ::

        qp.tune(model, batches, method="gptq", act_order=False)
        qp.tune(model, batches, method=["smoothquant", GPTQ(damping=0.1), "bias_correction"])

    What comes out is an ordinary quantized model, all of whose ranges are known: those that are
    not are found as ``calibrate`` does, so calibrate before, or not at all. The model runs in eval mode. If
    anything fails, or is interrupted, the model is as it was; ``revert`` gives back the weights from before.

    Args:
        model: The quantized model.
        data: As ``calibrate`` takes it. It is gone over several times; what can be gone over once is held in
            memory.
        method: Names of methods, or the methods with their options, in the order in which they are to be
            used.
        recipe: In the place of ``method``, a recipe that has methods (``tune``), or its name.
        calibration: Options of ``calibrate`` for ranges that are not known: ``{"method": "mse"}``.
        seed: Of what a method leaves to chance.
        offload: A folder in which a temporary one keeps what blocks are given, for all batches; default: that
            is held in memory.
        resume: A folder that keeps what was done, after each block whose weights are rounded for good and
            after each method: if it is interrupted, the same call on the same model goes on from there.
        progress: Whether to show progress (on a terminal or in a notebook only).
        **options: Those of the method, if it is one, by its name.

    Returns:
        What each method tuned, how much better it is by what the method minimizes, and what it did not tune.

    Raises:
        TuningError: There is no batch, or data reaches no layer that a method could tune.
        ArgumentError: There is no quantizer, no method, or a method has no such option; ``offload`` is not a
            folder.
        ArgumentTypeError: ``model`` is not a model, or ``data`` not batches.
        UnknownNameError: There is no method, or recipe, of a name.
        CalibrationError: Ranges that a method needs cannot be found.
        FileError: ``resume`` is no folder, or has files of another model, or of other methods.
        MissingExtraError: ``resume`` needs safetensors, which is not installed.
    """
    demand_model(model, "tune")
    methods = [_made(one, options) for one in _several(method, recipe, options)]
    quantizers = named_quantizers(model).values()
    if not quantizers:
        raise ArgumentError(
            f"{type(model).__name__} holds no quantizer; build it inside `with quantize_modules():`",
            model=model,
        )
    if any(q.calibrating for q in quantizers):
        raise TuningError("the model is being calibrated: end that calibration first")
    if sharding := sharding_of(model.modules()):
        raise TuningError(f"the model is sharded by {sharding}: tune it before")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TuningError("parameters of the model are on the meta device: give them values first")
    folder = None if offload is None else Path(offload)
    if folder is not None and not folder.is_dir():
        raise ArgumentError(f"offload={str(folder)!r}: there is no such folder", offload=offload)
    records = None
    if resume is not None:
        settings = ([tuner for _, tuner in methods], calibration, seed)
        records = Records(Path(resume), fingerprint(model, *settings))
    steps = []
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
        without_fast_paths(),
        Tuning(
            model, data, calibration=calibration or {}, progress=progress, seed=seed, offload=folder
        ) as tuning,
    ):
        torch.manual_seed(seed)
        if records is not None:
            tuning.go_on(records, [name for name, _ in methods])
        for number, (name, tuner) in enumerate(methods):
            with tuning.step(number, name) as step:
                if not tuning.is_done(number):
                    tuner.tune(tuning)
            steps += step
        tuning.calibrate()
    return TuningReport(written_name(type(model)), tuple(steps))


def _several(
    method: Method | Sequence[Method] | None, recipe: str | Recipe | None, options: Mapping[str, Any]
) -> Sequence[Method]:
    if (method is None) == (recipe is None):
        raise ArgumentError(
            "expected either method= (a name such as 'gptq', or several) or recipe= (one with methods, "
            "Recipe(tune=[...]))",
            method=method,
        )
    if recipe is not None:
        found = registry.recipe(recipe)
        if not found.tune:
            raise ArgumentError(
                f"the recipe {found.name!r} has no methods: write recipe.replace(tune=['gptq']), or method=",
                recipe=recipe,
            )
        method = found.tune
    several = [method] if isinstance(method, (str, Tuner)) else list(method or ())
    if not several:
        raise ArgumentError("method=[]: expected a method", method=method)
    if options and len(several) > 1:
        raise ArgumentError(
            f"{next(iter(options))!r} is given beside {len(several)} methods: give it to its own method, "
            f"such as GPTQ(damping=0.1) of `from quantpatch.tuning import GPTQ` in the place of 'gptq'",
            **dict(list(options.items())[:1]),
        )
    return several


def _made(method: Any, options: Mapping[str, Any]) -> tuple[str, Tuner]:
    """A method's name, and it."""
    if isinstance(method, Tuner):
        if options:
            raise ArgumentError(
                f"{next(iter(options))!r} is given beside {method}: give it to that",
                **dict(list(options.items())[:1]),
            )
        return type(method).__name__, method
    if not isinstance(method, str):
        raise ArgumentTypeError(
            f"method={method!r}: expected a name such as 'gptq', a Tuner, or several of these",
            method=method,
        )
    kind = registry.tuner(method, Tuner)
    known = _options_of(kind)
    for name in options:
        if name not in known:
            raise UnknownNameError.of(f"option of {method!r}", name, known)
    made: Tuner = kind(**options)
    return method, made


def _options_of(kind: type[Any]) -> list[str]:
    return list(inspect.signature(kind).parameters)
