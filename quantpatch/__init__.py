"""Quantize PyTorch models without touching their code.

``with quantize_modules(): model = build()`` and every layer built inside comes out quantized; when the
block ends, PyTorch is exactly what it was.
"""

from quantpatch.analysis import compare, sensitivity
from quantpatch.audit import audit
from quantpatch.calibration import calibrate, calibrating
from quantpatch.configure import configure
from quantpatch.descriptor import QuantDescriptor, Recipe
from quantpatch.entries import Entry
from quantpatch.errors import QuantPatchError, QuantPatchWarning
from quantpatch.example import Example
from quantpatch.explain import explain
from quantpatch.export import (
    expect_ranges,
    export_onnx,
    float_state_dict,
    fold_batchnorm,
    fold_weights,
    load,
    prepare,
    save,
)
from quantpatch.hookspecs import hookimpl
from quantpatch.layers import QuantizedLayer
from quantpatch.models import convert, quantized, revert
from quantpatch.quantizer import TensorQuantizer
from quantpatch.registry import registry
from quantpatch.report import summary
from quantpatch.scope import keep_float, quantize_modules
from quantpatch.zero_points import fit_zero_points

__version__ = "0.1.0"

__all__ = [
    "Entry",
    "Example",
    "QuantDescriptor",
    "QuantPatchError",
    "QuantPatchWarning",
    "QuantizedLayer",
    "Recipe",
    "TensorQuantizer",
    "audit",
    "calibrate",
    "calibrating",
    "compare",
    "configure",
    "convert",
    "expect_ranges",
    "explain",
    "export_onnx",
    "fit_zero_points",
    "float_state_dict",
    "fold_batchnorm",
    "fold_weights",
    "hookimpl",
    "keep_float",
    "load",
    "prepare",
    "quantize_modules",
    "quantized",
    "registry",
    "revert",
    "save",
    "sensitivity",
    "summary",
]
