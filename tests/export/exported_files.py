"""Models to export, what is looked at before and after, and their files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.onnx import export_onnx
from quantpatch.export.sessions import session_options

__all__ = ["assert_same", "calibrated", "fingerprint", "initializers", "linear", "refused", "run"]


def run(path: Path, *inputs: torch.Tensor, optimized: bool = False) -> list[torch.Tensor]:
    session = ort.InferenceSession(
        str(path), session_options(optimized=optimized), providers=["CPUExecutionProvider"]
    )
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def calibrated(build: Any, *inputs: torch.Tensor, recipe: Any = "int8") -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = build().eval()
    qp.calibrate(model, [inputs], progress=False)
    return model


def fingerprint(model: nn.Module) -> Any:
    return [
        (name, type(module), module.training, dict(vars(module)).keys(), "forward" in vars(module))
        for name, module in model.named_modules()
    ], {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    assert list(before[1]) == list(after[1])
    for key, (address, value) in before[1].items():
        assert after[1][key][0] == address
        assert torch.equal(after[1][key][1], value)


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(str(path)).graph.initializer}


def refused(model: nn.Module, path: Path, **options: Any) -> ExportError:
    before = fingerprint(model)
    with pytest.raises(ExportError) as caught:
        export_onnx(model, torch.randn(3, 4), path, **options)
    assert_same(before, fingerprint(model))
    assert list(path.parent.iterdir()) == []
    return caught.value


def linear(**options: Any) -> nn.Module:
    recipe = qp.Recipe(name="r", **options)
    return calibrated(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4), recipe=recipe
    )
