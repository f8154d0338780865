"""Models to export, what is looked at before and after, and their files in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export import ExportReport, export_onnx, prepare
from quantpatch.export.onnx.kernel_check import kernels_of
from quantpatch.export.onnx.outputs import steps_of_outputs
from quantpatch.export.onnx.sessions import session_options

__all__ = [
    "Exported",
    "assert_same",
    "built",
    "calibrated",
    "fingerprint",
    "images",
    "initializers",
    "linear",
    "refused",
    "run",
]


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
        torch.testing.assert_close(after[1][key][1], value, rtol=0, atol=0, equal_nan=True)


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


class Exported:
    """A model that was prepared, calibrated and exported, and what ONNX Runtime makes of its file."""

    def __init__(self, model: nn.Module, x: torch.Tensor, folder: Path, **options: Any) -> None:
        prepare(model, x)
        qp.calibrate(model, [x], progress=False, strict=False)
        self.path = folder / "m.onnx"
        self.report: ExportReport = export_onnx(model, x, self.path, **options)
        self.proto = onnx.load(str(self.path))
        settings = session_options(optimized=True)
        settings.optimized_model_filepath = str(folder / "optimized.onnx")
        session = ort.InferenceSession(str(self.path), settings, providers=["CPUExecutionProvider"])
        self.optimized = onnx.load(str(folder / "optimized.onnx"))
        self.kernels = Counter(n.op_type for n in self.optimized.graph.node)
        expected = model(x)
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        self.difference = (torch.from_numpy(result) - expected).abs()
        self.step = max(expected.abs().max().item() / 127, *steps_of_outputs(self.path))

    def assert_same(self) -> None:
        """Off, the same integers; on, within a step of the outputs on 99.9 % of the values."""
        compared = self.report.comparison
        assert compared is not None
        assert compared.integers > 0
        assert (compared.differing, compared.mismatching) == (0, 0)
        assert compared.relative_difference < 1e-5
        assert compared.within_step is not None
        assert compared.within_step >= 0.999
        if compared.kernels:
            assert compared.kernels_within_step is not None
            assert compared.kernels_within_step >= 0.999
        assert compared.kernels == len(kernels_of(self.optimized.graph))  # and none is left out
        assert (self.difference <= self.step * 1.001).float().mean() >= 0.999

    def weights(self) -> list[Any]:
        """Shapes of the convolutions' weights, in the order they run."""
        shapes = {tensor.name: tuple(tensor.dims) for tensor in self.proto.graph.initializer}
        made_of = {node.output[0]: node.input[0] for node in self.proto.graph.node}

        def codes(name: str) -> str:
            return name if name in shapes else codes(made_of[name])

        return [shapes[codes(n.input[1])] for n in self.proto.graph.node if n.op_type == "Conv"]


def built(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    qp.convert(model)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
