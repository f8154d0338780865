"""Quantized layers, one family a file."""

from quantpatch.layers import attention, conv, embedding, linear, norm, operands, pooling, recurrent
from quantpatch.layers.attention import *  # noqa: F403
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.conv import *  # noqa: F403
from quantpatch.layers.embedding import *  # noqa: F403
from quantpatch.layers.linear import *  # noqa: F403
from quantpatch.layers.norm import *  # noqa: F403
from quantpatch.layers.operands import *  # noqa: F403
from quantpatch.layers.pooling import *  # noqa: F403
from quantpatch.layers.recurrent import *  # noqa: F403

__all__ = ["QuantizedLayer"]
for _family in (attention, conv, embedding, linear, norm, operands, pooling, recurrent):
    __all__ += _family.__all__
# Known beforehand, whatever modules somebody hangs into a layer.
for _name in __all__:
    if issubclass(_layer := globals()[_name], QuantizedLayer) and _layer is not QuantizedLayer:
        _layer._settle(_layer in (QuantMultiheadAttention, QuantTransformerEncoder))  # noqa: F405
