"""The quantpatch plugin for residual additions: the ``+`` inside the blocks of ResNets and their kin.

No layer owns it, so it stays float where only layers are replaced, and int8 networks go back to float at
every block. The blocks named here come out with quantizers on both of its operands; ``residual_entry`` does
the same for a block of your own. This module names its targets as text and imports none of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantpatch import Entry, Example, hookimpl
from quantpatch_residual.blocks import residual_entry

__all__ = ["quantpatch_api", "quantpatch_entries", "quantpatch_examples", "residual_entry"]

quantpatch_api = (1, 1)

_RESNET = "transformers.models.resnet.modeling_resnet"
_REGNET = "transformers.models.regnet.modeling_regnet"

# Where the class is, and its operands in the order of its own `+`.
_KNOWN = (
    ("torchvision.models.resnet", "BasicBlock", ("branch", "skip"), None),
    ("torchvision.models.resnet", "Bottleneck", ("branch", "skip"), None),
    ("torchvision.models.mobilenetv2", "InvertedResidual", ("skip", "branch"), "use_res_connect"),
    ("torchvision.models.mobilenetv3", "InvertedResidual", ("branch", "skip"), "use_res_connect"),
    ("torchvision.models.efficientnet", "MBConv", ("branch", "skip"), "use_res_connect"),
    ("torchvision.models.efficientnet", "FusedMBConv", ("branch", "skip"), "use_res_connect"),
    ("torchvision.models.regnet", "ResBottleneckBlock", ("skip", "branch"), None),
    (_RESNET, "ResNetBasicLayer", ("branch", "skip"), None),
    (_RESNET, "ResNetBottleNeckLayer", ("branch", "skip"), None),
    (_REGNET, "RegNetXLayer", ("branch", "skip"), None),
    (_REGNET, "RegNetYLayer", ("branch", "skip"), None),
    (
        "transformers.models.mobilenet_v2.modeling_mobilenet_v2",
        "MobileNetV2InvertedResidual",
        ("skip", "branch"),
        "use_residual",
    ),
    ("transformers.models.convnext.modeling_convnext", "ConvNextLayer", ("skip", "branch"), None),
)


@hookimpl
def quantpatch_entries() -> Iterable[Entry]:
    """Residual blocks of torchvision and transformers."""
    return [
        residual_entry(module, name, operands=operands, only_if=only_if, optional=True)
        for module, name, operands, only_if in _KNOWN
    ]


@hookimpl
def quantpatch_examples() -> Iterable[Example]:
    """One of each block."""
    from quantpatch_residual.examples import EXAMPLES

    return EXAMPLES
