"""An example of each block. Their packages are imported when one is built, if they are there."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from quantpatch import Example

__all__ = ["EXAMPLES"]


def _of(module: str, name: str, *args: Any, config: str = "", channels: int = 8, **options: Any) -> Example:
    """A block made of these arguments, after a configuration's class if it has one."""

    def build() -> Any:
        owner = importlib.import_module(module)
        first = (getattr(owner, config)(**_SMALL.get(config, {})),) if config else ()
        return getattr(owner, name)(*first, *args, **options)

    return Example(f"{module}.{name}", build, lambda: (torch.randn(2, channels, 6, 6),))


_SMALL: dict[str, dict[str, Any]] = {
    "RegNetConfig": {"groups_width": 4},
    "ConvNextConfig": {"layer_scale_init_value": 0.5},
}
_MODELS = "transformers.models"


def _torchvision(name: str, module: str, config: str, **options: Any) -> Example:
    """A block of torchvision's that gets its settings as an object, and takes the layer for its norms."""

    def build() -> Any:
        owner = importlib.import_module(f"torchvision.models.{module}")
        settings = getattr(owner, config)(**options)
        last = (0.0,) if module == "efficientnet" else ()
        return getattr(owner, name)(settings, *last, norm_layer=torch.nn.BatchNorm2d)

    return Example(f"torchvision.models.{module}.{name}", build, lambda: (torch.randn(2, 8, 6, 6),))


_EFFICIENT = {
    "expand_ratio": 2, "kernel": 3, "stride": 1, "input_channels": 8, "out_channels": 8, "num_layers": 1
}  # fmt: skip

EXAMPLES = (
    _of("torchvision.models.resnet", "BasicBlock", 8, 8),
    _of("torchvision.models.resnet", "Bottleneck", 8, 2),
    _of("torchvision.models.mobilenetv2", "InvertedResidual", 8, 8, 1, 2),
    _torchvision(
        "InvertedResidual", "mobilenetv3", "InvertedResidualConfig",
        input_channels=8, kernel=3, expanded_channels=16, out_channels=8, use_se=True, activation="HS",
        stride=1, dilation=1, width_mult=1.0,
    ),
    _torchvision("MBConv", "efficientnet", "MBConvConfig", **_EFFICIENT),
    _torchvision("FusedMBConv", "efficientnet", "FusedMBConvConfig", **_EFFICIENT),
    _of(
        "torchvision.models.regnet", "ResBottleneckBlock", 8, 8, 1, torch.nn.BatchNorm2d, torch.nn.ReLU, 4
    ),
    _of(f"{_MODELS}.resnet.modeling_resnet", "ResNetBasicLayer", 8, 8),
    _of(f"{_MODELS}.resnet.modeling_resnet", "ResNetBottleNeckLayer", 8, 16),
    _of(f"{_MODELS}.regnet.modeling_regnet", "RegNetXLayer", 8, 8, config="RegNetConfig"),
    _of(f"{_MODELS}.regnet.modeling_regnet", "RegNetYLayer", 32, 32, config="RegNetConfig", channels=32),
    _of(
        f"{_MODELS}.mobilenet_v2.modeling_mobilenet_v2", "MobileNetV2InvertedResidual", 8, 8, 1,
        config="MobileNetV2Config",
    ),
    _of(f"{_MODELS}.convnext.modeling_convnext", "ConvNextLayer", 8, config="ConvNextConfig"),
)  # fmt: skip
