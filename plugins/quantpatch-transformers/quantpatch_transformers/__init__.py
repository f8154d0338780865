"""transformers for quantpatch: its own layers, and its ways to save, load and train.

Importing it makes quantpatch one of the quantization methods that transformers knows: from then on
``from_pretrained`` reads quantized checkpoints, with a block around it or without.
"""

from quantpatch_transformers.callback import QuantPatchCallback
from quantpatch_transformers.pretrained import QuantPatchConfig, make_savable

__all__ = ["QuantPatchCallback", "QuantPatchConfig", "make_savable"]
