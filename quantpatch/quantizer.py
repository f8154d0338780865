"""``TensorQuantizer``: the module that stands where a tensor is quantized, and all its state.

A quantizer has no tensors until its range is known, so a model built from uncalibrated quantizers has
exactly the ``state_dict`` keys of its float twin. The range stays float32 whatever the model is cast to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.calibrators import Calibrator
from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import CalibrationError, RangeError
from quantpatch.fake_quant import fake_quantize
from quantpatch.formats import NumberFormat
from quantpatch.registry import registry

__all__ = ["TensorQuantizer"]

_DEFAULT = QuantDescriptor()
_KEY = "_amax"


class TensorQuantizer(nn.Module):
    """Fake-quantizes the tensors that pass through it.

    Three stages can be switched separately: the quantizer as a whole (``disable``), collecting
    statistics (``enable_calib``) and quantizing (``disable_quant``). As long as a static range is not
    known, the range of each tensor at hand is used.

    Args:
        descriptor: How to quantize; default: 8-bit signed integers, one range for the tensor.

    Attributes:
        descriptor: The same.
        format: The number format that the descriptor means.
        disabled: Whether tensors pass unchanged.
        calibrating: Whether statistics are collected.
        quantizing: Whether tensors are quantized.
        calibrator: What collects the statistics, or None.
    """

    descriptor: QuantDescriptor
    format: NumberFormat
    disabled: bool
    calibrating: bool
    quantizing: bool
    calibrator: Calibrator | None

    def __init__(self, descriptor: QuantDescriptor | None = None) -> None:
        super().__init__()
        descriptor = _DEFAULT if descriptor is None else descriptor
        # Straight into the dictionary: nn.Module's own __setattr__ looks for tensors and modules first,
        # and a model has hundreds of these objects.
        self.__dict__.update(
            descriptor=descriptor,
            format=registry.format(descriptor),
            disabled=False,
            calibrating=False,
            quantizing=True,
            calibrator=None,
        )
        if descriptor.amax is not None:
            self.amax = descriptor.amax

    # --- the range -----------------------------------------------------------------------------

    @property
    def amax(self) -> Tensor | None:
        """The range: float32, 0-dim or with one element for each kept index; None while unknown."""
        learned = self._parameters.get(_KEY)
        return self._buffers.get(_KEY) if learned is None else learned

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        """Sets the range, on the device of the value; None forgets it.

        Raises:
            RangeError: The value is negative or not finite, or its shape is not that of the range known
                so far.
        """
        known = self.amax
        if value is None:
            self._buffers.pop(_KEY, None)
            self._parameters.pop(_KEY, None)
            return
        # A copy: whoever hands in a tensor may go on changing it.
        amax = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        if amax.numel() == 1 and self.descriptor.kept_axes is None and self.format.block_size is None:
            amax = amax.reshape(())
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
            known.copy_(amax)

    def _check_range(self, amax: Tensor) -> None:
        if amax.is_meta or amax.numel() == 0:
            return
        if not torch.isfinite(amax).all() or (amax < 0).any():
            raise RangeError(f"{self}: a range is finite and not negative, this one is {amax}", value=amax)

    def _hold(self, amax: Tensor) -> None:
        if self.descriptor.learn_amax:
            self._parameters[_KEY] = nn.Parameter(amax)
        else:
            self._buffers[_KEY] = amax

    # --- the stages ----------------------------------------------------------------------------

    def enable(self) -> None:
        """Undoes ``disable``."""
        self.disabled = False

    def disable(self) -> None:
        """Lets tensors pass unchanged, bit for bit; nothing is collected either."""
        self.disabled = True

    def enable_quant(self) -> None:
        """Undoes ``disable_quant``."""
        self.quantizing = True

    def disable_quant(self) -> None:
        """Stops quantizing; statistics are still collected if calibration is on."""
        self.quantizing = False

    def enable_calib(self, calibrator: Calibrator | None = None) -> None:
        """Starts collecting statistics.

        Args:
            calibrator: What collects them. Default: the one at hand if there is one, else a new one of
                the descriptor's ``calib_method``.

        Raises:
            CalibrationError: The range is dynamic, so that there is nothing to calibrate.
            UnknownNameError: No calibrator has the name of the descriptor's ``calib_method``.
        """
        if self.descriptor.dynamic:
            raise CalibrationError(f"{self} takes its range from each tensor; there is nothing to calibrate")
        if calibrator is not None:
            self.calibrator = calibrator
        elif self.calibrator is None:
            self.calibrator = self.make_calibrator()
        self.calibrating = True

    def disable_calib(self) -> None:
        """Stops collecting statistics; those collected so far stay for ``load_calib_amax``."""
        self.calibrating = False

    def make_calibrator(self, method: str | None = None, **options: Any) -> Calibrator:
        """A new calibrator for what this quantizer sees.

        Args:
            method: Its name; default: the descriptor's ``calib_method``.
            **options: Handed to it.

        Raises:
            UnknownNameError: There is no such calibrator.
        """
        kind = registry.calibrator(method or self.descriptor.calib_method)
        return kind(self.format, self.descriptor.kept_axes, **options)

    def load_calib_amax(self) -> None:
        """Sets the range that the collected statistics give; the statistics are kept.

        Raises:
            CalibrationError: No data was collected.
        """
        if self.calibrator is None:
            raise CalibrationError(f"{self} collects no statistics; call enable_calib() and run the model")
        self.amax = self.range_from(self.calibrator)

    def range_from(self, calibrator: Calibrator) -> Tensor:
        """The range that a calibrator's statistics give this quantizer; nothing is changed."""
        amax = calibrator.compute_amax()
        scale = self.descriptor.scale_amax
        return amax if scale is None else amax * scale

    # --- passing tensors -----------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether a tensor comes out changed, or leaves statistics behind."""
        return not self.disabled and (self.quantizing or self.calibrating)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor, fake-quantized; same shape, dtype, device and memory format.

        Raises:
            CalibrationError: It holds NaN or infinity and statistics are being collected.
        """
        if self.disabled:
            return x
        if self.calibrating and self.calibrator is not None:
            try:
                self.calibrator.collect(x.detach())
            except CalibrationError as error:
                error.quantizer = self
                raise
        if not self.quantizing:
            return x
        descriptor = self.descriptor
        amax = None if descriptor.dynamic else self.amax
        if amax is not None and amax.device != x.device:  # a checkpoint loaded it before any tensor came
            amax = self._follow(x.device)
        return fake_quantize(x, amax, self.format, axis=descriptor.kept_axes)

    def _follow(self, device: torch.device) -> Tensor:
        self._apply(lambda tensor: tensor.to(device))
        amax = self.amax
        assert amax is not None
        return amax

    # --- what nn.Module does with tensors ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        before = None if self.amax is None else self.amax.detach()
        super()._apply(fn, recurse)
        amax = self.amax
        if before is not None and amax is not None and amax.dtype != torch.float32:
            # .half() and the like are meant for weights; a range rounded to 11 bits is another range.
            exact = before.to(amax.device)
            if isinstance(amax, nn.Parameter):
                amax.data = exact
            else:
                self._buffers[_KEY] = exact
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
        saved = state_dict.get(prefix + _KEY)
        if saved is None:
            return  # a float checkpoint: strict loading asks for nothing that it cannot have
        try:
            self._check_range(saved)
        except RangeError as error:
            error_msgs.append(f"{prefix + _KEY}: {error}")
            return
        if self.amax is None:
            self._hold(torch.empty_like(saved, dtype=torch.float32))
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # --- telling -------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What it does with a tensor, in words."""
        if self.disabled:
            return "disabled"
        if self.calibrating:
            return "calibrating" if not self.quantizing else "calibrating and quantizing"
        if not self.quantizing:
            return "not quantizing"
        if self.descriptor.dynamic:
            return "dynamic"
        if self.amax is None:
            return "dynamic (not calibrated)"
        return "learned" if self.descriptor.learn_amax else "calibrated"

    def extra_repr(self) -> str:
        """Format, axis and state, for ``print(model)``."""
        axis = "" if self.descriptor.axis is None else f", axis={self.descriptor.axis}"
        return f"{self.format.name}{axis}, {self.state}"
