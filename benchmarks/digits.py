"""One QAT checkpoint in every runtime that is installed: accuracy on handwritten digits.

The demo's network is prepared, calibrated and fine-tuned once, and saved. Each runtime gets what that file
holds: PyTorch, its compiler (``lower``), ONNX Runtime, and OpenVINO. Their accuracy may differ by one image.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.cli import demo
from quantpatch.errors import MissingExtraError
from quantpatch.plugins.registry import registry

__all__ = ["outputs"]

# What stands in most places of integer kernels: PyTorch's compiler and OpenVINO want the same.
_PREPARED_FOR = "inductor"


def trained(images: Tensor, data: demo.Data, *, epochs: int = 20, tuning_epochs: int = 4) -> nn.Module:
    """The demo's network, fine-tuned with its quantizers."""
    torch.manual_seed(0)
    model = demo.build_model()
    demo.train(model, data, epochs, 3e-3)
    with qp.quantize_modules():
        quantized = demo.build_model()
    quantized.load_state_dict(model.state_dict())
    quantized.eval()
    qp.prepare(quantized, images[:1], runtime=_PREPARED_FOR)
    qp.calibrate(quantized, [images], progress=False)
    demo.train(quantized, data, tuning_epochs, 1e-3)
    return quantized


def loaded(path: Path, images: Tensor) -> nn.Module:
    """What a checkpoint holds, in a float model that is prepared alike."""

    def build() -> nn.Module:
        model = demo.build_model().eval()
        qp.fold_batchnorm(model)
        return model

    return qp.load(build, path).eval()


def outputs(model: nn.Module, images: Tensor, folder: Path) -> dict[str, Tensor]:
    """What each runtime that is installed gives for images."""
    x = images.detach()
    with torch.no_grad():
        found = {"PyTorch": model(x)}
        found["inductor"] = qp.lower(model, x, latency=False, progress=False)(x)
    for name in ("onnxruntime", "openvino"):
        path = folder / f"{name}.onnx"
        try:
            qp.export_onnx(
                model, x, path, runtime=name, input_names=["images"], latency=False, progress=False
            )
            run = registry.runtime(name).call("opens", path, 1)
        except MissingExtraError:
            continue
        found[name] = torch.as_tensor(run({"images": x.numpy()})[0])
    return found


def main() -> None:
    train, test = demo.load_data()
    table = Table("runs", "right of 360", "values within a step", title="One QAT checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        qp.save(trained(train[0], train), path)
        found = outputs(loaded(path, train[0]), test[0], Path(folder))
    expected = found["PyTorch"]
    step = expected.abs().max() / 127
    for name, values in found.items():
        within = ((values - expected).abs() <= step).float().mean()
        table.add_row(name, str(int((values.argmax(1) == test[1]).sum())), f"{within:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
