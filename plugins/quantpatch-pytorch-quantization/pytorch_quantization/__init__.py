"""NVIDIA's pytorch-quantization toolkit, as far as scripts see it, on quantpatch: nothing to compile."""

from pytorch_quantization import calib, nn, optim, quant_modules, tensor_quant, utils
from pytorch_quantization.quant_modules import enable_onnx_export

__all__ = [
    "__version__",
    "calib",
    "enable_onnx_export",
    "nn",
    "optim",
    "quant_modules",
    "tensor_quant",
    "utils",
]

#: The version of the toolkit whose surface this is, for scripts that ask.
__version__ = "2.2.1"
