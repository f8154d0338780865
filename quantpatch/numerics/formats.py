"""Number formats as values: which numbers a quantized tensor may hold, and how to round to them.

A format knows its grid and nothing about tensors' ranges: ``fake_quant.py`` divides by the
scale, calls :meth:`NumberFormat.round_` and multiplies back. A plugin adds a format by subclassing
:class:`NumberFormat`; everything that serves the built-in formats then serves it too.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0 for E4M3 and E5M2; OCP Microscaling Formats (MX)
Specification 1.0 for the MX formats; NVIDIA's description of NVFP4 (arXiv 2509.25149) for NVFP4.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.numerics.division import quotient

ScaleKind = Literal["float32", "e8m0", "e4m3"]


_ONNX_TYPES = ("INT4", "UINT4", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E5M2")


@attrs.frozen
class OnnxCodes:
    """How an ONNX file holds the codes of a format.

    Attributes:
        type: ONNX's name of their type: INT4, UINT4, INT8, UINT8, FLOAT8E4M3FN or FLOAT8E5M2.
        rounds: Whether QuantizeLinear to that type rounds as the format does, between the ends of the format:
            to the nearest, ties to even. Else a file can have weights in it, whose codes are constants, but
            no activations.
        opset: The first version of ONNX's operators that takes them.

    Raises:
        ArgumentError: The type is none of these.
    """

    type: str = attrs.field()
    rounds: bool = True
    opset: int = attrs.field()

    @type.validator
    def _check(self, attribute: Any, value: Any) -> None:
        if value not in _ONNX_TYPES:
            raise ArgumentError(
                f"the type of codes in an ONNX file is one of {', '.join(_ONNX_TYPES)}, got {value!r}",
                type=value,
            )

    @opset.default
    def _first(self) -> int:
        return 19 if self.type.startswith("FLOAT8") else 10


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class NumberFormat(abc.ABC):
    """A set of numbers to round to; a plugin's format subclasses this.

    Children are values: frozen, hashable, picklable (``attrs.frozen``).

    Attributes:
        name: What recipes and reports call it, such as ``"int8"``.
        bits: Storage bits of an element, scales not counted.
        max: Largest value on the grid; a range becomes a scale by ``scale = amax / max``.
        min: Smallest value on the grid; 0 makes the format unsigned.
        lower_end: Where a range begins that ends at 1: gradients pass from ``amax * lower_end`` to ``amax``.
        block_size: Number of neighbours that share a scale found from themselves, or None where
            the scale of a tensor or channel comes from outside.
        element: The format of single elements: of blocks another, else the same.
        onnx: How an ONNX file holds the codes, such as ``OnnxCodes("INT8")``; None if it cannot.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What recipes and reports call the format."""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Storage bits of an element."""

    @property
    def bits_with_scale(self) -> float:
        """Storage bits of an element, with its share of its block's scale."""
        return self.bits

    @property
    @abc.abstractmethod
    def max(self) -> float:
        """Largest value on the grid."""

    @property
    def min(self) -> float:
        """Smallest value on the grid; ``-max`` unless a child says otherwise."""
        return -self.max

    @property
    def lower_end(self) -> float:
        """The lower end of a range whose upper end is 1: -1, 0 where nothing is negative."""
        return 0.0 if self.min >= 0 else -1.0

    @property
    def block_size(self) -> int | None:
        """Elements that share a scale, or None."""
        return None

    @property
    def element(self) -> NumberFormat:
        """The format of single elements."""
        return self

    @property
    def onnx(self) -> OnnxCodes | None:
        """How an ONNX file holds the codes; None if it cannot, and the format is in no file."""
        return None

    @abc.abstractmethod
    def round_(self, y: Tensor) -> Tensor:
        """Rounds scaled values to the grid, in place.

        Must be plain tensor operations (no ``.item()``, no branch on values), so that they compile.

        Args:
            y: float32 of any shape, a value divided by its scale. May hold infinities, which saturate,
                and NaN, which stays NaN.

        Returns:
            ``y``, every element now between ``min`` and ``max`` and on the grid.
        """

    def __str__(self) -> str:
        return self.name


@attrs.frozen(cache_hash=True)
class Integer(NumberFormat):
    """Integers of 2 to 8 bits; ties round to even, as ONNX's QuantizeLinear does.

    Args:
        bits: 2 to 8.
        unsigned: From 0 to ``2**bits - 1`` instead of signed.
        narrow_range: Leave out the lowest signed value, so that the grid is symmetric (-127 .. 127).

    Raises:
        ArgumentError: ``bits`` is out of range, or ``narrow_range`` is asked of an unsigned format.
        ArgumentTypeError: A value is of another type.
    """

    bits: int = attrs.field(default=8)
    unsigned: bool = False
    narrow_range: bool = False

    def __attrs_post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= 8:
            raise (ArgumentError if _is_int(self.bits) else ArgumentTypeError)(
                f"an integer format has 2 to 8 bits, got {self.bits!r}. To keep a layer exact leave "
                "it float: None in the place of its descriptor",
                bits=self.bits,
            )
        for field in ("unsigned", "narrow_range"):
            if not isinstance(getattr(self, field), bool):
                raise ArgumentTypeError(
                    f"{field} of an integer format is True or False, got {getattr(self, field)!r}",
                    **{field: getattr(self, field)},
                )
        if self.unsigned and self.narrow_range:
            raise ArgumentError(
                "narrow_range leaves out the lowest signed value; an unsigned format has none. "
                "Write Integer(bits, unsigned=True).",
                narrow_range=True,
            )

    @property
    def name(self) -> str:
        """``int8``, ``uint4``, ``int8_narrow``."""
        return f"{'u' if self.unsigned else ''}int{self.bits}{'_narrow' if self.narrow_range else ''}"

    @property
    def max(self) -> float:
        """127 for int8, 255 for uint8."""
        return float(2**self.bits - 1 if self.unsigned else 2 ** (self.bits - 1) - 1)

    @property
    def min(self) -> float:
        """-128 for int8, -127 if narrow, 0 if unsigned."""
        return 0.0 if self.unsigned else float(self.narrow_range - 2 ** (self.bits - 1))

    @property
    def onnx(self) -> OnnxCodes | None:
        """INT8 or UINT8, of up to 4 bits INT4 or UINT4; a child that rounds otherwise has to say itself."""
        if type(self).round_ is not Integer.round_:
            return None
        return OnnxCodes(f"{'U' if self.unsigned else ''}INT{4 if self.bits <= 4 else 8}")

    def round_(self, y: Tensor) -> Tensor:
        """See :meth:`NumberFormat.round_`."""
        return y.round_().clamp_(self.min, self.max)


# (exponent bits, mantissa bits): only the formats of the OCP specifications.
_FLOATS = ((4, 3), (5, 2), (2, 1), (2, 3), (3, 2))


@attrs.frozen(cache_hash=True)
class Float(NumberFormat):
    """Floating point of 4, 6 or 8 bits, with subnormals; ties to even; overflow saturates.

    ``Float(4, 3)`` is OFP8's E4M3 ("fn": no infinities, 448 at most), ``Float(5, 2)`` its E5M2 (57344);
    ``Float(2, 1)``, ``Float(2, 3)`` and ``Float(3, 2)`` are the elements of MXFP4 and MXFP6. Zero
    keeps its sign, as hardware conversions and ``ml_dtypes`` have it.

    Args:
        exponent_bits: Bits of the exponent.
        mantissa_bits: Bits of the mantissa.

    Raises:
        ArgumentError: The pair is none of the five.
    """

    exponent_bits: int
    mantissa_bits: int

    def __attrs_post_init__(self) -> None:
        pair = (self.exponent_bits, self.mantissa_bits)
        if pair not in _FLOATS or not all(type(bits) is int for bits in pair):
            known = ", ".join(f"Float{p}" for p in _FLOATS)
            raise ArgumentError(f"there is no format Float{pair}. There are: {known}.", exponent_bits=pair)

    @property
    def name(self) -> str:
        """``fp8_e4m3``, ``fp8_e5m2``, ``fp6_e2m3``, ``fp6_e3m2``, ``fp4_e2m1``."""
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite value."""
        # E4M3 gives its top code to NaN, E5M2 a whole binade to infinity and NaN, the others have neither.
        # Written out, here and below: a float that it reads from a global Dynamo makes an input of the graph,
        # which fails with dynamic shapes where two autograd functions share it.
        if self.exponent_bits == 5:
            return 57344.0
        if self.exponent_bits == 4:
            return 448.0
        if self.exponent_bits == 3:
            return 28.0
        return 7.5 if self.mantissa_bits == 3 else 6.0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the grid is even."""
        return 2 - int(2 ** (self.exponent_bits - 1))  # torch 2.8 compiles no shift by a size that varies

    @property
    def onnx(self) -> OnnxCodes | None:
        """FLOAT8E4M3FN or FLOAT8E5M2; ONNX's operators take no others."""
        if self.bits != 8 or type(self).round_ is not Float.round_:
            return None
        return OnnxCodes("FLOAT8E4M3FN" if self.mantissa_bits == 3 else "FLOAT8E5M2")

    def round_(self, y: Tensor) -> Tensor:
        """See :meth:`NumberFormat.round_`."""
        y.clamp_(-self.max, self.max)
        # y's own power of two, which the step of the grid follows down to the subnormals.
        magic = _power_below(y)
        # Adding and subtracting 1.5 * 2**23 * step rounds to a multiple of step, ties to even, because the
        # sum has no bits left below it.
        magic.clamp_(min=2.0**self.min_exponent).mul_(12582912.0 * 2.0**-self.mantissa_bits).copysign_(y)
        # What became 0 has lost its sign in that; a float's zero has one.
        return y.add_(magic).sub_(magic).copysign_(magic)


@attrs.frozen(cache_hash=True)
class Blocked(NumberFormat):
    """Blocks of neighbours along an axis, each with a scale of its own.

    With ``scale="e8m0"`` the scale is a power of two, found by the rule of OCP MX 1.0, section 6.3:
    ``2 ** (floor(log2(amax)) - emax)``, clamped to E8M0's 2**-127 .. 2**127. With ``"e4m3"`` (NVFP4) it is
    an E4M3 number times one float32 scale of the whole tensor, ``amax(tensor) / (element.max * 448)``.
    With ``"float32"`` it is ``amax / element.max``, as is usual for groups of integer weights.

    Args:
        element: Format of the elements.
        block_size: How many neighbours share a scale.
        scale: Format of the scale.

    Raises:
        ArgumentError: The block size is not positive, the scale unknown, or the element itself blocked.
    """

    element: NumberFormat
    block_size: int = attrs.field()
    scale: ScaleKind = "float32"

    def __attrs_post_init__(self) -> None:
        is_format = isinstance(self.element, NumberFormat)
        if not is_format or self.element.block_size is not None:
            raise (ArgumentError if is_format else ArgumentTypeError)(
                f"the elements of blocks have a plain format such as Integer(4), got {self.element!r}",
                element=self.element,
            )
        if not _is_int(self.block_size) or self.block_size < 1:
            raise (ArgumentError if _is_int(self.block_size) else ArgumentTypeError)(
                f"block_size is a positive number of elements, got {self.block_size!r}",
                block_size=self.block_size,
            )
        if self.scale not in get_args(ScaleKind):
            raise ArgumentError(
                f"the scale of a block is one of {get_args(ScaleKind)}, got {self.scale!r}", scale=self.scale
            )

    @property
    def name(self) -> str:
        """``mxfp8_e4m3``, ``mxfp4``, ``mxint8``, ``nvfp4``, ``int4_g128``."""
        for name, usual in _USUAL_BLOCKS.items():
            if self == usual:
                return name
        prefix = {"float32": "", "e8m0": "mx", "e4m3": "nv"}[self.scale]
        return f"{prefix}{self.element.name}_g{self.block_size}"

    @property
    def bits(self) -> int:
        """Of an element, its scale not counted."""
        return self.element.bits

    @property
    def bits_with_scale(self) -> float:
        """The same, with a scale of 32 or 8 bits for each block."""
        return self.bits + (32 if self.scale == "float32" else 8) / self.block_size

    @property
    def max(self) -> float:
        """The element's."""
        return self.element.max

    @property
    def min(self) -> float:
        """The element's."""
        return self.element.min

    @property
    def lower_end(self) -> float:
        """The element's."""
        return self.element.lower_end

    @property
    def onnx(self) -> OnnxCodes | None:
        """The element's, if that is of integers, and the scales are of float32 or powers of two."""
        held = self.element.onnx
        if held is None or self.scale == "e4m3" or "INT" not in held.type:
            return None
        return attrs.evolve(held, opset=21)

    def round_(self, y: Tensor) -> Tensor:
        """See :meth:`NumberFormat.round_`."""
        return self.element.round_(y)

    def block_scale(self, amax: Tensor, tensor_amax: Tensor | None = None) -> Tensor:
        """The scale of blocks from their ranges.

        Args:
            amax: Largest magnitudes, one a block; float32, any shape.
            tensor_amax: 0-dim float32, the range of the whole tensor. Only ``"e4m3"`` scales use it.

        Returns:
            float32 scales of ``amax``'s shape; 0 where a block is all zero (``"e8m0"`` has no 0), NaN where
            the range is not finite.
        """
        if self.scale == "e8m0":
            # Masking the mantissa leaves 2**floor(log2(amax)); of a subnormal 0, which the clamp lifts.
            power = _power_below(amax)
            unit = 1.0
            emax = math.floor(math.log2(self.element.max))
            if isinstance(self.element, Integer):
                # MXINT8's elements are fractions with one integer bit (emax 0): code * 2**-6.
                emax, unit = 0, 2.0 ** (2 - self.element.bits)
            shared = power.mul_(2.0**-emax).clamp(2.0**-127, 2.0**127).mul_(unit)
            return shared.masked_fill(~amax.isfinite(), math.nan)
        scale = quotient(amax, self.element.max)
        if self.scale == "e4m3":
            tensor_amax = amax.max() if tensor_amax is None else tensor_amax
            tensor_scale = quotient(tensor_amax, self.element.max * 448.0)
            divisor = tensor_scale.masked_fill(tensor_scale == 0, 1.0)
            scale = _E4M3.round_(quotient(scale, divisor)) * tensor_scale
        return scale


_E4M3, _E5M2, _E2M3, _E3M2, _E2M1 = Float(4, 3), Float(5, 2), Float(2, 3), Float(3, 2), Float(2, 1)

_USUAL_BLOCKS: dict[str, Blocked] = {
    "mxfp8_e4m3": Blocked(_E4M3, 32, "e8m0"),
    "mxfp8_e5m2": Blocked(_E5M2, 32, "e8m0"),
    "mxfp6_e2m3": Blocked(_E2M3, 32, "e8m0"),
    "mxfp6_e3m2": Blocked(_E3M2, 32, "e8m0"),
    "mxfp4": Blocked(_E2M1, 32, "e8m0"),
    # Symmetric, as MX 1.0 gives +-1 63/64 for the element's largest value.
    "mxint8": Blocked(Integer(8, narrow_range=True), 32, "e8m0"),
    "nvfp4": Blocked(_E2M1, 16, "e4m3"),
    "int4_g32": Blocked(Integer(4), 32),
    "int4_g64": Blocked(Integer(4), 64),
    "int4_g128": Blocked(Integer(4), 128),
    "int8_g128": Blocked(Integer(8), 128),
}


def _builtin() -> dict[str, NumberFormat]:
    plain: list[NumberFormat] = [Integer(b) for b in range(2, 9)]
    plain += [Integer(b, unsigned=True) for b in range(2, 9)]
    plain += [Integer(b, narrow_range=True) for b in range(2, 9)]
    plain += [_E4M3, _E5M2, _E2M3, _E3M2, _E2M1]
    return {f.name: f for f in plain} | dict(_USUAL_BLOCKS)


BUILTIN_FORMATS: Mapping[str, NumberFormat] = MappingProxyType(_builtin())
"""Every format that comes with quantpatch, by name."""


def _power_below(y: Tensor) -> Tensor:
    """The largest power of two that is not above ``|y|``: 0 of subnormals, infinity of what is not finite."""
    # In this order: the compiler cannot follow what comes after the first.
    if torch.compiler.is_compiling() or not (
        torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    ):
        return y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    # torch.jit.trace cannot write down a view as another dtype, and torch.vmap of torch 2.6 not batch one. y
    # is its mantissa, from 1/2 to 1, times a power of two, so the quotient is a power of two, exactly.
    power = y / (2 * torch.frexp(y).mantissa)
    power = power.masked_fill(y.abs() < 2.0**-126, 0.0)
    return power.masked_fill(~torch.isfinite(y), float("inf"))
