"""``qp.search`` beside ModelOpt's ``auto_quantize``: bits a weight for one quality, on handwritten digits.

Both choose from weights of 8 and of 3 bits, and float, for each layer of models trained here. ModelOpt is
given a number of bits; the search is then asked for the quality that its model has (cross-entropy on the
images that both choose by), in fewer bits if it can. What the models do on images that neither has seen is
beside it.

Run it with ``python -m benchmarks.mixed_precision``; needs scikit-learn and ModelOpt.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp

SEEDS = (0, 1, 2)
BITS = (6.0, 5.0, 4.0)
W3A8 = qp.Recipe(name="w3a8", weight=qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True))


class Attention(nn.Module):
    """Attention whose projections are called as ModelOpt expects those that share a format to be called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        """The layer's output."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in projections)
        return self.o_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Any:
        """The block's output."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        """Logits of ten digits."""
        return self.head(self.blocks(self.embed(x.flatten(1, 2)) + self.place).mean(1))


def cnn() -> nn.Module:
    """Six convolutions and two linear layers."""
    sizes = (1, 16, 16, 32, 32, 48, 48)
    layers: list[nn.Module] = []
    for n, (inside, outside) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1, stride=1 + (n in (2, 4))), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels: to train on, to choose by, and to test on."""
    found = importlib.import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "choose", "test"), order.split((900, 450, 447)), strict=True)
    return {name: (x[part], y[part]) for name, part in parts}


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The model, trained for a few seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(20):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def quality(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Cross-entropy, negated: more is better."""
    with torch.no_grad():
        return -float(F.cross_entropy(model(data[0]), data[1]))


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def modelopt_bits(model: nn.Module) -> float:
    """Bits a weight of what ModelOpt made; 32 for what it left float."""
    total, count = 0.0, 0
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            quantizer: Any = getattr(layer, "weight_quantizer", None)
            bits = quantizer.num_bits if quantizer is not None and quantizer.is_enabled else 32
            total, count = total + bits * layer.weight.numel(), count + layer.weight.numel()
    return total / count


def by_modelopt(model: nn.Module, bits: float, data: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The model as ModelOpt quantizes it."""
    mtq = importlib.import_module("modelopt.torch.quantization")

    def config(weight_bits: int) -> dict[str, Any]:
        return {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weight_bits, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
                {"quantizer_name": "*output_quantizer", "enable": False},
            ],
            "algorithm": "max",
        }

    x, y = data["choose"]
    found, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": bits},
        quantization_formats=[config(8), config(3)],
        data_loader=list(zip(x.split(75), y.split(75), strict=True)),
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=6,
        num_score_steps=6,
        disabled_layers=[],
    )
    return found  # type: ignore[no-any-return]


def rows() -> list[dict[str, Any]]:
    """Bits a weight, ours and ModelOpt's; the peers' column has qualities, evaluations and seconds."""
    if importlib.util.find_spec("modelopt") is None:
        return []
    data = digits()
    found = []
    for name, build in (("CNN", cnn), ("transformer", Transformer)):
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = trained(build(), *data["train"])
            for bits in BITS:
                found.append(row(f"{name}, seed {seed}, {bits:g} bits", model, bits, data))
                print(found[-1], flush=True)
    return found


def row(name: str, model: nn.Module, bits: float, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One model, one number of bits that ModelOpt is given."""
    start = time.perf_counter()
    theirs = by_modelopt(copy.deepcopy(model), bits, data)
    their_seconds = time.perf_counter() - start
    their_bits, reached = modelopt_bits(theirs), quality(theirs, data["choose"])
    floor = min(reached, quality(model, data["choose"]))  # a few are better than in float, by chance
    ours = copy.deepcopy(model)
    start = time.perf_counter()
    result = qp.search(
        ours,
        lambda m: quality(m, data["choose"]),
        max_drop=lambda reference, metric: metric >= floor,
        candidates=["int8", W3A8, None],
        data=data["choose"][0].split(75),
        progress=False,
    )
    seconds = time.perf_counter() - start
    our_bits = 32 * result.cost / result.float_cost
    tested = [accuracy(model, data["test"]) for model in (ours, theirs)]
    # Of what was evaluated the best that costs no more than theirs.
    equal = max((p for p in result.points if p.cost <= their_bits / 32 * result.float_cost * 1.0001),
                key=lambda p: p.metric)  # fmt: skip
    return {
        "name": f"{name}: bits a weight",
        "ours_ms": our_bits,
        "baseline_ms": their_bits,
        "ratio": our_bits / their_bits,
        "aim": 1.0,
        "peers": {
            "quality at equal bits": f"{equal.metric:.4f} (ModelOpt {reached:.4f})",
            "test accuracy": f"{tested[0]:.3f} (ModelOpt {tested[1]:.3f})",
            "evaluations": result.evaluations,
            "seconds": f"{seconds:.1f} (ModelOpt {their_seconds:.1f})",
        },
    }


if __name__ == "__main__":
    rows()
