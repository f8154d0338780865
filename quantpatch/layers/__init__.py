"""Quantized layers, one family a file, and what they are made of.

===================  ============================================================================
base.py              ``QuantizedLayer``: what a layer says of itself, and what it owes its float class
quantizer.py         ``TensorQuantizer``; its state: range_state.py, range_tensor.py, zero_point_state.py
late_ranges.py       ranges that come too late for an optimizer or an average
stand_ins.py         a forward that finds quantized tensors in the place of its parameters
operations/          operands of operations inside a forward
subclass.py          users' subclasses of float layers: when one can be quantized
lowering.py          what quantizers compute while a model is exported
placed.py            quantizers at the output of any module
linear.py ...        the families: attention, conv, embedding, linear, norm, pooling, recurrent
operand_modules.py   operations that no layer of torch owns, as modules for model code
builtin.py           all of them as a plugin, with examples in builtin_examples.py
===================  ============================================================================
"""

from quantpatch.layers import attention, conv, embedding, linear, norm, operand_modules, pooling, recurrent
from quantpatch.layers.attention import *  # noqa: F403
from quantpatch.layers.base import QuantizedLayer, make_replacement
from quantpatch.layers.conv import *  # noqa: F403
from quantpatch.layers.embedding import *  # noqa: F403
from quantpatch.layers.linear import *  # noqa: F403
from quantpatch.layers.norm import *  # noqa: F403
from quantpatch.layers.operand_modules import *  # noqa: F403
from quantpatch.layers.pooling import *  # noqa: F403
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.layers.range_tensor import RANGE_KEY
from quantpatch.layers.recurrent import *  # noqa: F403
from quantpatch.layers.stand_ins import call_with
from quantpatch.layers.zero_point_state import ZERO_POINT_KEY
from quantpatch.torch_tools.fast_paths import refuse_fast_paths

__all__ = [
    "RANGE_KEY",
    "ZERO_POINT_KEY",
    "QuantizedLayer",
    "TensorQuantizer",
    "call_with",
    "make_replacement",
    "named_quantizers",
    "refuse_fast_paths",
]
for _family in (attention, conv, embedding, linear, norm, operand_modules, pooling, recurrent):
    __all__ += _family.__all__
# Known beforehand, whatever modules a user adds to a layer.
for _name in __all__:
    _layer = globals()[_name]
    if isinstance(_layer, type) and issubclass(_layer, QuantizedLayer) and _layer is not QuantizedLayer:
        _layer._settle(_layer in (QuantMultiheadAttention, QuantTransformerEncoder))  # noqa: F405
