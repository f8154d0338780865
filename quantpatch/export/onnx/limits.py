"""What of a model no ONNX file can say, and what a runtime does not take of it."""

from __future__ import annotations

from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.numerics.formats import Blocked, Float, Integer
from quantpatch.plugins.registry import registry
from quantpatch.plugins.runtime import Runtime


def problems(found: list[ExportedQuantizer], runtime: Runtime, opset: int) -> dict[str, str]:
    """The quantizers that a runtime does not take, and what to change.

    Args:
        found: The model's quantizers.
        runtime: The runtime.
        opset: Version of ONNX's operators.
    """
    refused = {}
    for operand in found:
        why = _common(operand, opset) or _of_integers(operand, runtime)
        why = why or runtime.call("refuses", operand)
        if why:
            refused[operand.name] = why
    return refused


def _common(operand: ExportedQuantizer, opset: int) -> str | None:
    format = operand.format
    is_weight = operand.weight is not None
    why = operand.why_not_constant()
    if why:
        return why
    element, held = operand.element, format.onnx
    if isinstance(format, Blocked):
        if not is_weight:
            return (
                f"its format {format.name} is in blocks, which are exported for weights only; "
                f"give it an integer format"
            )
        if held is None:
            return (
                f"its format {format.name} has no operator in ONNX; blocks of integers such as int4_g128 have"
            )
    plugin = registry.offers_format(operand.own_element)
    if type(operand.own_element) not in (Integer, Float):
        why = _unlike_onnx(operand)
        if why:
            whose = f"of the plugin {plugin!r}" if plugin else "of your own"
            return f"ONNX has no operator for its format {format.name}, {whose}: {why}. Use int8 or FP8"
    elif held is None:
        return f"its format {element.name} has no operator in ONNX; FP8 E4M3 and E5M2 have"
    if held is not None and opset < held.opset:
        what = "blocks need" if format.block_size else f"its codes are {held.type}, which needs"
        return f"{what} opset {held.opset}, and opset={opset} was given; leave opset out"
    if plugin is None and element is not operand.own_element:
        return (
            f"its format {format.name} is offered by no plugin, so that the file could not say what it was; "
            f"return it from the hook quantpatch_formats"
        )
    return None


def _unlike_onnx(operand: ExportedQuantizer) -> str:
    """Why a plugin's format cannot be written as what it says that ONNX has for it; empty if it can."""
    held = operand.format.onnx
    if held is None:
        return "it does not name an ONNX type for its codes (NumberFormat.onnx)"
    if operand.weight is None:
        return (
            "" if held.rounds else "it does not round as QuantizeLinear does, so that it is for weights only"
        )
    return "" if operand.fits_its_type else f"its codes are not all of {held.type}, although it says so"


def _of_integers(operand: ExportedQuantizer, runtime: Runtime) -> str | None:
    element = operand.element
    if operand.zero_point and not runtime.zero_points:
        return (
            f"its integers have the zero point {operand.zero_point}, and those of {runtime.name} are "
            f"symmetric; leave out zero_points=True and fit_zero_points, or give it QuantDescriptor() and "
            f"calibrate again"
        )
    if isinstance(element, Integer) and element.unsigned and not runtime.unsigned:
        return (
            f"{element.name} is unsigned, and {runtime.name} has signed integers only; use "
            f"QuantDescriptor(unsigned=False)"
        )
    return None
