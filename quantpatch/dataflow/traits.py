"""What is known of torch's operators, and of what the exporter writes for them in ONNX: one table.

The audit asks it which values are still on a quantizer's grid, ``prepare`` where quantizers stand and which
values have no sign, and the passes over ONNX files what integers are moved through. In ONNX Runtime an
integer kernel wants its operands dequantized right before it and its result quantized right behind it, so the
file moves integers: what the one takes for moved, the other has to move.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Traits:
    """What is known of an operator.

    Attributes:
        keeps_grid: Whether its result holds values of its (first) argument and zeros only, or all of them
            times one number: if the argument is on a quantizer's grid, so is the result.
        moves: Whether each value of the result is one of its (first) argument's, and a file moves integers
            through what the exporter makes of it.
        keeps_sign: Whether of values that are not negative it makes none that are; of numbers among its
            arguments that has to be true as well, where it computes with them.
        never_negative: Whether nothing that it gives is negative, whatever goes in.
        clips: Whether it cuts its argument off at bounds, as integer kernels do besides.
        onnx: The types of the nodes that the exporter makes of it, where that matters here.
    """

    keeps_grid: bool = False
    moves: bool = False
    keeps_sign: bool = False
    never_negative: bool = False
    clips: bool = False
    onnx: tuple[str, ...] = ()


def _moved(*onnx: str) -> Traits:
    return Traits(keeps_grid=True, moves=True, keeps_sign=True, onnx=onnx)


_NOTHING = Traits()
# Values are picked, but the file moves no integers through it.
_PICKED = Traits(keeps_grid=True, keeps_sign=True)
# What comes besides may be any number.
_FILLED = Traits(keeps_grid=True)
_MIXED = Traits(keeps_sign=True)
_POSITIVE = Traits(never_negative=True)
_CLIPPED = Traits(clips=True, onnx=("Clip",))

# By the name in torch's namespace "aten", without the "_" of the same in place.
_TABLE: dict[str, Traits] = {
    "alias": _moved(),
    "channel_shuffle": _moved("Reshape", "Transpose"),
    "clone": _moved("Identity"),
    "contiguous": _moved(),
    "detach": _moved(),
    "expand": _moved("Expand"),
    "flatten": _moved("Flatten"),
    "max_pool2d": _moved("MaxPool"),
    "max_pool2d_with_indices": _moved("MaxPool"),
    "max_pool3d_with_indices": _moved("MaxPool"),
    "native_channel_shuffle": _moved("Reshape", "Transpose"),
    "permute": _moved("Transpose"),
    "pixel_shuffle": _moved("DepthToSpace"),
    "select": _moved("Gather"),
    "slice": _moved("Slice"),
    "split": _moved("Split"),
    "split_with_sizes": _moved("Split"),
    "squeeze": _moved("Squeeze"),
    "t": _moved("Transpose"),
    "transpose": _moved("Transpose"),
    "unbind": _moved("Split", "Squeeze"),
    "unsqueeze": _moved("Unsqueeze"),
    "upsample_nearest1d": _moved("Resize"),
    "upsample_nearest2d": _moved("Resize"),
    "upsample_nearest3d": _moved("Resize"),
    "view": _moved("Reshape"),
    "_reshape_alias": _moved("Reshape"),
    "_unsafe_view": _moved("Reshape"),
    "_upsample_nearest_exact1d": _moved("Resize"),
    "_upsample_nearest_exact2d": _moved("Resize"),
    "_upsample_nearest_exact3d": _moved("Resize"),
    **dict.fromkeys(
        (
            "adaptive_max_pool2d", "adaptive_max_pool3d", "as_strided", "diagonal", "embedding", "flip",
            "gather", "im2col", "index", "index_select", "lift_fresh", "masked_select", "narrow",
            "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat",
            "replication_pad1d", "replication_pad2d", "replication_pad3d", "roll", "take", "tril", "triu",
            "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
            "_to_copy", "_unsafe_index",
        ),
        _PICKED,
    ),
    **dict.fromkeys(("constant_pad_nd", "masked_fill", "neg"), _FILLED),
    **dict.fromkeys(
        (
            "add", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "dropout", "mean", "mul",
            "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_bilinear2d",
        ),
        _MIXED,
    ),
    "relu": Traits(keeps_grid=True, never_negative=True, clips=True, onnx=("Relu",)),
    "hardtanh": _CLIPPED,
    "clamp_min": _CLIPPED,
    **dict.fromkeys(
        ("sigmoid", "hardsigmoid", "_softmax", "abs", "exp", "square", "softplus"), _POSITIVE
    ),
}  # fmt: skip

#: Types of ONNX's nodes that integers are moved through; a Resize only if it takes the nearest.
MOVING_NODES = frozenset(kind for row in _TABLE.values() if row.moves for kind in row.onnx)
#: Those, and what an integer kernel does besides.
PASSED_NODES = MOVING_NODES.union(kind for row in _TABLE.values() if row.clips for kind in row.onnx)


def traits(operator: str) -> Traits:
    """What is known of an operator, such as ``"aten::view"``, or the same in place."""
    namespace, _, name = operator.partition("::")
    return (
        _NOTHING if namespace != "aten" else _TABLE.get(name) or _TABLE.get(name.removesuffix("_"), _NOTHING)
    )
