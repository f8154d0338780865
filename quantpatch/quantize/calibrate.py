"""Find the ranges of a model's quantizers from data: ``calibrate`` and ``calibrating``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.quantize.calibration import Calibration
from quantpatch.quantize.to_calibrate import Existing
from quantpatch.reports.report import CalibrationReport
from quantpatch.torch_tools.forward import demand_model, run_over

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]


#: A block in which ranges are found; ``calibrate`` is one around a run over data.
calibrating = Calibration


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
        progress: Whether to show a progress bar (on a terminal or in a notebook only).
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
