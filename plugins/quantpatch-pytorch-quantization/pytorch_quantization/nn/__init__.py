"""Quantized layers, under their own names and, for ``quant_nn.Linear`` and so on, under torch's."""

# ruff: noqa: F401, F403 -- each module lists its names in __all__; a second list here would be one too many.

from pytorch_quantization.nn import functional
from pytorch_quantization.nn.modules.clip import *
from pytorch_quantization.nn.modules.quant_conv import *
from pytorch_quantization.nn.modules.quant_instancenorm import *
from pytorch_quantization.nn.modules.quant_linear import *
from pytorch_quantization.nn.modules.quant_pooling import *
from pytorch_quantization.nn.modules.quant_rnn import *
from pytorch_quantization.nn.modules.tensor_quantizer import *
