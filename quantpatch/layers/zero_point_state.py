"""A quantizer's zero point, as the state of a module: held beside the range, saved, loaded, moved.

Without it the range of unsigned integers would mean another one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.errors import ArgumentError, RangeError
from quantpatch.numerics.formats import Integer, NumberFormat
from quantpatch.numerics.modes import is_traced
from quantpatch.numerics.qparams import QParams, read_zero_point
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.torch_tools.sharded import local_part

#: Name of the zero point in a quantizer's state, where the integers are unsigned.
ZERO_POINT_KEY = "_zero_point"


class ZeroPointState(nn.Module):
    """The part of a quantizer that holds its zero point.

    Attributes:
        descriptor: How to quantize.
    """

    descriptor: QuantDescriptor
    _format: NumberFormat  # that the descriptor means

    @property
    def format(self) -> NumberFormat:
        """The number format: that of the descriptor; with a zero point its unsigned integers."""
        own = self._format
        if type(own) is not Integer or own.unsigned or ZERO_POINT_KEY not in self._buffers:
            return own
        return Integer(own.bits, unsigned=True)

    @property
    def zero_point(self) -> int | None:
        """Which of the unsigned integers stands for 0; None: the format is none of such.

        Raises:
            RangeError: It is on the meta device, and has no value.
        """
        held = self._buffers.get(ZERO_POINT_KEY)
        if held is None:
            return self._given_zero_point
        if held.is_meta:
            raise RangeError(f"{self}: its zero point is on the meta device, and has no value", value=held)
        return round(local_part(held).item())

    @property
    def _given_zero_point(self) -> int | None:
        """The descriptor's, of unsigned integers; others have none."""
        unsigned = isinstance(self._format, Integer) and self._format.unsigned
        return self.descriptor.zero_point if unsigned else None

    @property
    def qparams(self) -> QParams:
        """The format and, read, the zero point that integers are rounded with."""
        return QParams(self._format, None, zero_point=self._read_zero_point)

    @property
    def _read_zero_point(self) -> int | None:
        # A subclass of integers rounds as it says.
        return self.zero_point if type(self._format) is Integer else None

    @property
    def format_name(self) -> str:
        """What reports call the format, with its zero point."""
        zero_point = self._buffers.get(ZERO_POINT_KEY)
        if zero_point is None or zero_point.is_meta or not self.zero_point:
            return self.format.name
        return f"{self.format.name}, zero_point={self.zero_point}"

    @property
    def held_zero_point(self) -> Tensor | int | None:
        """The zero point for computing with tensors: nothing is read."""
        held = self._buffers.get(ZERO_POINT_KEY)
        if held is None:
            return self.descriptor.zero_point or None
        return held if type(self._format) is Integer else None

    @property
    def zero_point_is_found(self) -> bool:
        """Whether the zero point is what data was found to need, so that other data may need another.

        One that the descriptor asks for stays.
        """
        held = self._buffers.get(ZERO_POINT_KEY)
        return held is not None and not held.is_meta and self.zero_point != self._given_zero_point

    @property
    def is_symmetric(self) -> bool:
        """Whether it is of signed integers with one range found beforehand, which another could replace.

        That is one of unsigned integers, with a zero point if there are negative values.
        """
        format, descriptor = self.format, self.descriptor
        signed = type(format) is Integer and not format.unsigned
        return signed and descriptor.kept_axes is None and not descriptor.dynamic

    def _has_same_zero_point(self, other: ZeroPointState) -> bool:
        mine, others = (q._buffers.get(ZERO_POINT_KEY) for q in (self, other))
        if mine is None or others is None:
            return mine is others
        return mine.is_cpu and others.is_cpu and not is_traced() and torch.equal(mine, others)

    def _place_zero_point(self, device: torch.device | None) -> None:
        """Puts the zero point beside the range, on its device; the descriptor's if there was none.

        Args:
            device: None: there is no range.
        """
        zero_point = self._buffers.get(ZERO_POINT_KEY)
        if device is None:
            self._buffers.pop(ZERO_POINT_KEY, None)
        elif zero_point is None:
            if (given := self._given_zero_point) is not None:
                self._hold_zero_point(given, device)
        elif zero_point.device != device:
            # On the meta device it loses its value; the descriptor's is there again when the model leaves it.
            self._hold_zero_point(self._given_zero_point or 0 if zero_point.is_meta else zero_point, device)

    def _hold_zero_point(self, zero_point: Tensor | int, device: torch.device) -> None:
        # As float32, whose average with itself it is: of integers that would be cut down to the one below.
        with outside_inference_mode():
            self._buffers[ZERO_POINT_KEY] = torch.as_tensor(zero_point, dtype=torch.float32, device=device)

    def _take_zero_point(self, saved: Tensor | None) -> str | None:
        """Makes room for the zero point beside a checkpoint's range; says why if there cannot be one."""
        own = self._buffers.get(ZERO_POINT_KEY)
        if saved is None:
            if own is None or own.is_meta or not (number := self.zero_point):
                return None
            return (
                f"{self} has the zero point {number}, and the checkpoint's range is of integers without one; "
                f"load it into a model whose quantizers have none"
            )
        if saved.is_meta:
            return None
        try:
            number = read_zero_point(local_part(saved), self._format)
        except ArgumentError as error:
            return f"the checkpoint has {error.value}; {self}: {error}"
        if own is not None and not own.is_meta and number == self.zero_point:
            return None
        self._hold_zero_point(number, saved.device if own is None else own.device)
        return None


def outside_inference_mode() -> AbstractContextManager[Any]:
    """A block whose tensors can be trained, wherever it runs."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


_NOTHING = nullcontext()
