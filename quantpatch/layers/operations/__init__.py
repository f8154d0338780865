"""Operations inside forwards: which there are, where code has them, and how their operands are quantized."""

from quantpatch.layers.operations.facts import Asked, Facts
from quantpatch.layers.operations.progress import InnerOperand, Progress, Rewritten
from quantpatch.layers.operations.rewriter import rewrite
from quantpatch.layers.operations.running import quantized
from quantpatch.layers.operations.source import plain
from quantpatch.layers.operations.table import (
    NAMES,
    PRODUCTS,
    Operations,
    Wanted,
    named,
    quantizer_name,
    spelling,
)

__all__ = [
    "NAMES",
    "PRODUCTS",
    "Asked",
    "Facts",
    "InnerOperand",
    "Operations",
    "Progress",
    "Rewritten",
    "Wanted",
    "named",
    "plain",
    "quantized",
    "quantizer_name",
    "rewrite",
    "spelling",
]
