"""A quantizer's range and zero point, as the state of a module: known or not, set, saved, loaded, moved.

There are no tensors until the range is known, so a model built from uncalibrated quantizers has exactly the
``state_dict`` keys of its float twin. The range stays float32 whatever the model is cast to. Beside the range
of unsigned integers the state has their zero point: without it the range would mean another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import DescriptorError, RangeError
from quantpatch.formats import Integer, NumberFormat
from quantpatch.registry import registry
from quantpatch.rounding.compiled import ZeroPointAsData
from quantpatch.sharded import beside, is_passed_over, local_part

__all__ = ["RANGE_KEY", "ZERO_POINT_KEY", "HeldRange"]

#: Name of the range in a quantizer's state.
RANGE_KEY = "_amax"
#: Name of the zero point beside it, where the integers are unsigned.
ZERO_POINT_KEY = "_zero_point"


class HeldRange(nn.Module):
    """The part of a quantizer that holds its range.

    Attributes:
        descriptor: How to quantize.
        format: The number format that the descriptor means.
        zero_point_is_found: Whether the zero point is what data was found to need, so that other data may
            need another; one that was asked for stays.
    """

    descriptor: QuantDescriptor
    format: NumberFormat
    zero_point_is_found: bool = False

    @property
    def amax(self) -> Tensor | None:
        """The range: float32, with one element for each kept index; None while unknown.

        One range for the whole tensor is 0-dim; learned, it has the shape ``(1,)``, since ``fully_shard``
        takes no parameter without an axis.
        """
        learned = self._parameters.get(RANGE_KEY)
        return self._buffers.get(RANGE_KEY) if learned is None else learned

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        """Sets the range, on the device of the value; None forgets it.

        Raises:
            RangeError: The value is negative or not finite, or its shape is not that of the range known
                so far.
        """
        known = self.amax
        if value is None:
            self._buffers.pop(RANGE_KEY, None)
            self._parameters.pop(RANGE_KEY, None)
            self._show_zero_point()
            return
        # A copy: whoever hands in a tensor may go on changing it.
        # A number is put on the CPU, whatever the default device is: on "meta" it would be lost.
        device = None if isinstance(value, Tensor) else "cpu"
        with torch.inference_mode(False):  # training may come after the mode
            amax = self.shaped(torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone())
        self._check_range(amax)
        if known is None:
            self._hold(amax)
            return
        if known.shape != amax.shape:
            raise RangeError(
                f"{self}: its range has the shape {tuple(known.shape)} and cannot become one of shape "
                f"{tuple(amax.shape)}; set amax to None first",
                value=value,
            )
        with torch.no_grad():
            known.copy_(beside(amax, known, in_pieces=True))

    def replace_range(self, amax: Tensor) -> None:
        """Sets the range, whatever shape the one known so far has; in place where it is the same.

        Raises:
            RangeError: The range is negative or not finite.
        """
        known = self.amax
        if known is not None and known.shape != self.shaped(amax).shape:
            self._check_range(amax)
            self.amax = None
        self.amax = amax

    def expect_range(self, shape: tuple[int, ...], device: torch.device, *, zero_point: bool = False) -> None:
        """Makes room for a range that something else fills in; until then it is NaN, as is what it quantizes.

        Args:
            shape: That of the range.
            device: Where it is to be.
            zero_point: Whether a zero point comes with it.
        """
        with torch.inference_mode(False):
            if self.amax is None:
                self._hold(torch.full(shape, torch.nan, device=device))
            if zero_point and ZERO_POINT_KEY not in self._buffers:
                self._buffers[ZERO_POINT_KEY] = torch.zeros((), dtype=torch.uint8, device=device)

    @property
    def own_range(self) -> Tensor | None:
        """What tensors are quantized by: ``amax``, or None if each has its own range.

        Of a learned one the magnitude, since an optimizer may carry it past zero.
        """
        return self._magnitude(None if self.descriptor.dynamic else self.amax)

    def _magnitude(self, amax: Tensor | None) -> Tensor | None:
        if amax is None or not self.descriptor.learn_amax:
            return amax
        magnitude = amax.abs()
        return magnitude.reshape(()) if magnitude.shape == (1,) else magnitude

    def shaped(self, amax: Tensor) -> Tensor:
        """A range in the shape that it is held in; see ``amax``."""
        one = amax.numel() == 1 and self.descriptor.kept_axes is None and self.format.block_size is None
        shape = (1,) if self.descriptor.learn_amax else ()
        return amax.reshape(shape) if (one or not amax.dim()) and amax.shape != shape else amax

    def _check_range(self, amax: Tensor) -> None:
        amax = local_part(amax)
        if amax.is_meta or amax.numel() == 0:
            return
        if not torch.isfinite(amax).all() or (amax < 0).any():
            raise RangeError(f"{self}: a range is finite and not negative, this one is {amax}", value=amax)

    def _hold(self, amax: Tensor) -> None:
        if self.descriptor.learn_amax:
            with torch.inference_mode(False):
                self._parameters[RANGE_KEY] = nn.Parameter(amax)
        else:
            self._buffers[RANGE_KEY] = amax
        self._show_zero_point()

    @property
    def is_symmetric(self) -> bool:
        """Whether it is of signed integers with one range found beforehand, which another could replace.

        That is one of unsigned integers, with a zero point if there are negative values.
        """
        format, descriptor = self.format, self.descriptor
        signed = type(format) is Integer and not format.unsigned
        return signed and descriptor.kept_axes is None and not descriptor.dynamic

    def use_zero_point(
        self, zero_point: int, amax: Tensor | float | None = None, *, found: bool = False
    ) -> None:
        """Makes the integers unsigned ones, one of which stands for 0.

        Args:
            zero_point: Which; 0 is right where nothing is negative.
            amax: The range, by its upper end; default: the one known so far stays.
            found: What becomes of ``zero_point_is_found``.

        Raises:
            DescriptorError: The format is not one of integers with a scale from outside, or has no such
                zero point.
            RangeError: As when ``amax`` is set.
        """
        format, descriptor = self.format, self.descriptor
        if type(format) is not Integer:
            raise DescriptorError(
                f"{self}: of the formats only integers have zero points, and {format.name} is none but a "
                f"{type(format).__name__}; use QuantDescriptor(unsigned=True)",
                field="zero_point",
                value=zero_point,
            )
        if amax is not None:
            self._check_range(torch.as_tensor(amax))
        given = descriptor.amax if descriptor.amax is None or amax is None else float(amax)
        descriptor = attrs.evolve(
            descriptor,
            format=None,
            num_bits=format.bits,
            unsigned=True,
            narrow_range=False,
            zero_point=zero_point,
            amax=given,
        )
        self._become(descriptor, found)
        if amax is not None:
            self.amax = amax

    def forget_zero_point(self) -> None:
        """Makes unsigned integers the signed ones of as many bits; the range is to be found anew."""
        self._become(attrs.evolve(self.descriptor, unsigned=False, zero_point=0), found=False)

    def _become(self, descriptor: QuantDescriptor, found: bool) -> None:
        format = registry.format(descriptor)
        self.__dict__.update(descriptor=descriptor, format=format, zero_point_is_found=found)
        self._show_zero_point()

    @property
    def _zero_point_of_format(self) -> int | None:
        """Of unsigned integers; others have none."""
        format = self.format
        return format.zero_point if isinstance(format, Integer) and format.unsigned else None

    @property
    def _format_as_compiled(self) -> NumberFormat:
        """The format for ``torch.compile``, to which a zero point is no constant but that of the state."""
        zero_point = self._buffers.get(ZERO_POINT_KEY)
        if zero_point is None or type(self.format) is not Integer or self.descriptor.learn_amax:
            return self.format
        return ZeroPointAsData(self.format.bits, zero_point)

    def _show_zero_point(self) -> None:
        """Puts the zero point into the state beside the range; computed with only where it is compiled."""
        amax, z = self.amax, self._zero_point_of_format
        if amax is None or z is None:
            self._buffers.pop(ZERO_POINT_KEY, None)
            return
        with torch.inference_mode(False):
            self._buffers[ZERO_POINT_KEY] = torch.tensor(z, dtype=torch.uint8, device=amax.device)

    def _follow(self, device: torch.device) -> Tensor:
        self._apply(lambda tensor: tensor.to(device))
        amax = self.amax
        assert amax is not None
        return amax

    # --- what nn.Module does with tensors ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldRange:
        before = None if self.amax is None else self.amax.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        amax = self.amax
        if before is None or amax is None or before.is_meta or amax.is_meta:
            return self
        # Of what a model does to its tensors only the device is meant for a range: .half() would make it
        # another range, and to_empty() none.
        exact = before.to(amax.device)
        if isinstance(amax, nn.Parameter):
            amax.data = exact
        else:
            self._buffers[RANGE_KEY] = exact
        if self._zero_point_of_format is not None:  # else there may be room for one that is to be loaded
            self._show_zero_point()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(prefix + RANGE_KEY)
        if saved is None:  # a float checkpoint: strict loading asks for nothing that it cannot have
            if self.amax is None and is_passed_over(prefix + RANGE_KEY):
                error_msgs.append(
                    f"{prefix + RANGE_KEY}: the checkpoint has it, and torch.distributed.checkpoint passed "
                    f"it over, as the model had no room for it. Call qp.expect_ranges(model, checkpoint) "
                    f"before loading"
                )
            return
        try:
            self._check_range(saved.abs() if self.descriptor.learn_amax else saved)
        except RangeError as error:
            error_msgs.append(f"{prefix + RANGE_KEY}: {error}")
            return
        problem = self._take_zero_point(state_dict.get(prefix + ZERO_POINT_KEY))
        if problem:
            error_msgs.append(f"{prefix + ZERO_POINT_KEY}: {problem}")
            return
        shaped = self.shaped(saved)
        if shaped is not saved:  # it was learned where it was saved, and is not here, or the other way round
            saved, state_dict = shaped, {**state_dict, prefix + RANGE_KEY: shaped}
        if self.amax is None:
            with torch.inference_mode(False):
                self._hold(torch.empty_like(saved, dtype=torch.float32))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A range of integers from 0 on may come from a model, or a toolkit, that keeps no zero points.
        if (key := prefix + ZERO_POINT_KEY) in missing_keys:
            missing_keys.remove(key)
        amax = self.amax
        if amax is not None and amax.dtype != torch.float32:  # loaded with assign=True
            self.amax = None
            self._hold(amax.detach().float())

    def _take_zero_point(self, saved: Tensor | None) -> str | None:
        """Makes the zero point that which a checkpoint's range was found for; says why if it cannot be."""
        own = self._zero_point_of_format
        if saved is None and own:
            return (
                f"{self} has the zero point {own}, and the checkpoint's range is of integers without one; "
                f"load it into a model whose quantizers have none"
            )
        if saved is None or saved.is_meta or int(saved) == own:
            return None
        try:
            self.use_zero_point(int(saved), found=True)
        except DescriptorError as error:
            return f"the checkpoint has {int(saved)}; {error}"
        return None
