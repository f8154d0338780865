"""A quantizer's range, as the state of a module: known or not, set, saved, loaded.

Its tensor is held by :mod:`quantpatch.layers.range_tensor`, the zero point beside it by
:mod:`quantpatch.layers.zero_point_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, RangeError, warn_caller
from quantpatch.layers.late_ranges import warn_of_loaded_range
from quantpatch.layers.range_tensor import RANGE_KEY, RangeTensor, fits
from quantpatch.layers.zero_point_state import ZERO_POINT_KEY, outside_inference_mode
from quantpatch.numerics.formats import Blocked
from quantpatch.numerics.modes import is_in_memory, is_jit_traced, is_traced
from quantpatch.numerics.qparams import check_zero_point
from quantpatch.numerics.ranges import own_range, reduce_amax
from quantpatch.torch_tools.sharded import beside, is_in_checkpoint, is_replicated, local_part


class HeldRange(RangeTensor):
    """The part of a quantizer that knows its range."""

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
        """Makes room for a range that something else fills in.

        Args:
            shape: That of the range.
            device: Where it is to be.
            zero_point: Whether a zero point comes with it.
        """
        held = self.held
        with outside_inference_mode():
            if held is None or (self.amax is None and held.shape != shape):
                self._hold(torch.full(shape, torch.nan, device=device), known=False)
            if zero_point and ZERO_POINT_KEY not in self._buffers:
                self._hold_zero_point(0, device)

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

    def _range_for(self, x: Tensor, *, is_weight: bool) -> Tensor | None:
        """The range that a tensor is quantized by, on its device; None: its own."""
        amax = self.held if self._known else self._settled(x, is_weight=is_weight)
        if amax is None:
            return None
        if not (amax.is_cpu and x.is_cpu) and amax.device != x.device:
            # A checkpoint loaded it before any tensor came. To the meta device it does not go along: it would
            # be lost.
            amax = amax.to(x.device) if x.is_meta else self._follow(x.device)
        if is_weight and (amax := self._unless_of_another_weight(x, amax)) is None:
            return None
        return self._magnitude(amax) if self.descriptor.learn_amax else amax

    def _settled(self, x: Tensor, *, is_weight: bool) -> Tensor | None:
        """The range, if it has become known; None if not.

        Where it cannot be looked at, as its values are on an accelerator or recorded operations are to find
        them, these take the range if it is known, and that of the tensor at hand if not.
        """
        held, traced = self.held, is_traced()
        if not traced and not x.is_meta:
            if held is None or held.is_meta:
                self.make_room(x.device, x if is_weight else None)
            elif is_weight and self._shape_of_weight != self._range_of(x):
                self.make_room(held.device, x)
            held = self.held
        if held is None or held.is_meta:
            return None
        if self._look(held):
            return held
        # DistributedDataParallel waits for the gradient of every parameter, if it is 0; for others that would
        # mean to decay and average what is NaN.
        takes_part = held.requires_grad and torch.is_grad_enabled() and is_replicated()
        if is_in_memory(held) and not takes_part:
            return None
        if held.dim() > 1 and not is_jit_traced() and not fits(held.shape, self._shape_of_weight or x.shape):
            return None
        if held.device != x.device:
            held = held.to(x.device) if x.is_meta else self._follow(x.device)
        format = self._format
        one = isinstance(format, Blocked) and (format.scale == "e4m3" or not x.dim())
        own = reduce_amax(x) if one else own_range(x, format, self.descriptor.kept_axes, self.held_zero_point)
        known = beside(held, own)
        return torch.where(known.isnan(), own, known)

    def _unless_of_another_weight(self, weight: Tensor, amax: Tensor) -> Tensor | None:
        """The range; None if the weight has got another shape since it was found, and it is forgotten."""
        if is_traced() or amax.shape != self._shape_of_weight:
            return amax
        wanted = self._range_of(weight)
        if amax.shape == wanted or fits(amax.shape, wanted or weight.shape):
            return amax
        self.amax = None
        self.make_room(amax.device, weight)
        warn_caller(
            f"a weight has the shape {tuple(weight.shape)} now, and its range, of shape {tuple(amax.shape)}, "
            f"was found for another one: it is dropped (qp.summary(model) shows where). Until you calibrate "
            f"again, qp.calibrate(model, batches, existing='keep'), each tensor is quantized by its own range"
        )
        return None

    def use_zero_point(self, zero_point: int, amax: Tensor | float | None = None) -> None:
        """Makes the integers unsigned ones, one of which stands for 0.

        Args:
            zero_point: Which; 0 is right where nothing is negative.
            amax: The range, by its upper end; default: the one known so far stays.

        Raises:
            ArgumentError: The format is not one of integers with a scale from outside, or has no such
                zero point.
            RangeError: The range cannot be the quantizer's, or no range has a place yet, as on the meta
                device.
        """
        try:
            check_zero_point(zero_point, self._format)
        except ArgumentError as error:
            error.args = (f"{self}: {error}",)
            raise
        if amax is not None:
            self._check_range(torch.as_tensor(amax))
        held = self.held
        if held is None:
            raise RangeError(f"{self}: it has no range yet that a zero point could stand beside", value=None)
        self._hold_zero_point(zero_point, held.device)
        if amax is not None:
            self.amax = amax

    def forget_zero_point(self) -> None:
        """Makes integers and range what the descriptor says; a range that it does not give stays."""
        held = self.held
        self._buffers.pop(ZERO_POINT_KEY, None)
        self._place_zero_point(None if held is None else held.device)
        if self.descriptor.amax is not None:
            self._forget()

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
        held = self.held
        if saved is None:  # a float checkpoint: strict loading asks for nothing that it cannot have
            if held is None and is_in_checkpoint(prefix + RANGE_KEY):
                error_msgs.append(
                    f"{prefix + RANGE_KEY}: the checkpoint has it, and torch.distributed.checkpoint passed "
                    f"it over, as the model had no room for it. Call qp.expect_ranges(model, checkpoint) "
                    f"before loading"
                )
            return
        had, unknown = self._shapes(), _is_unknown(saved)
        try:
            if not unknown:
                self._check_range(saved.abs() if self.descriptor.learn_amax else saved)
        except RangeError as error:
            error_msgs.append(f"{prefix + RANGE_KEY}: {error}")
            return
        problem = self._take_zero_point(state_dict.get(prefix + ZERO_POINT_KEY))
        if problem:
            error_msgs.append(f"{prefix + ZERO_POINT_KEY}: {problem}")
            return
        if unknown:  # the model that was saved was not calibrated
            self._forget()
            return
        shaped = self.shaped(saved)
        if shaped is not saved:  # it was learned where it was saved, and is not here, or the other way round
            saved, state_dict = shaped, {**state_dict, prefix + RANGE_KEY: shaped}
        if held is None or (held.shape != saved.shape and self.may_become(tuple(saved.shape))):
            with outside_inference_mode():
                device = saved.device if held is None or held.is_meta else held.device
                self._hold(torch.empty_like(saved, dtype=torch.float32, device=device), known=False)
        problems = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A range of integers from 0 on may come from a model, or a toolkit, that keeps no zero points.
        if (key := prefix + ZERO_POINT_KEY) in missing_keys:
            missing_keys.remove(key)
        held = self.held
        self._note_own()
        if held is not None and held.dtype != torch.float32:  # loaded with assign=True
            self._hold(held.detach().float())
        if len(error_msgs) == problems and not (held is not None and held.is_meta and not saved.is_meta):
            self.__dict__["_known"] = True
        if self._shapes() != had:
            warn_of_loaded_range(self, prefix, error_msgs)

    def _shapes(self) -> list[torch.Size | None]:
        """The shapes of its tensors: another one is another tensor."""
        held = (self.held, self._buffers.get(ZERO_POINT_KEY))
        return [None if tensor is None else tensor.shape for tensor in held]


def _is_unknown(saved: Tensor) -> bool:
    """Whether a range in a checkpoint was not known when it was saved."""
    local = local_part(saved)
    return not local.is_meta and local.numel() > 0 and bool(local.isnan().all())
