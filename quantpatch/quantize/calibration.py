"""One calibration of a model's quantizers: it starts, and then it finishes or is given up.

At the end every range is set, or, if anything is wrong, none is and the model is as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.calibrators import Calibrator, warn_of_negatives
from quantpatch.errors import CalibrationError, listed, warn_caller
from quantpatch.layers.base import named_layers, weight_quantizers
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.numerics.qparams import of_longer_side
from quantpatch.quantize.call_ranges import CallRanges
from quantpatch.quantize.to_calibrate import Existing, checked_existing, patterns, to_calibrate, why_none
from quantpatch.quantize.weight_reads import FirstCall
from quantpatch.quantize.zero_points import ends_on_all, fitted, to_fit, watching_ends, without_those_found
from quantpatch.reports.report import CalibrationReport
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.distributed import Ranks
from quantpatch.torch_tools.forward import evaluating, naming_quantizers

_LOGGER = logging.getLogger("quantpatch")


class Calibration:
    """A block in which the model runs in float and in eval mode and its quantizers collect statistics.

    ::

        with calibrating(model, method="entropy") as calibration:
            for images, _ in loader:
                model(images)
        print(calibration.report)

    Where no range is to be found, as of formats that take it from each tensor, or with ``existing="keep"``
    and none missing, nothing is done, and the logger ``quantpatch`` says so.

    Ranges are set when the block ends. If it raises, or a range cannot be found, none is set and every
    quantizer and module is in the state it was in. With ``torch.distributed`` initialised, every rank must
    calibrate: statistics are put together over all ranks first, and where one rank fails all of them raise.

    Args:
        model: Holds the quantizers.
        method: Name of the calibrator for activations, such as ``"max"``, ``"entropy"``, ``"mse"``,
            ``"percentile"``; default: what each quantizer's descriptor says.
        weight_method: The same for weights.
        zero_points: Whether symmetric ranges of activations get a zero point where data needs less on one
            side of 0; ``fit_zero_points`` says how. A method that looks for a threshold does so for the
            integers that the longer side has then. Zero points that were found so before are looked for again
            with their ranges; those that a descriptor asks for stay.
        existing: What becomes of ranges that are known already: ``"error"`` raises an error, ``"keep"``
            leaves them and finds those of the others, ``"overwrite"`` finds them all again.
        strict: Quantizers that saw no data, or only zeros, are an error; otherwise a warning names
            them, and they stay as they are: without a range they take that of each tensor. Those of a layer
            that does not run because a forward reads its weight itself are never an error: they are
            switched off, and a warning names the layer.
        group: The ranks that hold this model; None for all. Of a pipeline's stages each is its own model.
        passive: Whether the model runs as it would without this, in its mode and with gradients, is never run
            once more, and what a range could not be found for stands in the report alone.
        **options: Handed to the calibrators of activations, such as ``percentile=99.9``.

    Raises:
        CalibrationError: There is no quantizer, ranges are known already, the data holds NaN
            or infinity, (``strict``) a quantizer saw no data or only zeros, or another rank failed.
        ArgumentError: ``existing`` is not one of the three, or an option of the calibrator is out of range.
        UnknownNameError: There is no calibrator of that name.

    Attributes:
        quantizers: Those that ranges are looked for, by name, while the block is open and after it.
        report: What was done, once the block is over.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str | None = None,
        weight_method: str | None = None,
        zero_points: bool = False,
        existing: Existing = "error",
        strict: bool = True,
        group: dist.ProcessGroup | None = None,
        passive: bool = False,
        **options: Any,
    ) -> None:
        self.quantizers: dict[str, TensorQuantizer] = {}
        self.report: CalibrationReport | None = None
        self._model = model
        self._method = method
        self._weight_method = weight_method
        self._zero_points = zero_points
        self._existing = checked_existing(existing)
        self._strict = strict
        self._group = group
        self._passive = passive
        self._options = options
        self._calibrators: dict[str, Calibrator] = {}
        self._of_weights: set[TensorQuantizer] = set()
        self._block = self._opened()

    def __enter__(self) -> Calibration:
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        model, quantizers, calibrators = self._model, self.quantizers, self._calibrators
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_float(model))
            first = None if self._passive else stack.enter_context(FirstCall(model))
            calls = None if self._passive else stack.enter_context(CallRanges(model))
            with Ranks(self._group) as ranks, naming_quantizers(model):
                quantizers.update(to_calibrate(model, self._existing))
                if not (quantizers or self._passive):
                    # By logging: a warning would stop those who make warnings errors, and one script serves
                    # all formats.
                    _LOGGER.warning("%s", why_none(model))
                anew = quantizers if self._zero_points else {}
                coming_back = stack.enter_context(without_those_found(anew))
                self._begin()
                watched = _to_watch(model, quantizers) if self._zero_points else {}
                with watching_ends(watched) as seen, contextlib.ExitStack() as mode:
                    if not self._passive:
                        mode.enter_context(evaluating(model))
                        mode.enter_context(torch.no_grad())
                    yield
                _demand_still_there(model, quantizers)
                _demand_same(ranks, tuple(calibrators), "calibrates")
                _demand_same(ranks, tuple(watched), "looks for the zero points of")
            for calibrator in calibrators.values():  # the same order on every rank
                calibrator.synchronize(self._group)
            with Ranks(self._group) as ranks, naming_quantizers(model):
                ranges, report = self._found(first)
                fits = _fits(watched, ends_on_all(ranks, seen), ranges, calibrators)
            coming_back.difference_update(ranges)
        with warning_of_late_ranges([model]):
            for name, amax in ranges.items():
                quantizers[name].replace_range(amax)
            for name, fit in fits.items():
                watched[name].use_zero_point(*fit)
        if first is not None:
            first.switch_off()
        self.report = attrs.evolve(report, zero_points={name: zero for name, (zero, _) in fits.items()})
        if first is not None and calls is not None:
            if report.problem:
                warn_caller(
                    f"{report.problem}. They stay as they are: without a range they take that of each tensor"
                )
            first.warn()
            calls.warn()
        warn_of_negatives({name: calibrators[name] for name in ranges})

    def _begin(self) -> None:
        """Makes all calibrators before a quantizer begins to collect: a name or an option may be wrong."""
        self._of_weights = weight_quantizers(self._model)
        for name, quantizer in self.quantizers.items():
            self._calibrators[name] = (
                quantizer.make_calibrator(self._weight_method)
                if quantizer in self._of_weights
                else quantizer.make_calibrator(self._method, **self._options)
            )
        for name, quantizer in self.quantizers.items():
            quantizer.enable_calib(self._calibrators[name])

    def _found(self, first: FirstCall | None) -> tuple[dict[str, Tensor], CalibrationReport]:
        """The ranges that the statistics give, and what is to be reported of them.

        Args:
            first: Knows which of the layers that saw no data could not see any.

        Raises:
            CalibrationError: (``strict``) A quantizer that should have a range can have none.
        """
        ranges: dict[str, Tensor] = {}
        unseen: list[str] = []
        zero: list[str] = []
        for name, calibrator in self._calibrators.items():
            if not calibrator.saw_data:
                unseen.append(name)
                continue
            quantizer = self.quantizers[name]
            amax = quantizer.range_from(calibrator)
            # A weight may be all zero, as layers that start as identities are; data that is says nothing.
            if quantizer not in self._of_weights and not amax.any():
                zero.append(name)
            else:
                ranges[name] = amax
        read = first.weights_read(unseen) if first is not None and unseen else ()
        unseen = [name for name in unseen if name not in read]
        aside = self._in_branches(unseen)
        names = (*(name for name in unseen if name not in aside), *zero)
        problem = self._problem(unseen, zero, aside)
        if names and self._strict:
            rules = listed((f"{pattern!r}: None" for pattern in patterns(self._model, names)), limit=4)
            raise CalibrationError(
                f"{problem}. No range was set. Give batches that reach them, leave them float with "
                f"qp.configure(model, {{{rules}}}), or pass strict=False to let them take the range of each "
                f"tensor",
                quantizers=names,
            )
        return ranges, CalibrationReport(
            model=written_name(type(self._model)),
            calibrated=tuple(ranges),
            skipped={
                **dict.fromkeys(_kept(self._model, self.quantizers), "kept its range"),
                **dict.fromkeys(unseen, "saw no data"),
                **dict.fromkeys(zero, "saw only zeros"),
                **dict.fromkeys(read, "switched off"),
            },
            problem=problem,
        )

    def _in_branches(self, unseen: list[str]) -> set[str]:
        """Those that stand in a branch of a forward that ran, such as what a step with a cache computes."""
        owners = {
            f"{name}.{quantizer_name(operand)}".lstrip("."): name
            for name, layer in named_layers(self._model).items()
            for operand in layer._inner
        }
        ran = {owner for name, owner in owners.items() if name in self._calibrators and name not in unseen}
        return {name for name in unseen if owners.get(name) in ran}

    def _problem(self, unseen: list[str], zero: list[str], aside: set[str]) -> str:
        count = len(self._calibrators)
        problems = []
        if missed := [name for name in unseen if name not in aside]:
            problems.append(
                f"{len(missed)} of {count} quantizers saw no data, because their layers did not run, or "
                f"without that input, or on tensors that no format takes: {listed(missed)}"
            )
        if aside:
            problems.append(
                f"{len(aside)} of {count} quantizers saw no data, because they stand in branches of forwards "
                f"that these batches do not reach: {listed(sorted(aside))}"
            )
        if zero:
            problems.append(f"{len(zero)} of {count} quantizers saw only zeros: {listed(zero)}")
        if below := [name for name in zero if self._calibrators[name].negative_share]:
            problems.append(
                f"of these some saw negative values as well, which their unsigned integers cannot hold: "
                f"{listed(below)}. Use signed ones (unsigned=False)"
            )
        return "; ".join(problems)


def _kept(model: nn.Module, calibrated: Mapping[str, TensorQuantizer]) -> tuple[str, ...]:
    """Those that had a range before, which was not looked for."""
    return tuple(
        name
        for name, q in named_quantizers(model).items()
        if name not in calibrated and not (q.disabled or q.descriptor.dynamic) and q.amax is not None
    )


def _to_watch(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> dict[str, TensorQuantizer]:
    """Those that may get a zero point, whose ranges are being found or are their descriptors'."""
    fitting = to_fit(model).items()
    return {name: q for name, q in fitting if name in quantizers or q.descriptor.amax is not None}


def _demand_still_there(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> None:
    now = named_quantizers(model)
    replaced = [name for name, quantizer in quantizers.items() if now.get(name, quantizer) is not quantizer]
    if replaced:
        raise CalibrationError(
            f"{len(replaced)} quantizers were replaced while they were calibrated: {listed(replaced)}. No "
            f"range was set. Configure or load a model before that or after",
            quantizers=tuple(replaced),
        )


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
            calibrator.zero_point = of_longer_side(fit[0], bits)
            ranges[name] = quantizer.range_from(calibrator)
            fit = fitted(float(ranges[name]), ends[name], bits, least_gain=1.0)
        if fit is not None:
            fits[name] = fit
    return fits
