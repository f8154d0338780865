"""The tensor of a quantizer's range, as the state of a module: its room, its values, its device.

A range has its tensor from construction on, so that whatever lists a model's tensors then (an optimizer, an
average of weights, ``DistributedDataParallel``, a loader that asks what there is) has it too: a parameter if
it is learned, else a buffer. It is NaN until it is known, and known as soon as it is not, whatever filled it
in. The shape of a weight's range follows from the weight; that of an activation with a range for each index
along an axis shows only with data, and so does its tensor.

On the meta device nothing of an unknown range is in the ``state_dict``: libraries that build models there
fill what a checkpoint lacks with anything. It comes with the layer's first tensor elsewhere.

A range stays float32 whatever the model is cast to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.errors import RangeError
from quantpatch.layers.zero_point_state import ZERO_POINT_KEY, ZeroPointState, outside_inference_mode
from quantpatch.numerics.modes import is_readable
from quantpatch.numerics.ranges import range_shape
from quantpatch.torch_tools.sharded import beside, is_in_checkpoint, is_sharded, local_part

#: Name of the range in a quantizer's state.
RANGE_KEY = "_amax"


class RangeTensor(ZeroPointState):
    """The part of a quantizer that holds the tensor of its range."""

    #: Whether the range was seen to be known. If not it may be, as others can fill it in: see ``_look``.
    _known: bool = False
    #: The shape of a weight's range, as far as the weight shows.
    _shape_of_weight: tuple[int, ...] | None = None
    _seen: int | None = None  # the version in which the tensor was looked at, and held NaN
    _own: Tensor | None = None  # the tensor, and not what stands in for it, as in functional_call

    @property
    def held(self) -> Tensor | None:
        """The tensor of the range, which is NaN while that is unknown; None while its shape is, too."""
        learned = self._parameters.get(RANGE_KEY)
        return self._buffers.get(RANGE_KEY) if learned is None else learned

    @property
    def amax(self) -> Tensor | None:
        """The range: float32, with one element for each kept index; None while unknown.

        One range for the whole tensor is 0-dim; learned, it has the shape ``(1,)``, since ``fully_shard``
        takes no parameter without an axis.
        """
        held = self.held
        return held if held is None or self._known or self._look(held, again=True) else None

    @amax.setter
    def amax(self, value: Tensor | float | None) -> None:
        """Sets the range, on the device of the value; None forgets it.

        Raises:
            RangeError: The value is negative or not finite, or its shape is not that of the range known
                so far.
        """
        if value is None:
            self._forget()
            return
        # A copy: the caller may go on changing the tensor.
        # A number is put on the CPU, whatever the default device is: on "meta" it would be lost.
        device = None if isinstance(value, Tensor) else "cpu"
        with outside_inference_mode():  # training may come after the mode
            amax = self.shaped(torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone())
        self._check_range(amax)
        held = self.held
        if held is None or held.is_meta or held.shape != amax.shape:
            if held is not None and self.amax is not None and held.shape != amax.shape:
                raise RangeError(
                    f"{self}: its range has the shape {tuple(held.shape)} and cannot become one of shape "
                    f"{tuple(amax.shape)}; set amax to None first",
                    value=value,
                )
            self._hold(amax)
            return
        self._write(beside(amax, held, in_pieces=True))
        self.__dict__["_known"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        # A parameter, such as another quantizer's learned range, is a value like any other tensor, where
        # nn.Module would register it under the property's name.
        if isinstance(value, nn.Parameter) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def shaped(self, amax: Tensor) -> Tensor:
        """A range in the shape that it is held in; see ``amax``."""
        one = amax.numel() == 1 and self.descriptor.kept_axes is None and self._format.block_size is None
        shape = (1,) if self.descriptor.learn_amax else ()
        return amax.reshape(shape) if (one or not amax.dim()) and amax.shape != shape else amax

    def _check_range(self, amax: Tensor) -> None:
        amax = local_part(amax)
        if amax.is_meta or amax.numel() == 0:
            return
        if not torch.isfinite(amax).all() or (amax < 0).any():
            raise RangeError(f"{self}: a range is finite and not negative, this one is {amax}", value=amax)

    def _hold(self, amax: Tensor, *, known: bool = True) -> None:
        if self.descriptor.learn_amax:
            old = self._parameters.get(RANGE_KEY)
            with outside_inference_mode():
                trains = old is None or old.requires_grad
                amax = self._parameters[RANGE_KEY] = nn.Parameter(amax, requires_grad=trains)
        else:
            self._buffers[RANGE_KEY] = amax
        self.__dict__.update(_known=known, _seen=None, _own=amax)
        self._place_zero_point(amax.device)

    def _note_own(self) -> None:
        # So that both are one in a copy, too.
        self.__dict__["_own"] = self.held

    def make_room(self, device: torch.device | None = None, weight: Tensor | None = None) -> None:
        """Makes the tensor of the range, if its shape is known and it is not there; see the module.

        Args:
            device: Where the layer has its tensors, as one of them says it; default: that of the weight, else
                torch's default.
            weight: What is quantized, if it is a weight.
        """
        descriptor = self.descriptor
        if descriptor.dynamic:
            return
        shape: tuple[int, ...] | None
        if weight is None:
            device = _default_device() if device is None else device
            shape = self._room()
        else:
            device = weight.device if device is None else device
            self.__dict__["_shape_of_weight"] = shape = self._range_of(weight)
            if shape is None or descriptor.amax is not None:
                shape = self._room()
        if shape is None:
            return
        held = self.held
        if device == _META:
            if held is None and descriptor.learn_amax:  # to be sharded with the other parameters
                self._hold(torch.empty(shape, dtype=torch.float32, device=device), known=False)
        elif held is None:
            self._fill_room(shape, device)
        elif self._known or self._look(held):
            if descriptor.amax is not None and held.device != device:  # of the descriptor's
                self._follow(device)
        elif held.shape != shape or held.device != device:
            self._fill_room(shape, device)

    def leave_meta(self) -> None:
        """Gives up a tensor on the meta device, for who makes room when the model has left it.

        Others would take it for one that a checkpoint is to fill.
        """
        held = self.held
        if held is not None and held.is_meta:
            self._parameters.pop(RANGE_KEY, None)
            self._buffers.pop(RANGE_KEY, None)
            self._place_zero_point(None)

    def _fill_room(self, shape: tuple[int, ...], device: torch.device) -> None:
        given = self.descriptor.amax
        fill = torch.nan if given is None else given
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                amax = torch.full(shape, fill, dtype=torch.float32, device=device)
        else:  # not in a block that does nothing: each layer that is built comes by
            amax = torch.full(shape, fill, dtype=torch.float32, device=device)
        self._hold(amax, known=given is not None)

    def _room(self) -> tuple[int, ...] | None:
        """The shape of the range as far as it is known before there is one."""
        descriptor = self.descriptor
        if descriptor.kept_axes is None or self._format.block_size is not None or descriptor.amax is not None:
            return (1,) if descriptor.learn_amax else ()
        return self._shape_of_weight

    def _range_of(self, weight: Tensor) -> tuple[int, ...] | None:
        kept = self.descriptor.kept_axes
        one = kept is None or self._format.block_size is not None
        return None if one else _range_shape(weight.shape, kept)

    def _look(self, held: Tensor, *, again: bool = False) -> bool:
        """Whether the range, which was not known, has been filled in: by an average, a broadcast, a file.

        Args:
            held: Its tensor.
            again: Whether to look at values on an accelerator, for which the host has to wait, also if the
                tensor has been looked at before and its version is the same.
        """
        local = local_part(held)
        if local.is_meta or not local.numel() or not is_readable(local):
            return False
        version = None if local.is_inference() else local._version
        if not (again or local.is_cpu or version != self._seen):
            return False
        # What is negative is not a range, but comes from code that initialises all parameters alike.
        known = local.item() >= 0 if local.numel() == 1 else bool((local >= 0).all())
        if known and held is self._own:
            self.__dict__["_known"] = True
        elif not known and not local.is_cpu:
            self.__dict__["_seen"] = version
        return known

    def _forget(self) -> None:
        """Makes the range unknown, or the one that the descriptor gives; its tensor stays the same."""
        held = self.held
        if held is None:
            return
        given = self.descriptor.amax
        if not held.is_meta:
            self._write(torch.nan if given is None else given)
        self.__dict__["_known"] = given is not None and not held.is_meta
        self._place_zero_point(held.device)

    def _write(self, value: Tensor | float) -> None:
        held = self.held
        assert held is not None
        with outside_inference_mode(), torch.no_grad():
            if held.is_inference():
                held = self._buffers[RANGE_KEY] = held.clone()
                self._note_own()
            if isinstance(value, Tensor):
                held.copy_(value)
            else:
                held.fill_(value)

    def take_tensor_of(self, other: RangeTensor) -> None:
        """Holds the tensor of another one, whose place it takes: what lists that one's has this one's then.

        Nothing is done where this one would hold another kind or shape. The range is unknown afterwards.
        """
        held, own = other.held, self.held
        tensors = self._parameters if self.descriptor.learn_amax else self._buffers
        if (
            held is None
            or self.descriptor.dynamic
            or isinstance(held, nn.Parameter) != (tensors is self._parameters)
        ):
            return
        shape = self._room() if own is None else own.shape
        if shape is None or shape == held.shape:
            tensors[RANGE_KEY] = held  # type: ignore[assignment]
            self.__dict__["_shape_of_weight"] = other._shape_of_weight
            self._note_own()
            self._forget()

    def may_become(self, shape: tuple[int, ...]) -> bool:
        """Whether a range of this shape may be loaded: a weight sets its own, and so does a known range."""
        held, wanted = self.held, self._shape_of_weight
        if held is not None and held.shape == shape:
            return True
        return self.amax is None and (wanted is None or fits(shape, wanted))

    def _follow(self, device: torch.device) -> Tensor:
        self._apply(lambda tensor: tensor.to(device))
        amax = self.held
        assert amax is not None
        return amax

    # --- what nn.Module does with tensors ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RangeTensor:
        held = self.held
        waits = self._room() is not None and not self.descriptor.dynamic
        if held is None or (waits and held.is_meta and not self._known and not is_sharded(held)):
            device = device_after(fn) if waits else None
            if device is None:
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
                self._note_own()
            else:
                self.make_room(device)
            return self
        before, zero_point = held.detach(), self._buffers.get(ZERO_POINT_KEY)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._note_own()
        amax = self.held
        if amax is None or amax.is_meta:
            return self
        if before.is_meta:
            self._buffers.pop(ZERO_POINT_KEY, None)
            self._forget()
            return self
        # Of what a model does to its tensors only the device is meant for a range: .half() would make it
        # another range, and to_empty() none.
        exact = before.to(amax.device)
        if isinstance(amax, nn.Parameter):
            amax.data = exact
        else:
            self._buffers[RANGE_KEY] = exact
            self._note_own()
        if zero_point is not None:
            self._hold_zero_point(zero_point, amax.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = self.held
        if held is None:
            return
        # Of a float checkpoint torch.distributed.checkpoint would ask for what is not in it.
        if (held.is_meta and not self._known) or is_in_checkpoint(prefix + RANGE_KEY) is False:
            for key in (RANGE_KEY, ZERO_POINT_KEY):
                destination.pop(prefix + key, None)


def _default_device() -> torch.device:
    """Torch's, as a tensor on it says it: there is only one "meta"."""
    device = torch.get_default_device()
    return _META if device.type == "meta" else device


_META = torch.device("meta")  # compared with sooner than by its type
_range_shape = functools.lru_cache(maxsize=1024)(range_shape)


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a range of this shape is one for all of a tensor, or one for each index along some axes."""
    if len(shape) <= 1 and shape in ((), (1,)):
        return True
    return len(shape) == len(wanted) and all(m in (1, n) for m, n in zip(shape, wanted, strict=True))


def device_after(fn: Callable[[Tensor], Tensor]) -> torch.device | None:
    """Where a function such as ``to_empty`` or ``to`` gives to ``_apply`` puts what has no values yet.

    Returns:
        None: it stays where it is.
    """
    with torch.no_grad():
        try:
            device = fn(torch.empty((), device="meta")).device
        except (NotImplementedError, RuntimeError):  # what .to(device) says of tensors without values
            device = fn(torch.zeros((), device="cpu")).device
    return None if device.type == "meta" else device
