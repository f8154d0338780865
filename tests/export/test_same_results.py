"""One checkpoint of a network that was trained with its quantizers, in each runtime that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantpatch as qp
from quantpatch.cli import demo
from quantpatch.plugins.registry import registry

pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train, _ = demo.load_data()
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = demo.build_model().eval()
    qp.prepare(model, train[0][:1], runtime="inductor")
    qp.calibrate(model, [train[0]], progress=False)
    demo.train(model, train, 2, 3e-3)
    path = tmp_path_factory.mktemp("digits") / "model.safetensors"
    qp.save(model, path)
    return path


def folded() -> torch.nn.Module:
    model = demo.build_model().eval()
    qp.fold_batchnorm(model)
    return model


@pytest.mark.sweep(3)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "inductor"])
def test_a_trained_checkpoint_finds_the_same_digits_in_every_runtime(
    runtime: str, checkpoint: Path, tmp_path: Path
) -> None:
    _, (images, labels) = demo.load_data()
    model = qp.load(folded, checkpoint).eval()
    expected = model(images).detach()
    if runtime == "inductor":
        results = qp.lower(model, images, check=False, latency=False)(images)
    else:
        for package in ("onnx", "onnxscript", runtime):
            pytest.importorskip(package)
        path = tmp_path / "m.onnx"
        report = qp.export_onnx(model, images, path, runtime=runtime, input_names=["x"], latency=False)
        assert report.comparison is not None
        assert report.comparison.mismatching == 0
        assert len(report.comparison.on_integers) == 3
        results = torch.as_tensor(registry.runtime(runtime).call("opens", path, 1)({"x": images.numpy()})[0])
    right = [int((y.argmax(1) == labels).sum()) for y in (expected, results)]
    assert right[0] > 100
    assert abs(right[0] - right[1]) <= 1
    assert (results - expected).abs().max() <= 2 * expected.abs().max() / 127
