"""The checks that trace a layer: compilation, export and ONNX. They take seconds each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantpatch.errors import ExportError, MissingExtraError
from quantpatch.export import export_onnx
from quantpatch.testing.checks import check, demand_close, or_float_neither
from quantpatch.testing.subject import NotApplicable, Subject

_TRACEABLE = (
    "Keep forward free of what tracing cannot follow: no branch on a tensor's value, no item(), no numpy, no "
    "locks, no objects whose class lies"
)
_TOLERANCE = 0.02  # a rounding may go the other way, by one step of a quantizer


@check(_TRACEABLE, traces=True)
def compiled(subject: Subject) -> None:
    """It compiles without a graph break, in training and in eval mode, and computes the same."""
    _, quantized = subject.calibrated()

    def compile_(layer: nn.Module) -> Any:
        torch._dynamo.reset()
        return subject.run(torch.compile(layer, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]

    try:
        for training in (True, False):
            quantized.train(training)
            expected = subject.run(quantized)
            try:
                ours = compile_(quantized)
            except Exception as error:
                or_float_neither(subject, error, lambda layer, t=training: compile_(layer.train(t)))  # type: ignore[misc]
            where = "in training mode" if training else "in eval mode"
            demand_close(ours, expected, f"compiled, its output {where} is another", _TOLERANCE)
    finally:
        torch._dynamo.reset()


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@check(_TRACEABLE, traces=True)
def exported(subject: Subject) -> None:
    """``torch.export`` takes it, strict and not, and the program computes the same."""
    _, quantized = subject.calibrated()
    keywords = dict(subject.example.keywords)

    def export(layer: nn.Module, strict: bool) -> Any:
        # If strict, torch 2.8 takes a module that has hooks only inside another one.
        model = _Holder(layer) if strict else layer
        program = torch.export.export(model.eval(), subject.data(), keywords, strict=strict)
        torch.manual_seed(7)
        return program.module()(*subject.data(), **keywords)

    for strict in (False, True):
        try:
            ours = export(quantized, strict)
        except Exception as error:
            or_float_neither(subject, error, lambda layer, s=strict: export(layer, s))  # type: ignore[misc]
        demand_close(
            ours, subject.run(quantized), f"exported (strict={strict}), it computes other values", _TOLERANCE
        )


@check(_TRACEABLE + ". quantpatch.export_onnx names quantizers that ONNX has no operator for", traces=True)
def onnx(subject: Subject) -> None:
    """``quantpatch.export_onnx`` writes it, and ONNX Runtime computes the same."""
    _, quantized = subject.calibrated()
    keywords = dict(subject.example.keywords)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(folder) / "layer.onnx"
            export_onnx(quantized.eval(), subject.data(), path, kwargs=keywords, latency=False)
        except MissingExtraError as error:
            raise NotApplicable(str(error)) from error
        except ExportError as error:

            def attempt(layer: nn.Module) -> None:
                torch.onnx.export(layer.eval(), subject.data(), kwargs=keywords, dynamo=True, verbose=False)

            or_float_neither(subject, error, attempt)
