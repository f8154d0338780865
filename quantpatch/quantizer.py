"""``TensorQuantizer``: the module that stands where a tensor is quantized, and all its state.

A quantizer has no tensors until its range is known, so a model built from uncalibrated quantizers has
exactly the ``state_dict`` keys of its float twin. The range stays float32 whatever the model is cast to.
Beside the range of integers with a zero point the state has that: without it the range means another one.

In eval mode the result for a weight is kept and used again until the weight, the range or the settings
change. A change is seen through the weight's version counter, its identity and its memory; one made through
``weight.data`` moves no counter, and is looked for in a sample of the weight's elements (on the CPU; reading
values of an accelerator would make the host wait for it). ``train()`` and ``eval()`` forget the result, so a
loop that evaluates after each epoch sees every change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar, TypeVar

import attrs
import torch
from torch import Tensor, nn

from quantpatch.affine import longer_side, magnitudes, upper_end
from quantpatch.calibrators import Calibrator
from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import CalibrationError, DescriptorError, ExportError, OperandError, RangeError
from quantpatch.fake_quant import check_operand, fake_quantize
from quantpatch.formats import Integer, NumberFormat
from quantpatch.fx_leaf import leaf_in_fx
from quantpatch.kept_weight import KeptWeight, Snapshot
from quantpatch.places import place_in_running_model
from quantpatch.registry import registry
from quantpatch.rounding.modes import is_traced
from quantpatch.sharded import beside, gathers_weights, local_part

__all__ = [
    "PARALLELIZE_FIRST",
    "RANGE_KEY",
    "ZERO_POINT_KEY",
    "TensorQuantizer",
    "named_quantizers",
    "outside_of",
]

T = TypeVar("T")

PARALLELIZE_FIRST = (
    "If it is parallelize_module that fails here: its styles take the quantizers inside of a layer for "
    "layers. Parallelize the float model and quantize it then: "
    "`parallelize_module(model, mesh, plan); qp.convert(model)`"
)

_DEFAULT = QuantDescriptor()
#: Name of the range in a quantizer's state.
RANGE_KEY = "_amax"
#: Name of the zero point beside it, where there is one.
ZERO_POINT_KEY = "_zero_point"


def _look_here(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing; see ``TensorQuantizer.__init__``."""


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
        keeps_weights: Whether quantized weights are kept in eval mode, at the cost of their memory. Set it
            to False on the class to turn that off everywhere.
    """

    keeps_weights: ClassVar[bool] = True

    descriptor: QuantDescriptor
    format: NumberFormat
    disabled: bool
    calibrating: bool
    quantizing: bool
    calibrator: Calibrator | None
    _kept: KeptWeight | None

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
            _kept=None,
        )
        # torch's C++ fast paths for transformers read the weights of the layers inside and call none of
        # them, unless a module in there has a hook. This one makes sure that no quantizer is passed over.
        self.__dict__["_forward_pre_hooks"]["quantpatch"] = _look_here
        if descriptor.amax is not None:
            self.amax = descriptor.amax

    # --- the range -----------------------------------------------------------------------------

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
        signed = isinstance(format, Integer) and not format.unsigned
        return signed and descriptor.kept_axes is None and not descriptor.dynamic

    def use_zero_point(self, zero_point: int, amax: Tensor | float | None = None) -> None:
        """Makes the integers unsigned ones, one of which stands for 0.

        Args:
            zero_point: Which; 0 is right where nothing is negative.
            amax: The range, by its upper end; default: the one known so far stays.

        Raises:
            DescriptorError: The format is not one of integers with a scale from outside, or has no such
                zero point.
            RangeError: As when ``amax`` is set.
        """
        format, descriptor = self.format, self.descriptor
        if not isinstance(format, Integer):
            raise DescriptorError(
                f"{self}: of the formats only integers have zero points, and {format.name} is none; "
                f"use QuantDescriptor(unsigned=True)",
                field="zero_point",
                value=zero_point,
            )
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
        self.__dict__.update(descriptor=descriptor, format=registry.format(descriptor), _kept=None)
        if amax is not None:
            self.amax = amax
        self._show_zero_point()

    def _show_zero_point(self) -> None:
        """Puts the zero point into the state beside the range. Nothing computes with what is there."""
        amax, z = self.amax, getattr(self.format, "zero_point", 0)
        if amax is None or z == 0:
            self._buffers.pop(ZERO_POINT_KEY, None)
            return
        with torch.inference_mode(False):
            self._buffers[ZERO_POINT_KEY] = torch.tensor(z, dtype=torch.uint8, device=amax.device)

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
            CalibrationError: The calibrator has no such option.
            UnknownNameError: There is no such calibrator.
        """
        method = method or self.descriptor.calib_method
        kind = registry.calibrator(method)
        parameters = inspect.signature(kind).parameters.values()
        takes = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        unknown = sorted(options.keys() - takes)
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            known = ", ".join(sorted(takes)) or "none"
            raise CalibrationError(
                f"calibrator {method!r} has no option {unknown[0]!r}; its options are: {known}"
            )
        # The axis of a format in blocks is the one that blocks run along, not one that is kept.
        axis = self.descriptor.kept_axes if self.format.block_size is None else None
        return kind(longer_side(self.format), axis, **options)

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
        amax = upper_end(calibrator.compute_amax(), self.format)
        scale = self.descriptor.scale_amax
        return amax if scale is None else amax * scale

    # --- passing tensors -----------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether a tensor comes out changed, or leaves statistics behind."""
        return not self.disabled and (self.quantizing or self.calibrating)

    @leaf_in_fx
    def forward(self, x: Tensor, *, is_weight: bool = False) -> Tensor:
        """The tensor, fake-quantized; same shape, dtype, device and memory format.

        Args:
            x: The tensor.
            is_weight: It comes again and again and seldom changes: in eval mode and without gradient, keep
                the result and use it until something changes.

        Raises:
            CalibrationError: It holds NaN or infinity and statistics are being collected.
            OperandError: It is no tensor of real floating-point numbers.
            RangeError: The range does not fit its shape.
        """
        if self.disabled:
            return x
        try:
            check_operand(x)
            if self.calibrating and self.calibrator is not None:
                self._collect(x)
            return self._quantized(x, is_weight) if self.quantizing else x
        except (OperandError, RangeError) as error:
            self._say_where(error)
            raise

    def _collect(self, x: Tensor) -> None:
        assert self.calibrator is not None
        try:
            self.calibrator.collect(magnitudes(x.detach(), self.format))
        except CalibrationError as error:
            error.quantizer = self
            raise

    def _say_where(self, error: OperandError | RangeError) -> None:
        """Adds this quantizer's name in the model that is running to an error that came out of it."""
        if torch.compiler.is_compiling() or error.quantizer is not None:
            return
        name = place_in_running_model(self)
        if name is None:
            return
        error.quantizer = name
        message = f"{name}: {error}"
        if isinstance(error, OperandError) and isinstance(error.value, torch.dtype):
            layer = name.rpartition(".")[0] or name
            message += f". To leave its layer float write: qp.configure(model, {{{layer!r}: None}})"
        error.args = (message,)

    def _quantized(self, x: Tensor, is_weight: bool) -> Tensor:
        descriptor = self.descriptor
        amax = None if descriptor.dynamic else self.amax
        if amax is not None and amax.device != x.device:  # a checkpoint loaded it before any tensor came
            # To the meta device it does not go along: it would be lost.
            amax = amax.to(x.device) if x.is_meta else self._follow(x.device)
        if is_weight and not self.training and self._may_keep(x, amax):
            return self._from_kept(x, amax)
        return fake_quantize(x, self._magnitude(amax), self.format, axis=descriptor.kept_axes)

    def _may_keep(self, weight: Tensor, amax: Tensor | None) -> bool:
        """Whether the result for a weight depends on nothing that cannot be watched."""
        if not self.keeps_weights or is_traced() or gathers_weights():
            return False
        if type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta:
            return False  # a parametrization's output, a stand-in of functional_call, no version counter
        if amax is not None and amax.is_inference():
            return False
        needs_grad = weight.requires_grad or (amax is not None and amax.requires_grad)
        return not (needs_grad and torch.is_grad_enabled())

    def _from_kept(self, weight: Tensor, amax: Tensor | None) -> Tensor:
        descriptor = self.descriptor
        kept = self._kept
        if kept is not None and kept.is_of(weight, amax, descriptor):
            return kept.quantized
        # Not as an inference tensor: it may be used in a forward pass with gradients later.
        with torch.inference_mode(False), torch.no_grad():
            quantized = fake_quantize(weight, self._magnitude(amax), self.format, axis=descriptor.kept_axes)
            # Within a mode such as FakeTensorMode, or a transform of torch.func, it is of no use outside.
            plain = type(quantized) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(
                quantized
            )
            self.__dict__["_kept"] = KeptWeight(quantized, weight, amax, descriptor) if plain else None
        return quantized

    def train(self, mode: bool = True) -> TensorQuantizer:
        """Sets training or eval mode; forgets the quantized weight that was kept, and frees its memory."""
        self.__dict__["_kept"] = None
        return super().train(mode)

    def agrees_with(self, other: TensorQuantizer) -> bool:
        """Whether both are known to give the same result for the same tensor.

        Ranges are compared once after each change, and not while tracing.
        """
        if self is other:
            return True
        if self.calibrating or other.calibrating or self.descriptor != other.descriptor:
            return False
        if (self.disabled, self.quantizing) != (other.disabled, other.quantizing):
            return False
        mine, others = self.amax, other.amax
        if self.descriptor.dynamic or (mine is None and others is None):
            return True
        if mine is None or others is None or self.descriptor.learn_amax or is_traced():
            return False
        known = self.__dict__.get("_compared")
        if known is None or not (known[0].holds(mine) and known[1].holds(others)):
            if mine.is_inference() or others.is_inference() or mine.device != others.device:
                return False
            known = (Snapshot(mine), Snapshot(others), torch.equal(mine, others))
            self.__dict__["_compared"] = known
        return bool(known[2])

    def __getstate__(self) -> dict[str, Any]:
        # What is kept is for speed; copies and files start without.
        state = {**self.__dict__, "_kept": None}
        state.pop("_compared", None)
        return state

    def _follow(self, device: torch.device) -> Tensor:
        self._apply(lambda tensor: tensor.to(device))
        amax = self.amax
        assert amax is not None
        return amax

    # --- what nn.Module does with tensors ------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
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
        if getattr(self.format, "zero_point", 0):  # else there may be room for one that is to be loaded
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
        if saved is None:
            return  # a float checkpoint: strict loading asks for nothing that it cannot have
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
        amax = self.amax
        if amax is not None and amax.dtype != torch.float32:  # loaded with assign=True
            self.amax = None
            self._hold(amax.detach().float())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name == "weight":  # which torch's RowwiseParallel asks every module inside of a layer for
                raise AttributeError(f"{error}. {PARALLELIZE_FIRST}") from None
            raise

    def _take_zero_point(self, saved: Tensor | None) -> str | None:
        """Makes the zero point that which a checkpoint's range was found for; says why if it cannot be."""
        own = getattr(self.format, "zero_point", 0)
        if saved is None and own:
            return (
                f"{self} has the zero point {own}, and the checkpoint's range is of integers without one; "
                f"load it into a model whose quantizers have none"
            )
        if saved is None or saved.is_meta or int(saved) == own:
            return None
        try:
            self.use_zero_point(int(saved))
        except DescriptorError as error:
            return f"the checkpoint has {int(saved)}; {error}"
        return None

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks each module for what to compile in its place, and would otherwise complain
        # of the first attribute whose type it does not know.
        raise ExportError(
            "torch.jit.script cannot compile a quantizer. Write torch.export.export(model, inputs), "
            "torch.jit.trace(model, inputs) or qp.export_onnx(model, inputs, path)"
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


def named_quantizers(model: nn.Module, *, every_name: bool = False) -> dict[str, TensorQuantizer]:
    """Every quantizer of a model by its qualified name.

    Args:
        model: Any module.
        every_name: Whether one that is shared is there by all its names, instead of the first alone.
    """
    modules = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in modules if isinstance(module, TensorQuantizer)}


def outside_of(owners: Container[str], tensors: Mapping[str, T]) -> dict[str, T]:
    """Those entries of a ``state_dict`` that belong to none of the modules of these names, in their order."""

    def is_inside(key: str) -> bool:
        owner, dot, _ = key.rpartition(".")
        return bool(dot) and (owner in owners or is_inside(owner))

    return {key: tensor for key, tensor in tensors.items() if not is_inside(key)}
