"""``TensorQuantizer``: quantizes one tensor of a layer, and calibrates its range."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pytorch_quantization import _onnx
from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator, _Calibrator
from pytorch_quantization.nn.modules.clip import Clip
from pytorch_quantization.tensor_quant import (
    QUANT_DESC_8BIT_PER_TENSOR,
    Axis,
    NumBits,
    QuantDescriptor,
    bound_of,
    can_look_at,
    fake_tensor_quant,
    scaled_e4m3,
    tensor_quant,
)
from pytorch_quantization.utils.reduce_amax import kept_to_reduced, reduce_amax
from quantpatch.layers import refuse_fast_paths

__all__ = ["TensorQuantizer"]

# Buffers that are absent until they are known.
_AMAX, _PRE_QUANT_SCALE = "_amax", "_pre_quant_scale"
_LATE = (_AMAX, _PRE_QUANT_SCALE)


class TensorQuantizer(nn.Module):
    """Quantizes the tensor that it is called with.

    Attributes with a leading underscore are the toolkit's too; scripts read and set them.

    Args:
        quant_desc: How to quantize.
        disabled: Whether to let tensors through as they are.
        if_quant: Whether to quantize.
        if_clip: Whether to clip to the learned range.
        if_calib: Whether to collect statistics.
    """

    #: For quantpatch: ``audit`` and ``revert`` know it by this.
    is_quantizer: ClassVar[bool] = True
    #: For quantpatch: functions that know its own quantizers alone, and what to write in their place.
    instead: ClassVar[Mapping[str, str]] = {
        "calibrate": "quantizer.enable_calib() and load_calib_amax(), or pytorch_quantization.calib",
        "configure": "a quant_desc_input or quant_desc_weight where the layer is built",
        "export_onnx": "with quant_modules.enable_onnx_export(): torch.onnx.export(...)",
        "fit_zero_points": "nothing: ranges of the toolkit are symmetric",
        "float_state_dict": "{k: v for k, v in model.state_dict().items() if '_quantizer' not in k}",
        "folded_weights": "pytorch_quantization.optim.helper.quant_weight_inplace(model)",
        "load": "model.load_state_dict(torch.load(path))",
        "prepare": "with quant_modules.enable_onnx_export(): torch.onnx.export(...)",
        "save": "torch.save(model.state_dict(), path)",
        "sensitivity": "quantizer.disable() and enable() around an evaluation, for each layer",
    }
    #: Whether what is computed is meant for an exporter; see ``quant_modules.enable_onnx_export``.
    _enable_onnx_export: ClassVar[bool] = False
    #: The flag of the same meaning that the toolkit had before version 2.2.
    use_fb_fake_quant: ClassVar[bool] = False

    def __init__(
        self,
        quant_desc: QuantDescriptor = QUANT_DESC_8BIT_PER_TENSOR,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        refuse_fast_paths(self)
        self._name = quant_desc.name
        self._num_bits: NumBits = quant_desc.num_bits
        self._fake_quant = quant_desc.fake_quant
        self._axis: Axis = quant_desc.axis
        self._scale_amax = quant_desc.scale_amax
        self._learn_amax = quant_desc.learn_amax
        self._unsigned = quant_desc.unsigned
        self._narrow_range = quant_desc.narrow_range
        self._scale: Tensor | None = None  # of the last tensor that was turned into integers
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_clip = if_clip or quant_desc.learn_amax
        self._if_calib = if_calib
        if quant_desc.amax is not None:
            self._hold(_AMAX, torch.as_tensor(quant_desc.amax))
        if quant_desc.learn_amax:
            bound = 1.0 if quant_desc.amax is None else float(quant_desc.amax.max())
            self.clip = Clip(-bound, bound, learn_min=True, learn_max=True)
        kind = HistogramCalibrator if quant_desc.calib_method == "histogram" else MaxCalibrator
        self._calibrator: _Calibrator | None = kind(self._num_bits, self._axis, self._unsigned)

    # --- switches ------------------------------------------------------------------------------

    def disable(self) -> None:
        """Lets tensors through as they are (times ``pre_quant_scale``)."""
        self._disabled = True

    def enable(self) -> None:
        """Ends ``disable``."""
        self._disabled = False

    def disable_quant(self) -> None:
        """Does not quantize."""
        self._if_quant = False

    def enable_quant(self) -> None:
        """Quantizes."""
        self._if_quant = True

    def disable_clip(self) -> None:
        """Does not clip."""
        self._if_clip = False

    def enable_clip(self) -> None:
        """Clips to the learned range."""
        self._if_clip = True

    def disable_calib(self) -> None:
        """Does not collect statistics."""
        self._if_calib = False

    def enable_calib(self) -> None:
        """Collects statistics of every tensor.

        Raises:
            RuntimeError: There is no calibrator.
        """
        if self._calibrator is None:
            raise RuntimeError(f"{self._called_name()} has no calibrator")
        self._if_calib = True

    @property
    def is_transparent(self) -> bool:
        """Whether it does nothing with a tensor, and collects no statistics."""
        works = self._if_quant or self._if_calib or self._if_clip
        return self.pre_quant_scale is None and (self._disabled or not works)

    @property
    def disabled(self) -> bool:
        """Whether it was disabled, by quantpatch's name."""
        return self._disabled

    @property
    def quantizing(self) -> bool:
        """Whether it quantizes, by quantpatch's name."""
        return self._if_quant

    @property
    def format_name(self) -> str:
        """The format, by quantpatch's name."""
        if isinstance(self._num_bits, tuple):
            return "fp8"
        return f"{'u' * self._unsigned}int{self._num_bits}{'_narrow' * self._narrow_range}"

    @property
    def bits(self) -> int:
        """Bits an element, by quantpatch's name."""
        return 8 if isinstance(self._num_bits, tuple) else self._num_bits

    # --- properties ----------------------------------------------------------------------------

    @property
    def num_bits(self) -> NumBits:
        """Number of bits, or ``(4, 3)`` for FP8 E4M3."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: NumBits) -> None:
        self._num_bits = QuantDescriptor(num_bits=value).num_bits
        if self._calibrator is not None:
            self._calibrator._num_bits = self._num_bits

    @property
    def unsigned(self) -> bool:
        """Whether only values from zero on occur."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = value
        if self._calibrator is not None:
            self._calibrator._unsigned = value

    @property
    def narrow_range(self) -> bool:
        """Whether the lowest integer is left out."""
        return self._narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self._narrow_range = value

    @property
    def axis(self) -> Axis:
        """The axes that are kept."""
        return self._axis

    @property
    def fake_quant(self) -> bool:
        """Whether the result is rounded values rather than integers."""
        return self._fake_quant

    @property
    def maxbound(self) -> float:
        """The largest number of the format: 127 of 8 bits."""
        return bound_of(self._num_bits, self._unsigned)

    @property
    def amax(self) -> Tensor | None:
        """The range; None if it is taken from each tensor. Its shape cannot be changed by setting it."""
        return self._buffers.get(_AMAX)

    @amax.setter
    def amax(self, value: Any) -> None:
        self._set(_AMAX, value)

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """What tensors are multiplied by beforehand, if anything."""
        return self._buffers.get(_PRE_QUANT_SCALE)

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self._set(_PRE_QUANT_SCALE, value)

    @property
    def step_size(self) -> Tensor | None:
        """``amax / maxbound``; None without ``amax``."""
        return None if self.amax is None else self.amax / self.maxbound

    @property
    def scale(self) -> Tensor | None:
        """``maxbound / amax``, of the last tensor if that was turned into integers; None if not known."""
        if self._scale is not None or self.amax is None:
            return self._scale
        return torch.full_like(self.amax, self.maxbound) / self.amax

    # --- ranges --------------------------------------------------------------------------------

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Takes the range from the calibrator.

        Args:
            *args: For the calibrator's ``compute_amax``.
            strict: Whether it is an error if the calibrator has seen nothing; else the range is NaN.
            **kwargs: For the calibrator's ``compute_amax``.

        Raises:
            RuntimeError: The calibrator has seen nothing, or there is none.
        """
        if self._calibrator is None:
            raise RuntimeError(f"{self._called_name()} has no calibrator")
        amax = self._calibrator.compute_amax(*args, **kwargs)
        if amax is None:
            message = f"Calibrator returned None: that of {self._called_name()} has seen no data"
            if strict:
                raise RuntimeError(f"{message}; load_calib_amax(strict=False) makes its range NaN")
            warnings.warn(f"{message}: its range is NaN", stacklevel=2)
            amax = torch.tensor(math.nan)
        self._hold_amax(amax)

    def init_learn_amax(self) -> None:
        """Starts learning from ``amax``.

        Raises:
            RuntimeError: The descriptor does not say ``learn_amax``, or there is no single range.
        """
        if not self._learn_amax:
            raise RuntimeError(f"{self._called_name()} was made without learn_amax=True")
        if self.amax is None or self.amax.numel() != 1:
            raise RuntimeError(f"{self._called_name()} has no single range to begin with; calibrate it first")
        amax = self.amax.detach().reshape(()) * (1.0 if self._scale_amax is None else self._scale_amax)
        with torch.no_grad():
            self.clip.clip_value_min.copy_(-amax)
            self.clip.clip_value_max.copy_(amax)

    def _set(self, name: str, value: Any) -> None:
        if value is None:
            raise ValueError(f"{name[1:]} cannot be set to None; `del quantizer.{name}` forgets it")
        tensor = torch.as_tensor(value).detach()
        old = self._buffers.get(name)
        if old is not None and old.shape != tensor.shape:
            raise RuntimeError(
                f"setting {name[1:]} cannot change its shape from {tuple(old.shape)} to {tuple(tensor.shape)}"
            )
        self._hold(name, tensor if old is None else tensor.to(old.device))

    def _hold_amax(self, amax: Tensor) -> None:
        """Sets the range, of whatever shape."""
        self._hold(_AMAX, amax)

    def _hold(self, name: str, tensor: Tensor) -> None:
        """Keeps a copy in float32."""
        self.register_buffer(name, tensor.detach().to(torch.float32, copy=True))

    def _on_device(self, name: str, x: Tensor) -> Tensor | None:
        """A late buffer on the device of ``x``: its layer was moved when it was not there yet."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.device == x.device:
            return buffer
        moved = buffer.to(x.device)
        if not x.is_meta:
            self._buffers[name] = moved
        return moved

    def _get_amax(self, inputs: Tensor) -> Tensor:
        """The range for a tensor: ``amax``, or else that of the tensor itself."""
        amax = self._on_device(_AMAX, inputs)
        if amax is None:
            amax = reduce_amax(inputs, kept_to_reduced(self._axis, inputs.dim())).detach()
        elif amax.dim() == 1 and inputs.dim() > 1 and isinstance(self._axis, int):
            # A list given to the descriptor: along the axis, not along the last one.
            shape = [1] * inputs.dim()
            shape[self._axis] = -1
            amax = amax.view(shape)
        return amax if self._scale_amax is None else amax * self._scale_amax

    # --- computing -----------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        """Scales, collects statistics, clips and quantizes, as far as each is switched on.

        Raises:
            RuntimeError: It is exported to ONNX without having been calibrated, or something is switched
                on that it has not got.
        """
        exports = self._enable_onnx_export or self.use_fb_fake_quant
        if exports:
            self._check_onnx_readiness()
        pre_quant_scale = self._on_device(_PRE_QUANT_SCALE, inputs)
        if pre_quant_scale is not None:
            inputs = inputs * pre_quant_scale.to(inputs.dtype)
        if self._disabled:
            return inputs
        if self._if_calib:
            if self._calibrator is None:
                raise RuntimeError(f"{self._called_name()} has no calibrator")
            self._calibrator.collect(inputs.detach())
        if self._if_clip or (self._learn_amax and self._if_quant):
            if not self._learn_amax:
                raise RuntimeError(f"{self._called_name()} can clip only if it was made with learn_amax=True")
            inputs = self.clip(inputs)
        return self._quant_forward(inputs, exports) if self._if_quant else inputs

    def _quant_forward(self, inputs: Tensor, exports: bool) -> Tensor:
        if self._learn_amax:
            amax = torch.maximum(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        else:
            amax = self._get_amax(inputs)
        if exports:
            grid = _onnx.Grid(amax, self._num_bits, self._axis, self._unsigned, self._narrow_range)
            grid.check(self._called_name())
            return _onnx.quantize_dequantize(inputs, grid)
        if isinstance(self._num_bits, tuple):
            return scaled_e4m3(inputs, amax, *self._num_bits)
        if self._fake_quant:
            return fake_tensor_quant(inputs, amax, self._num_bits, self._unsigned, self._narrow_range)
        outputs, self._scale = tensor_quant(inputs, amax, self._num_bits, self._unsigned, self._narrow_range)
        return outputs

    def _check_onnx_readiness(self) -> None:
        active = self._if_quant and not self._disabled
        if active and self.amax is None and not self._learn_amax:
            raise RuntimeError(
                f"{self._called_name()} cannot be exported to ONNX: it has no amax. Calibrate the model, or "
                f"disable this quantizer"
            )

    def _called_name(self) -> str:
        name = _onnx.name_of(self) or self._name
        return f"TensorQuantizer {name!r}" if name else str(self)

    # --- what nn.Module does with tensors ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        before = {name: tensor for name in _LATE if (tensor := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self._buffers[name]
            # `half()` is about the model: the range of a half model has no reason to be less exact.
            if moved is not None and not moved.is_meta and not tensor.is_meta:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Makes the buffers that a checkpoint has and this quantizer has not."""
        for name in _LATE:
            saved, own = state_dict.get(prefix + name), self._buffers.get(name)
            # The toolkit keeps one range without axes where others have axes of length 1, or the reverse.
            if saved is not None and (own is None or own.numel() == saved.numel() == 1):
                device = saved.device if own is None else own.device
                self._hold(name, torch.empty_like(saved, dtype=torch.float32, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Format, range and switches."""
        if self._disabled:
            return "disabled"
        words = ["unsigned"] if self._unsigned else []
        words.append("E4M3" if isinstance(self._num_bits, tuple) else f"{self._num_bits}bit")
        words += [word for word in ("narrow_range", "learn_amax") if getattr(self, f"_{word}")]
        words.append("fake" if self._fake_quant else "real")
        words.append("per-tensor" if self._axis is None else f"axis={self._axis}")
        words.append(f"amax={self._short_amax()}")
        words += [f"*{self._scale_amax}"] if self._scale_amax is not None else []
        words += ["pre-scaled"] if self.pre_quant_scale is not None else []
        words.append(f"calibrator={type(self._calibrator).__name__ if self._calibrator else None}")
        words += [word for word in ("clip", "calib", "quant") if getattr(self, f"_if_{word}")]
        return " ".join(words)

    def _short_amax(self) -> str:
        amax = self.amax
        if amax is None:
            return "dynamic"
        if not can_look_at(amax):  # an exporter may ask for the name of one that has none
            return "meta" if amax.is_meta else "unknown"
        if amax.numel() == 1:
            return f"{amax.item():.4f}"
        return f"[{amax.min().item():.4f}, {amax.max().item():.4f}]({amax.numel()})"
