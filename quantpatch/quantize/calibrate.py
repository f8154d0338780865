"""Find the ranges of a model's quantizers from data: ``calibrate`` and ``calibrating``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.quantize.calibration import Calibration
from quantpatch.quantize.calibration_report import CalibrationReport
from quantpatch.quantize.to_calibrate import Existing
from quantpatch.torch_tools.forward import demand_model, run_over

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]


def calibrating(
    model: nn.Module,
    *,
    method: str | None = None,
    weight_method: str | None = None,
    zero_points: bool = False,
    existing: Existing = "error",
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Calibration:
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
            integers that the longer side has then. Zero points that were found so before are looked for anew
            with their ranges; those that a descriptor asks for stay.
        existing: What becomes of ranges that are known already: ``"error"`` raises one, ``"keep"`` leaves
            them and finds those of the other quantizers, ``"overwrite"`` finds them all anew.
        strict: Quantizers that saw no data, or only zeros, are an error; otherwise a warning names
            them, and they stay as they are: without a range they take that of each tensor. Those of a layer
            that does not run because a forward reads its weight itself are never an error: they are
            switched off, and a warning names the layer.
        group: The ranks that hold this model; None for all. Of a pipeline's stages each is its own model.
        **options: Handed to the calibrators of activations, such as ``percentile=99.9``.

    Returns:
        The block; its ``report`` says what it did, once it is over.

    Raises:
        CalibrationError: There is no quantizer, ranges are known already, the data holds NaN
            or infinity, (``strict``) a quantizer saw no data or only zeros, or another rank failed.
        ArgumentError: ``existing`` is none of the three, or an option of the calibrator is out of range.
        UnknownNameError: There is no calibrator of that name.
    """
    return Calibration(
        model,
        method=method,
        weight_method=weight_method,
        zero_points=zero_points,
        existing=existing,
        strict=strict,
        group=group,
        **options,
    )


def calibrate(
    model: nn.Module,
    data: Batches | Callable[[nn.Module], Any],
    *,
    method: str | None = None,
    weight_method: str | None = None,
    zero_points: bool = False,
    existing: Existing = "error",
    strict: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
    **options: Any,
) -> CalibrationReport:
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
        existing: See there.
        strict: See there.
        group: See there.
        progress: Whether to show a progress bar (on a terminal only).
        **options: See ``calibrating``.

    Returns:
        Which quantizers got a range, which kept theirs, and which saw no data.

    Raises:
        CalibrationError: See ``calibrating``; also if there is no batch.
        ArgumentError: See ``calibrating``.
        UnknownNameError: See ``calibrating``.
        ArgumentTypeError: ``model`` is not a model, or ``data`` not batches.
    """
    demand_model(model, "calibrate")
    with Calibration(
        model,
        method=method,
        weight_method=weight_method,
        zero_points=zero_points,
        existing=existing,
        strict=strict,
        group=group,
        **options,
    ) as calibration:
        if zero_points or calibration.quantizers:
            run_over(model, data, progress=progress)
    assert calibration.report is not None
    return calibration.report
