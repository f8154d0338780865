"""Whole models, quantized against float: a training step and an evaluation, beside the peers.

Each peer quantizes what it can. The share beside its name is that of the multiply-accumulates which the float
model does in layers that the peer quantizes and that were called in that mode; it computes the rest in float.
Ours quantizes all of them but the products with an LSTM's hidden state, which need ``Recipe(hidden=...)``;
"attention's products left float" is ours without those that no peer quantizes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import quantpatch as qp
from benchmarks.timing import medians

__all__ = ["rows"]


class Block(nn.Module):
    """A residual block as in ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.down = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            if stride != 1 or inside != outside
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.down(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of any size."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for outside in (64, 128, 256, 512):
        layers += [Block(width, outside, 1 if outside == 64 else 2), Block(outside, outside, 1)]
        width = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


def encoder(width: int = 256, layers: int = 6) -> nn.Module:
    """A transformer encoder."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """A two-layer LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(128, 256, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (resnet18, (4, 3, 96, 96)),
    "encoder, 6 layers of width 256, 4 x 64 tokens": (encoder, (4, 64, 256)),
    # The more tokens, the less the quantization of weights weighs.
    "encoder, 2 layers of width 512, 8 x 128 tokens": (lambda: encoder(512, 2), (8, 128, 512)),
    "two-layer LSTM": (Recurrent, (8, 64, 128)),
}


def pair(build: Callable[[], nn.Module], x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A float model and its calibrated quantized twin."""
    torch.manual_seed(0)
    model = build()
    twin = copy.deepcopy(model)
    qp.convert(twin)
    qp.calibrate(twin, [x], progress=False, strict=False)
    return model, twin


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """NVIDIA ModelOpt with its default int8 configuration."""
    import modelopt.torch.quantization as mtq

    with contextlib.redirect_stdout(io.StringIO()):
        quantized: nn.Module = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    return quantized


def quanto(model: nn.Module, x: Tensor) -> nn.Module:
    """optimum-quanto with int8 weights and activations."""
    from optimum.quanto import Calibration, qint8, quantize

    quantized = copy.deepcopy(model)
    quantize(quantized, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        quantized(x)
    return quantized


def torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    """torch.ao's eager mode, prepared for training, with the default settings for x86."""
    import torch.ao.quantization as ao

    prepared = copy.deepcopy(model).train()
    prepared.qconfig = ao.get_default_qat_qconfig("x86")
    with_observers: nn.Module = ao.prepare_qat(prepared)
    with_observers(x)
    return with_observers


def torchao(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao, prepared for training: int8 weights per channel and int8 activations per token."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    prepared = copy.deepcopy(model)
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
        step="prepare",
    )
    quantize_(prepared, config)
    return prepared


PEERS = {"modelopt": modelopt, "quanto": quanto, "torch.ao": torch_ao, "torchao": torchao}

# Where peers keep the classes of their quantized layers; ModelOpt's are known by what they hold.
QUANTIZED = (
    "optimum.quanto.nn.",
    "torch.ao.nn.qat.",
    "torch.ao.nn.quantizable.",
    "torchao.quantization.qat.linear.",
)


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a layer that a peer quantizes."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if not kind.startswith("modelopt."):
        return kind.startswith(QUANTIZED)
    return any(type(inner).__name__ == "TensorQuantizer" and inner.is_enabled for inner in module.modules())


def work(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Operations of the products in each module of a float model, by name; ``""`` is all of it."""
    # oneDNN's LSTM and fused attention are of unknown size; without them the products inside are seen.
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as flops,
    ):
        model.train()(x)
    counts = {name: sum(found.values()) for name, found in flops.get_flop_counts().items()}
    root = type(model).__name__
    return {"": counts["Global"], **{n: counts.get(f"{root}.{n}", 0) for n, _ in model.named_modules() if n}}


def share(model: nn.Module, x: Tensor, amounts: Mapping[str, int]) -> float:
    """The part of the work that the float model does in layers which are quantized here, and were called."""
    called = set()
    # Not a hook on each module: torch's C++ fast path would see it, and not be taken.
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    with torch.no_grad():
        model(x)
    handle.remove()
    names = [n for n, module in model.named_modules() if n and module in called and is_quantized(module)]
    outermost = [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]
    return sum(amounts.get(n, 0) for n in outermost) / amounts[""]


def twins(model: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The model as each peer quantizes it, and why not where one does not."""
    made: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = make(model, x)
        except Exception as error:  # a peer that fails is a result as well  # noqa: PERF203
            missing[name] = type(error).__name__
    return made, missing


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step without the optimizer, which both sides share."""
    model.train()

    def run() -> None:
        model(x).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def evaluation(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward pass in eval mode."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def attention_left_float(model: nn.Module) -> nn.Module:
    """Our model without quantizers at the two products inside attention."""
    twin = copy.deepcopy(model)
    qp.configure(twin, {f"*.{name}_quantizer": None for name in ("q", "k", "v", "probabilities")})
    return twin


def open_path(model: nn.Module) -> nn.Module:
    """The float model without torch's C++ fast path, which a module with a hook does not take."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.register_forward_pre_hook(lambda *_: None)
    return twin


def compared(
    name: str,
    float_model: nn.Module,
    ours: Mapping[str, nn.Module],
    x: Tensor,
    *,
    extra: Mapping[str, nn.Module] | None = None,
    aims: tuple[float, float] = (1.15, 1.2),
) -> list[dict[str, Any]]:
    """A row for a training step and one for an evaluation; ratios to the float model.

    Args:
        name: Of the model.
        float_model: What all is compared with.
        ours: The model quantized by us: as ``"ours"``, and in other ways by what these are called.
        x: What to run on.
        extra: Other float models to show beside.
        aims: Ratios that we want to stay below, of the two.
    """
    amounts = work(float_model, x)
    others, missing = twins(float_model, x)
    found = []
    for kind, make, aim in (("training step", step, aims[0]), ("eval", evaluation, aims[1])):
        runs = {run: make(twin, x) for run, twin in {"float": float_model, **ours, **(extra or {})}.items()}
        failed = dict(missing)
        shares = {}
        for peer, twin in others.items():
            try:
                runs[peer] = make(twin, x)
                runs[peer]()
                shares[peer] = share(twin, x, amounts)
            except Exception as error:  # noqa: PERF203
                runs.pop(peer, None)
                failed[peer] = type(error).__name__
        times = medians(runs, repeats=7)
        ratios = {
            f"{run} ({shares[run]:.0%} of MACs)" if run in shares else run: time / times["float"]
            for run, time in times.items()
            if run not in ("float", "ours")
        }
        found.append(
            {
                "name": f"{name}: {kind}",
                "ours_ms": times["ours"],
                "baseline_ms": times["float"],
                "ratio": times["ours"] / times["float"],
                "aim": aim,
                "peers": {**ratios, **failed},
            }
        )
    return found


def rows() -> list[dict[str, Any]]:
    """A row for each model and kind of run; ratios to the float model."""
    torch.set_num_threads(1)
    found = []
    for name, (build, shape) in CASES.items():
        x = torch.randn(shape)
        float_model, quantized = pair(build, x)
        ours = {"ours": quantized}
        extra = {}
        if name.startswith("encoder"):
            ours["attention's products left float"] = attention_left_float(quantized)
            extra["torch's slow path"] = open_path(float_model)
        aims = (1.1, 1.1) if name.endswith("LSTM") else (1.15, 1.2)
        found += compared(name, float_model, ours, x, extra=extra, aims=aims)
    return found


if __name__ == "__main__":
    for row in rows():
        print(
            f"{row['name']:64} {row['ours_ms']:9.2f} ms  ratio {row['ratio']:.2f} (aim {row['aim']})",
            row["peers"],
        )
