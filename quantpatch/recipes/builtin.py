"""The recipes that come with quantpatch, and the one in force.

================  =======================================  ==========================================
name              activations                              weights
================  =======================================  ==========================================
int8              8 bit, one range a tensor                8 bit, a range for each output channel
int8-weight-only  float                                    the same
int4              4 bit, one range a tensor                4 bit, a range for each output channel
int4-weight-only  float                                    4 bit, groups of 128 input features
w4a8              as int8                                  as int4
fp8               E4M3, one range a tensor                 E4M3, a range for each output channel
mxfp8, mxfp4      OCP MX: blocks of 32, power-of-two       the same
                  scales, E4M3 or E2M1 elements
nvfp4             blocks of 16, E4M3 scales times one of   the same
                  the tensor, E2M1 elements
================  =======================================  ==========================================

Blocks run along the axis that a layer's products sum over, and take their scales from the data as it comes:
there is nothing to calibrate. The E4M3 and E2M1 names are those of ``quantpatch.numerics.formats``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantpatch.interception.block import current
from quantpatch.recipes.descriptor import CHANNEL, REDUCTION, QuantDescriptor, Recipe

_WEIGHT8 = QuantDescriptor(axis=CHANNEL, narrow_range=True)
_WEIGHT4 = QuantDescriptor(num_bits=4, axis=CHANNEL, narrow_range=True)


def _blocks(format: str) -> QuantDescriptor:
    return QuantDescriptor(format=format, axis=REDUCTION, dynamic=True)


def _in_blocks(name: str, format: str, about: str) -> Recipe:
    return Recipe(name=name, input=_blocks(format), weight=_blocks(format), about=about)


#: What a layer uses that is built outside any block.
DEFAULT_RECIPE = Recipe(name="int8", about="the default: every runtime has kernels for it")

BUILTIN_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            DEFAULT_RECIPE,
            Recipe(
                name="int8-weight-only", input=None, weight=_WEIGHT8, about="smaller files, hardly any loss"
            ),
            Recipe(
                name="int4",
                input=QuantDescriptor(num_bits=4),
                weight=_WEIGHT4,
                about="to be trained: calibrated alone it loses much",
            ),
            Recipe(
                name="int4-weight-only",
                input=None,
                weight=_blocks("int4_g128"),
                tune=["gptq"],
                about="language models: an eighth of the size; tune with gptq",
            ),
            Recipe(
                name="w4a8", weight=_WEIGHT4, about="half the size of int8, on its kernels; tune with gptq"
            ),
            Recipe(
                name="fp8",
                input=QuantDescriptor(format="fp8_e4m3"),
                weight=QuantDescriptor(format="fp8_e4m3", axis=CHANNEL),
                about="transformers with outliers; GPUs with FP8",
            ),
            _in_blocks("mxfp8", "mxfp8_e4m3", "OCP MX, 8 bits in blocks; accelerators with MX"),
            _in_blocks("mxfp4", "mxfp4", "OCP MX, 4 bits in blocks: train or tune it"),
            _in_blocks("nvfp4", "nvfp4", "4 bits in blocks of 16; NVIDIA Blackwell GPUs"),
        )
    }
)


def active_recipe() -> Recipe:
    """The recipe of the block in force here; ``int8`` outside any block."""
    block: Any = current()
    return DEFAULT_RECIPE if block is None else block.recipe
