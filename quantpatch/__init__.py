"""Quantize PyTorch models without touching their code.

``with quantize_modules(): model = build()`` and every layer built inside comes out quantized; when the
block ends, PyTorch is exactly what it was.

What a model needs while it is built, calibrated and run is imported here; the rest at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantpatch.errors import QuantPatchError, QuantPatchWarning
from quantpatch.layers import QuantizedLayer
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.plugins import Entry, Example, Runtime, hookimpl
from quantpatch.plugins.registry import recipe, registry
from quantpatch.quantize import (
    calibrate,
    calibrating,
    configure,
    convert,
    explain,
    fit_zero_points,
    keep_float,
    quantize_modules,
    quantized,
    revert,
)
from quantpatch.recipes import QuantDescriptor, Recipe
from quantpatch.reports import summary

if TYPE_CHECKING:
    from quantpatch.analysis import compare, sensitivity
    from quantpatch.analysis.audit import audit
    from quantpatch.export import (
        expect_ranges,
        export_onnx,
        export_program,
        float_state_dict,
        fold_batchnorm,
        folded_weights,
        load,
        lower,
        prepare,
        save,
    )
    from quantpatch.mixed_precision import search
    from quantpatch.page import report
    from quantpatch.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Entry",
    "Example",
    "QuantDescriptor",
    "QuantPatchError",
    "QuantPatchWarning",
    "QuantizedLayer",
    "Recipe",
    "Runtime",
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
    "export_program",
    "fit_zero_points",
    "float_state_dict",
    "fold_batchnorm",
    "folded_weights",
    "hookimpl",
    "keep_float",
    "load",
    "lower",
    "prepare",
    "quantize_modules",
    "quantized",
    "recipe",
    "registry",
    "report",
    "revert",
    "save",
    "search",
    "sensitivity",
    "summary",
    "tune",
]

_AT_FIRST_USE = {
    "quantpatch.analysis": ("compare", "sensitivity"),
    "quantpatch.analysis.audit": ("audit",),
    "quantpatch.export": (
        "expect_ranges",
        "export_onnx",
        "export_program",
        "float_state_dict",
        "fold_batchnorm",
        "folded_weights",
        "load",
        "lower",
        "prepare",
        "save",
    ),
    "quantpatch.mixed_precision": ("search",),
    "quantpatch.page": ("report",),
    "quantpatch.tuning": ("tune",),
}


if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        for room, names in _AT_FIRST_USE.items():
            if name in names:
                found = globals()[name] = getattr(importlib.import_module(room), name)
                return found
            if room == f"{__name__}.{name}":
                return importlib.import_module(room)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
