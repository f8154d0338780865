"""Operators that only move values, or pick some: what is on a quantizer's grid before them is on it behind.

One table for those who ask where quantizers stand and for those who write the file. In ONNX Runtime an
integer kernel wants its operands dequantized right before it and its result quantized right behind it, so the
file moves integers through these operators; what the one takes for moved, the other has to move.
"""

from __future__ import annotations

__all__ = ["MOVING", "MOVING_NODES"]

# Of torch's operators, what the exporter makes; nothing of some.
_BECOMES: dict[str, tuple[str, ...]] = {
    "alias": (),
    "channel_shuffle": ("Reshape", "Transpose"),
    "clone": ("Identity",),
    "contiguous": (),
    "detach": (),
    "expand": ("Expand",),
    "flatten": ("Flatten",),
    "max_pool2d": ("MaxPool",),
    "max_pool2d_with_indices": ("MaxPool",),
    "max_pool3d_with_indices": ("MaxPool",),
    "native_channel_shuffle": ("Reshape", "Transpose"),
    "permute": ("Transpose",),
    "pixel_shuffle": ("DepthToSpace",),
    "select": ("Gather",),
    "slice": ("Slice",),
    "split": ("Split",),
    "split_with_sizes": ("Split",),
    "squeeze": ("Squeeze",),
    "t": ("Transpose",),
    "transpose": ("Transpose",),
    "unbind": ("Split", "Squeeze"),
    "unsqueeze": ("Unsqueeze",),
    "upsample_nearest1d": ("Resize",),
    "upsample_nearest2d": ("Resize",),
    "upsample_nearest3d": ("Resize",),
    "view": ("Reshape",),
    "_reshape_alias": ("Reshape",),
    "_unsafe_view": ("Reshape",),
    "_upsample_nearest_exact1d": ("Resize",),
    "_upsample_nearest_exact2d": ("Resize",),
    "_upsample_nearest_exact3d": ("Resize",),
}

#: Names of torch's.
MOVING = frozenset(f"aten::{name}" for name in _BECOMES)
#: Types of ONNX's; a Resize only if it takes the nearest.
MOVING_NODES = frozenset(kind for kinds in _BECOMES.values() for kind in kinds)
