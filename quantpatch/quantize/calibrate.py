"""Find the ranges of a model's quantizers from data: ``calibrate`` and ``calibrating``.

The model runs in float and in eval mode while statistics are collected. At the end every range is set,
or, if anything is wrong, none is and the model is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.calibrators import Calibrator, warn_of_negatives
from quantpatch.errors import CalibrationError, OptionError, listed, warn_caller
from quantpatch.layers.base import weight_quantizers
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.numerics.affine import longer_side
from quantpatch.numerics.formats import Integer
from quantpatch.quantize.call_ranges import CallRanges
from quantpatch.quantize.late_ranges import telling_of_late_ranges
from quantpatch.quantize.to_calibrate import patterns, to_calibrate
from quantpatch.quantize.weight_reads import FirstCall
from quantpatch.quantize.zero_points import ends_on_all, fitted, to_fit, watching_ends, without_those_found
from quantpatch.torch_tools.distributed import Ranks
from quantpatch.torch_tools.forward import demand_model, evaluating, run_over

__all__ = ["calibrate", "calibrating", "collecting"]

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]


@contextlib.contextmanager
def calibrating(
    model: nn.Module,
    method: str | None = None,
    *,
    weight_method: str | None = None,
    zero_points: bool = False,
    overwrite: bool = False,
    only_missing: bool = False,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Iterator[None]:
    """A block in which the model runs in float and its quantizers collect statistics.

    ::

        with calibrating(model, method="entropy"):
            for images, _ in loader:
                model(images)

    Where no range is to be found, as of formats that take it from each tensor, or with ``only_missing=True``
    and none missing, nothing is done, and the logger ``quantpatch`` says so.

    Ranges are set when the block ends. If it raises, or a range cannot be told, none is set and every
    quantizer and module is in the state it was in. With ``torch.distributed`` initialised, every rank must
    calibrate: statistics are put together over all ranks first, and where one rank fails all of them raise.

    Args:
        model: Holds the quantizers.
        method: Name of the calibrator for activations, such as ``"max"``, ``"entropy"``, ``"mse"``,
            ``"percentile"``; default: what each quantizer's descriptor says.
        weight_method: The same for weights.
        zero_points: Whether symmetric ranges of activations get a zero point where data needs less on one
            side of 0; ``fit_zero_points`` says how. A method that looks for a threshold does so for the
            integers that the longer side has then. Zero points that were found so before are looked for anew
            with their ranges; those that a descriptor asks for stay.
        overwrite: Replace ranges that are known already; otherwise they are an error.
        only_missing: Leave known ranges as they are, and find those of the other quantizers.
        strict: Quantizers that saw no data, or only zeros, are an error; otherwise a warning names
            them, and they stay as they are: without a range they take that of each tensor. Those of a layer
            that does not run because a forward reads its weight itself are never an error: they are
            switched off, and a warning names the layer.
        group: The ranks that hold this model; None for all. Of a pipeline's stages each is its own model.
        **options: Handed to the calibrators of activations, such as ``percentile=99.9``.

    Raises:
        CalibrationError: There is no quantizer, ranges are known already, the data holds NaN
            or infinity, (``strict``) a quantizer saw no data or only zeros, or another rank failed.
        OptionError: ``overwrite`` and ``only_missing`` contradict each other, or an option of the calibrator
            is out of range.
        UnknownNameError: There is no calibrator of that name.
    """
    if overwrite and only_missing:
        raise OptionError(
            "overwrite=True finds all ranges anew and only_missing=True leaves those known: give one"
        )

    def choose() -> dict[str, TensorQuantizer]:
        return to_calibrate(model, overwrite, only_missing)

    def tell(message: str, names: tuple[str, ...]) -> None:
        if strict:
            rules = listed((f"{pattern!r}: None" for pattern in patterns(model, names)), limit=4)
            raise CalibrationError(
                f"{message}. No range was set. Give batches that reach them, leave them float with "
                f"qp.configure(model, {{{rules}}}), or pass strict=False to let them take the range of each "
                f"tensor",
                quantizers=names,
            )
        warn_caller(f"{message}. They stay as they are: without a range they take that of each tensor")

    with (
        FirstCall(model) as first,
        CallRanges(model) as calls,
        collecting(
            model,
            choose,
            tell,
            method,
            weight_method=weight_method,
            zero_points=zero_points,
            group=group,
            excused=first.weights_read,
            **options,
        ),
        evaluating(model),
        torch.no_grad(),
    ):
        yield
    first.leave_float()
    calls.warn()


@contextlib.contextmanager
def collecting(
    model: nn.Module,
    choose: Callable[[], Mapping[str, TensorQuantizer]],
    tell: Callable[[str, tuple[str, ...]], None],
    method: str | None = None,
    *,
    weight_method: str | None = None,
    zero_points: bool = False,
    group: dist.ProcessGroup | None = None,
    excused: Callable[[Sequence[str]], Iterable[str]] = lambda names: (),
    **options: Any,
) -> Iterator[None]:
    """``calibrating`` for some quantizers of a model that runs as it is, in its mode and with gradients.

    Args:
        model: Holds the quantizers.
        choose: Gives those to find the ranges of, by name.
        tell: Called with a message and the names of the quantizers that can have no range, if there are
            any, before a range is set; if it raises, none is.
        method: As in ``calibrating``, like the rest.
        weight_method: See there.
        zero_points: See there.
        group: See there.
        excused: Gives those, of quantizers that saw no data, that could not see any: nothing is told of them.
        **options: See there.

    Raises:
        CalibrationError: The data holds NaN or infinity, or another rank failed.
        UnknownNameError: There is no calibrator of that name.
    """
    quantizers: dict[str, TensorQuantizer] = {}
    calibrators: dict[str, Calibrator] = {}
    with in_float(model), contextlib.ExitStack() as stack:
        with Ranks(group) as ranks, _naming(quantizers):
            quantizers.update(choose())
            anew = quantizers if zero_points else {}
            coming_back = stack.enter_context(without_those_found(anew))
            of_weights = weight_quantizers(model)
            for name, quantizer in quantizers.items():
                calibrators[name] = (
                    quantizer.make_calibrator(weight_method)
                    if quantizer in of_weights
                    else quantizer.make_calibrator(method, **options)
                )
            for name, quantizer in quantizers.items():
                quantizer.enable_calib(calibrators[name])
            watched = _to_watch(model, quantizers) if zero_points else {}
            with watching_ends(watched) as seen:
                yield
            _demand_still_there(model, quantizers)
            _demand_same(ranks, tuple(calibrators), "calibrates")
            _demand_same(ranks, tuple(watched), "looks for the zero points of")
        for calibrator in calibrators.values():  # the same order on every rank
            calibrator.synchronize(group)
        with Ranks(group) as ranks, _naming(quantizers):
            ranges = _ranges(calibrators, quantizers, of_weights, tell, excused)
            fits = _fits(watched, ends_on_all(ranks, seen), ranges, calibrators)
        coming_back.difference_update(ranges)
    with telling_of_late_ranges([model]):
        for name, amax in ranges.items():
            quantizers[name].replace_range(amax)
    for name, fit in fits.items():
        watched[name].use_zero_point(*fit, found=True)
    warn_of_negatives({name: calibrators[name] for name in ranges})


def _demand_still_there(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> None:
    now = named_quantizers(model)
    replaced = [name for name, quantizer in quantizers.items() if now.get(name, quantizer) is not quantizer]
    if replaced:
        raise CalibrationError(
            f"{len(replaced)} quantizers were replaced while they were calibrated: {listed(replaced)}. "
            f"No range was set. Configure or load a model before that or after",
            quantizers=tuple(replaced),
        )


def _to_watch(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> dict[str, TensorQuantizer]:
    """Those that may get a zero point, whose ranges are being found or are their descriptors'."""
    fitting = to_fit(model).items()
    return {name: q for name, q in fitting if name in quantizers or q.descriptor.amax is not None}


@contextlib.contextmanager
def _naming(quantizers: Mapping[str, TensorQuantizer]) -> Iterator[None]:
    """A block whose errors tell the qualified name of the quantizer that they come from."""
    try:
        yield
    except CalibrationError as error:
        names = tuple(name for name, q in quantizers.items() if q is error.quantizer)
        if not names:
            raise
        raise CalibrationError(f"{names[0]}: {error}", quantizers=names) from error


def _demand_same(ranks: Ranks, names: tuple[str, ...], doing: str) -> None:
    """Checks that all ranks are about to put together the statistics of the same quantizers.

    Raises:
        CalibrationError: They are not, or another rank failed or is gone.
    """
    for index, others in enumerate(ranks.gather(names)):
        differing = sorted(set(others) ^ set(names))
        if differing:
            other = ranks.number(index)
            raise ranks.all_raise(
                CalibrationError(
                    f"rank {other} {doing} other quantizers than rank {dist.get_rank()}; only one of "
                    f"them has {listed(differing)}. Every rank must hold the same model in the same state; "
                    f"where they hold parts of one, such as stages of a pipeline, pass "
                    f"group=dist.new_group(...) of the ranks that hold the same part",
                    quantizers=tuple(differing),
                    ranks=(other,),
                )
            )


def _ranges(
    calibrators: Mapping[str, Calibrator],
    quantizers: Mapping[str, TensorQuantizer],
    of_weights: set[TensorQuantizer],
    tell: Callable[[str, tuple[str, ...]], None],
    excused: Callable[[Sequence[str]], Iterable[str]],
) -> dict[str, Tensor]:
    """The range of every quantizer that can have one."""
    ranges: dict[str, Tensor] = {}
    unseen: list[str] = []
    zero: list[str] = []
    for name, calibrator in calibrators.items():
        if not calibrator.saw_data:
            unseen.append(name)
            continue
        quantizer = quantizers[name]
        amax = quantizer.range_from(calibrator)
        # A weight may be all zero, as layers that start as identities are; data that is says nothing.
        if quantizer not in of_weights and not amax.any():
            zero.append(name)
        else:
            ranges[name] = amax
    problems = []
    if unseen:
        without_layer = set(excused(unseen))
        unseen = [name for name in unseen if name not in without_layer]
    if unseen:
        problems.append(
            f"{len(unseen)} of {len(calibrators)} quantizers saw no data, because their layers did not run, "
            f"or without that input: {listed(unseen)}"
        )
    if zero:
        problems.append(f"{len(zero)} of {len(calibrators)} quantizers saw only zeros: {listed(zero)}")
    below = [name for name in zero if calibrators[name].negative_share]
    if below:
        problems.append(
            f"of these some saw negative values as well, which their unsigned integers cannot hold: "
            f"{listed(below)}. Use signed ones (unsigned=False)"
        )
    if problems:
        tell("; ".join(problems), (*unseen, *zero))
    return ranges


def _fits(
    watched: Mapping[str, TensorQuantizer],
    ends: Mapping[str, tuple[float, float]],
    ranges: dict[str, Tensor],
    calibrators: Mapping[str, Calibrator],
) -> dict[str, tuple[int, float | None]]:
    """What ``use_zero_point`` is to be given, by quantizer; their ranges are looked for once more."""
    fits: dict[str, tuple[int, float | None]] = {}
    for name, quantizer in watched.items():
        amax, bits = ranges.get(name, quantizer.own_range), quantizer.format.bits
        if amax is None or name not in ends:
            continue
        fit = fitted(float(amax), ends[name], bits)
        if fit is not None and name in ranges:
            # The longer side has more steps now, so that another threshold may be best.
            calibrator = calibrators[name]
            calibrator.format = longer_side(Integer(bits, unsigned=True, zero_point=fit[0]))
            ranges[name] = quantizer.range_from(calibrator)
            fit = fitted(float(ranges[name]), ends[name], bits, least_gain=1.0)
        if fit is not None:
            fits[name] = fit
    return fits


def calibrate(
    model: nn.Module,
    data: Batches | Callable[[nn.Module], Any],
    method: str | None = None,
    *,
    weight_method: str | None = None,
    zero_points: bool = False,
    overwrite: bool = False,
    only_missing: bool = False,
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
    **options: Any,
) -> None:
    """Runs the model over data, in float, and sets the range of every quantizer.

    ::

        calibrate(model, (images for images, _ in loader), method="entropy")
        calibrate(model, lambda model: evaluate(model, loader))

    Args:
        model: Holds the quantizers. Of what wraps it to be trained on several ranks, the module inside runs.
        data: Batches, each a tensor, a tuple of the model's arguments or a dict of its keywords; or a
            function that gets the model and runs it.
        method: As in ``calibrating``, like the rest.
        weight_method: See there.
        zero_points: See there.
        overwrite: See there.
        only_missing: See there.
        strict: See there.
        group: See there.
        progress: Whether to show a progress bar (on a terminal only).
        **options: See ``calibrating``.

    Raises:
        CalibrationError: See ``calibrating``; also if there is no batch.
        OptionError: See ``calibrating``.
        UnknownNameError: See ``calibrating``.
        InputError: ``model`` is no model, or ``data`` no batches.
    """
    demand_model(model, "calibrate")
    with calibrating(
        model,
        method,
        weight_method=weight_method,
        zero_points=zero_points,
        overwrite=overwrite,
        only_missing=only_missing,
        strict=strict,
        group=group,
        **options,
    ):
        if zero_points or any(q.calibrating for q in named_quantizers(model).values()):
            run_over(model, data, progress=progress)
