"""``lower``: a quantized model on integer kernels, by torch's own compiler.

Torch's compiler knows integer kernels, oneDNN's, by one pattern of operators (``capture.py`` writes it). They
are fused with activations, additions and the quantizers behind them when weights are constants ("freezing").
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantpatch.errors import warn_caller
from quantpatch.export.program.build import Build
from quantpatch.export.program.comparison import compare
from quantpatch.export.program.export import checked_operands
from quantpatch.export.program.inputs import Inputs
from quantpatch.export.program.kernels import layers_on_integers
from quantpatch.export.program.measured import measure
from quantpatch.export.program.needs import demand_compiler, demand_cpu, demand_patterns, instructions
from quantpatch.export.program.report import LoweringReport
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import arguments, demand_model, evaluating, explaining, uncompiled
from quantpatch.torch_tools.progress import progress_bar
from quantpatch.torch_tools.tracing import tracing


class LoweredModel(nn.Module):
    """A model on integer kernels, as ``lower`` made it: for inference, on inputs as those it was given.

    Attributes:
        report: What runs on integers, and how that compares.
        instead: What to write instead of a function that looks at a model's layers, which are gone here.
    """

    instead: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("audit", "summary", "report", "sensitivity"),
            "model.report, whose integers and skipped say what each layer runs on",
        ),
        **dict.fromkeys(
            ("calibrate", "prepare", "convert", "configure", "tune", "search", "save", "load"),
            "the same with the model that was lowered, and lower that again",
        ),
        **dict.fromkeys(
            ("lower", "export_program", "export_onnx"), "the same with the model that was lowered"
        ),
    }

    def __init__(self, run: Callable[..., Any], inputs: Inputs, report: LoweringReport) -> None:
        super().__init__()
        self._run = run
        self._inputs = inputs
        self.report = report
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives.

        Raises:
            InputError: The inputs are of other types or shapes than those it was lowered for.
        """
        self._inputs.check(args, kwargs)
        with torch.no_grad():
            return self._run(*args, **kwargs)

    def train(self, mode: bool = True) -> LoweredModel:
        """Stays in eval mode: its weights are constants of compiled code."""
        return super().train(False)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a lowered model holds compiled code, which is neither copied nor pickled: write "
            "qp.lower(model, args, path='model.pt2') for a file of it"
        )


def lower(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    path: str | os.PathLike[str] | None = None,
    check: bool = True,
    latency: bool = True,
    progress: bool = True,
) -> LoweredModel:
    """Compiles a quantized model to integer kernels, with PyTorch's own compiler, for CPUs.

    Quantized ``Linear``, ``Conv1d`` and ``Conv2d`` layers become oneDNN's integer kernels, with the
    activation, the addition and the quantizer behind them inside; all else is compiled as float. Which layers
    these are is in the report, from the compiler's own graph. The model is unchanged.

    ``Linear`` layers of which the weights alone are quantized read them as integers where the layer gets at
    most two rows, as a language model does that gives one token after the other: in bfloat16 by torch's
    kernels for that (``_weight_int8pack_mm``, and ``_weight_int4pack_mm_for_cpu`` for 4 bits in blocks of 32,
    64, 128 or 256), in float32 by code of the compiler's own.

    Call ``prepare(model, args, runtime="inductor")`` before calibration.

    Args:
        model: The model, its ranges known, on the CPU.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        dynamic_shapes: As ``torch.export.export`` takes it; what is not dynamic is fixed.
        path: Where to write a package of compiled code (``.pt2``), which
            ``torch._inductor.aoti_load_package`` loads without quantpatch, and libtorch from C++; None to
            compile in memory.
        check: Whether to compare with the model, on the arguments and on random ones.
        latency: Whether to measure how long it takes beside the model in float and in bfloat16, both compiled
            alike for it. That takes twice as long as the lowering itself.
        progress: Whether to show what is being done (on a terminal only).

    Returns:
        The compiled model, with its ``report``.

    Raises:
        ExportError: There is no operator for the format of some activations, the model cannot be traced, it
            is not on the CPU, or there is no C++ compiler or no folder for its results.
        MissingExtraError: With PyTorch 2.14 or newer: torchao is not installed.

    Warns:
        QuantPatchWarning: No layer runs on integers, it is slower than float, kernels compute other integers
            than the model by more than one step, or the processor has no
            instructions for products of integers.
    """
    demand_model(model, "lower")
    model = uncompiled(model)
    args, kwargs = arguments(args, kwargs)
    demand_cpu(model, (args, kwargs))
    demand_compiler()
    multiplied_with = instructions()
    name, steps = type(model).__name__, 1 + check + 2 * latency
    bar = progress_bar(name, steps, progress=progress)
    with (
        tracing(),
        evaluating(model),
        explaining(model, (args, kwargs)),
        bar as shown,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch's own, about what it calls itself
        demand_patterns()
        found = checked_operands(model, args, kwargs, floats=True)
        shown.step("compiling")
        built = Build(model, args, kwargs, found, dynamic_shapes)
        package = None if path is None else Path(path)
        run = built.in_memory() if package is None else built.to_file(package)
        compared = measured = None
        if check:
            shown.step("checking the result")
            compared = compare(model, run, built, args, kwargs)
        if latency:
            measured = measure(model, run, args, kwargs, dynamic_shapes, shown)
    integers, skipped = layers_on_integers(found, built.recorder, built.reasons)
    report = LoweringReport(integers, skipped, multiplied_with, compared, measured, package)
    if compared is not None and compared.furthest > 1:
        warn_caller(report.why_wrong())
    if found and not integers:
        warn_caller(f"{type(model).__name__} was lowered, and no layer of it runs on integers:\n  {report}")
    elif measured is not None and measured.is_slower:
        warn_caller(report.advice())
    return LoweredModel(run, built.inputs, report)
