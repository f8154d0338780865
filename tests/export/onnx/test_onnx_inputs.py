"""What goes into an exported file and comes out of it: names, several inputs and outputs, dynamic shapes."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.onnx.export import export_onnx
from quantpatch.layers import Add
from quantpatch.layers.embedding import QuantEmbedding

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
from exported_files import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def alone(layer: nn.Module, *args: torch.Tensor) -> Any:
    """A quantized layer that is a model of its own."""
    model = nn.Sequential(layer).eval()
    qp.convert(model)
    qp.calibrate(model[0], [args], progress=False)
    return model[0]


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.Linear(4, 3), {"input": (5, 4)}),
        (nn.Conv2d(3, 4, 2), {"input": (2, 3, 6, 6)}),
        (
            nn.MultiheadAttention(4, 2, batch_first=True),
            {"query": (2, 3, 4), "key": (2, 5, 4), "value": (2, 5, 4)},
        ),
        (Add(), {"x": (2, 3), "y": (2, 3)}),
    ],
)  # fmt: skip
def test_a_layer_alone_is_exported_as_the_float_layer_is(
    layer: nn.Module, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    args = tuple(torch.randn(shape) for shape in shapes.values())
    batch = torch.export.Dim("batch")
    dynamic = {name: {0: batch} for name in shapes}
    torch.export.export(copy.deepcopy(layer).eval(), args, dynamic_shapes=dynamic)
    model = alone(layer, *args)
    report = export_onnx(model, args, tmp_path / "m.onnx", dynamic_shapes=dynamic)
    assert report.comparison is not None
    assert report.comparison.differing == 0
    assert [value.name for value in onnx.load(str(tmp_path / "m.onnx")).graph.input] == list(shapes)
    more = [torch.randn(7, *shape[1:]) for shape in shapes.values()]
    expected = model(*more)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(run(tmp_path / "m.onnx", *more)[0], expected)


def test_a_quantized_class_shows_the_parameters_of_its_float_class() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
            return super().forward(input) * factor

    class QuantScaled(qp.QuantizedLayer, Scaled):
        pass

    class Again(QuantScaled):
        """Of one that shows them already."""

    class QuantTable(QuantEmbedding):
        """Its forward is one that takes anything, of quantpatch's own."""

    for cls, base in ((QuantScaled, Scaled), (Again, Scaled), (QuantTable, nn.Embedding)):
        assert inspect.signature(cls.forward) == inspect.signature(base.forward)
    x = torch.randn(2, 4)
    layer = QuantScaled(4, 3)
    assert torch.equal(layer(x, factor=2.0), 2 * layer(x))


def test_a_tensor_that_is_given_twice_is_two_inputs(tmp_path: Path) -> None:
    """Attention asks whether they are one tensor; the file serves whatever it gets."""
    x = torch.randn(2, 3, 4)
    model = alone(nn.MultiheadAttention(4, 2, batch_first=True), x, x, x)
    report = export_onnx(model, (x, x), tmp_path / "m.onnx", kwargs={"value": x})
    assert report.comparison is not None
    assert report.comparison.differing == 0
    others = [torch.randn(2, 3, 4) for _ in range(3)]
    torch.testing.assert_close(run(tmp_path / "m.onnx", *others)[0], model(*others)[0])
    torch.testing.assert_close(run(tmp_path / "m.onnx", x, x, x)[0], model(x, x, x)[0])


def test_several_inputs_outputs_and_keywords(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.a = nn.Linear(6, 4)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(
            self, tokens: torch.Tensor, *, scale: torch.Tensor, extra: Any
        ) -> dict[str, torch.Tensor]:
            y = self.table(tokens) * scale + extra["shift"]
            y = self.attention(y, y, y, need_weights=False)[0]
            return {"first": self.a(y), "second": y}

    with qp.quantize_modules():
        model = Two().eval()
    tokens = torch.arange(10).reshape(2, 5)
    kwargs = {"scale": torch.tensor([2.0]), "extra": {"shift": torch.ones(6)}}
    qp.calibrate(model, lambda m: m(tokens, **kwargs), progress=False)
    report = export_onnx(model, (tokens,), tmp_path / "m.onnx", kwargs=kwargs)
    assert report.comparison is not None
    assert report.comparison.relative_difference < 1e-5
    assert report.nodes["QuantizeLinear"] == 7  # one for the three inputs of attention, which are one tensor
    expected = model(tokens, **kwargs)
    first, second = run(tmp_path / "m.onnx", tokens, *[kwargs["scale"], kwargs["extra"]["shift"]])
    assert torch.allclose(first, expected["first"], atol=1e-5)
    assert torch.allclose(second, expected["second"], atol=1e-5)


class Pair(nn.Module):
    """Takes its tensors in a dict, as data loaders give them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"sum": self.a(batch["u"]) + self.b(batch["v"]), "parts": [self.a(batch["u"])]}


def test_a_dict_that_comes_last_is_an_argument_like_others_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def batch(size: int) -> dict[str, torch.Tensor]:
        return {"u": torch.randn(size, 4), "v": torch.randn(size, 6)}

    with qp.quantize_modules():
        model = Pair().eval()
    qp.calibrate(model, [(batch(2),)], progress=False)
    shapes = ({"u": {0: "batch"}, "v": {0: "batch"}},)
    level = logging.getLogger("torch.onnx").level
    report = export_onnx(model, (batch(2),), tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert report.comparison is not None
    assert report.comparison.differing == 0
    more = batch(5)
    expected = model(more)
    for got, own in zip(
        run(tmp_path / "m.onnx", *more.values()), [expected["sum"], *expected["parts"]], strict=True
    ):
        torch.testing.assert_close(got, own)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger("torch.onnx").level == level


class Bag(nn.Module):
    """Takes offsets, which have to rise from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bag(ids, offsets))


def test_a_model_that_takes_no_random_inputs_is_checked_on_the_given_ones(tmp_path: Path) -> None:
    with qp.quantize_modules():
        model = Bag()
    batch = (torch.arange(12), torch.tensor([0, 4, 8]))
    qp.calibrate(model, [batch], progress=False)
    report = export_onnx(model, batch, tmp_path / "bag.onnx")
    comparison = report.comparison
    assert comparison is not None
    assert (comparison.mismatching, comparison.integers) == (0, 24)
    assert "offsets[0] has to be 0" in comparison.not_random
    assert "on the given inputs alone" in str(report)


@pytest.mark.parametrize("opset", [None, 21])
def test_convolutions_of_bfloat16_are_of_opset_22(opset: int | None, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 6, 6)
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    qp.calibrate(model, [x], progress=False)
    model, x = model.bfloat16(), x.bfloat16()
    if opset is None:
        assert export_onnx(model, x, tmp_path / "m.onnx").opset == 22
        return
    with pytest.raises(ExportError, match="leave opset out, or write opset=22"):
        export_onnx(model, x, tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []
