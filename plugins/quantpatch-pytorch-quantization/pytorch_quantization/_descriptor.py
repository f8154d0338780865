"""``QuantDescriptor``: how a tensor is to be quantized, as a value."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import yaml  # type: ignore[import-untyped]

__all__ = ["QuantDescriptor", "ScaledQuantDescriptor"]

_logger = logging.getLogger("pytorch_quantization")

NumBits = int | tuple[int, int]
Axis = int | tuple[int, ...] | None
Keywords = dict[str, Any]  # by another name, since a descriptor has a method called dict

CALIB_METHODS = ("max", "histogram")


def _num_bits(value: Any) -> NumBits:
    if isinstance(value, (tuple, list)):
        if tuple(value) != (4, 3):
            raise TypeError(f"num_bits must be an int, or (4, 3) for FP8 E4M3; got {value!r}")
        return (4, 3)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"num_bits must be an int, or (4, 3) for FP8 E4M3; got {value!r}")
    if value < 0:
        raise ValueError(f"num_bits must not be negative, got {value}")
    if value == 0:
        _logger.error("num_bits is 0: all that is quantized becomes 0, which is for debugging only")
    return value


def _axis(value: int | Sequence[int] | None) -> Axis:
    return value if value is None or isinstance(value, int) else tuple(value)


def _amax(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, (float, list, np.ndarray, np.floating)):
        raise TypeError(f"amax must be float, list or ndarray; got {type(value).__name__}")
    return np.array(value, dtype=np.float32)


def _amax_key(value: Any) -> Any:
    """What two ranges are compared by."""
    return None if value is None else (value.shape, value.tobytes())


def _calib_method(value: Any) -> str:
    if value not in CALIB_METHODS:
        raise ValueError(f"calib_method must be one of {CALIB_METHODS}, got {value!r}")
    return str(value)


@attrs.frozen(str=False)
class QuantDescriptor:
    """How a tensor is to be quantized.

    Attributes:
        num_bits: Number of bits of an integer, or ``(4, 3)`` for FP8 E4M3. With 0, which is logged as an
            error, all values become 0.
        name: A name for messages.
        fake_quant: Whether the result is rounded values (fake quantization), rather than integers.
        axis: The axes that are *kept*, each index with a range of its own; None for one range.
        amax: The range, if it is known beforehand; kept as float32.
        learn_amax: Whether the range is a parameter to train.
        scale_amax: A factor that every range is multiplied by.
        calib_method: ``"max"`` or ``"histogram"``.
        unsigned: Whether only values from zero on occur.
        narrow_range: Whether the lowest integer (-128 of 8 bits) is left out.

    Raises:
        TypeError: A value is of the wrong type, or ``learn_amax`` comes with an ``axis``.
        ValueError: A value is out of range.
    """

    num_bits: NumBits = attrs.field(default=8, converter=_num_bits)
    name: str | None = None
    fake_quant: bool = attrs.field(default=True, kw_only=True)
    axis: Axis = attrs.field(default=None, converter=_axis, kw_only=True)
    amax: Any = attrs.field(default=None, converter=_amax, eq=_amax_key, kw_only=True)
    learn_amax: bool = attrs.field(default=False, kw_only=True)
    scale_amax: float | None = attrs.field(default=None, kw_only=True)
    calib_method: str = attrs.field(default="max", converter=_calib_method, kw_only=True)
    unsigned: bool = attrs.field(default=False, kw_only=True)
    narrow_range: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.learn_amax and self.axis is not None:
            raise TypeError(
                f"axis is ignored and must be None when learn_amax is true: a learned range is one number "
                f"for the whole tensor; got axis={self.axis}"
            )

    def __str__(self) -> str:
        words = ["E4M3" if self.num_bits == (4, 3) else f"{self.num_bits}bit"]
        words += [word for word in ("unsigned", "narrow_range", "learn_amax") if getattr(self, word)]
        words.append("fake" if self.fake_quant else "real")
        words.append("per-tensor" if self.axis is None else f"axis={self.axis}")
        words.append(f"amax={'dynamic' if self.amax is None else self.amax.tolist()}")
        if self.scale_amax is not None:
            words.append(f"scale_amax={self.scale_amax}")
        words.append(f"calibrator={self.calib_method}")
        if self.name is not None:
            words.insert(0, self.name)
        return f"({' '.join(words)})"

    def dict(self) -> Keywords:
        """The keywords that differ from their defaults; ``QuantDescriptor(**d)`` gives an equal one."""
        default = type(self)()
        changed = {
            field.name: getattr(self, field.name)
            for field in attrs.fields(type(self))
            if field.name != "amax" and getattr(self, field.name) != getattr(default, field.name)
        }
        if self.amax is not None:
            changed["amax"] = self.amax.tolist()  # a float, or a list
        return changed

    def to_yaml(self) -> str:
        """The same as YAML."""
        return str(yaml.safe_dump(self.dict()))

    @classmethod
    def from_yaml(cls, yaml_str: str) -> QuantDescriptor:
        """Reads what ``to_yaml`` wrote."""
        return cls(**(yaml.safe_load(yaml_str) or {}))


ScaledQuantDescriptor = QuantDescriptor
