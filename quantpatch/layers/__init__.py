"""Quantized layers, one family a file."""

from quantpatch.layers import conv, embedding, linear, norm, pooling, recurrent
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.conv import *
from quantpatch.layers.embedding import *
from quantpatch.layers.linear import *
from quantpatch.layers.norm import *
from quantpatch.layers.pooling import *
from quantpatch.layers.recurrent import *

__all__ = ["QuantizedLayer"]
for _family in (conv, embedding, linear, norm, pooling, recurrent):
    __all__ += _family.__all__
