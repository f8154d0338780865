"""``TensorQuantizer``: the module that stands where a tensor is quantized.

Its tensors, the range and the zero point, are held by :mod:`quantpatch.layers.range_state`.

Every call quantizes the tensor that it is given, a weight too. Nothing is remembered from one call to the
next, so a change made in whatever way (``weight.data``, a numpy view, another thread) is seen by the next.
:func:`quantpatch.folded_weights` is for those who can promise that weights stay as they are.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import weakref
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from quantpatch.calibrators import Calibrator, warn_of_negatives
from quantpatch.errors import ArgumentTypeError, CalibrationError, ExportError, RangeError
from quantpatch.layers.late_ranges import copied
from quantpatch.layers.lowering import lowering
from quantpatch.layers.range_state import HeldRange
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.modes import is_traced
from quantpatch.numerics.qparams import check_given, of_longer_side
from quantpatch.numerics.ranges import check_operand, what_is_odd_about
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.torch_tools.fast_paths import refuse_fast_paths
from quantpatch.torch_tools.fx import leaf_in_fx

T = TypeVar("T")

PARALLELIZE_FIRST = (
    "If it is parallelize_module that fails here: its styles take the quantizers inside of a layer for "
    "layers. Parallelize the float model and quantize it then: "
    "`parallelize_module(model, mesh, plan); qp.convert(model)`"
)

_DEFAULT = QuantDescriptor()


#: What quantizers did before the outermost ``in_float`` that is open: copies do that, from the beginning.
_outside: Final[weakref.WeakKeyDictionary[TensorQuantizer, dict[str, Any]]] = weakref.WeakKeyDictionary()


class TensorQuantizer(HeldRange):
    """Fake-quantizes the tensors that pass through it.

    Three stages can be switched separately: the quantizer as a whole (``disable``), collecting
    statistics (``enable_calib``) and quantizing (``disable_quant``). As long as a static range is not
    known, the range of each tensor at hand is used.

    Args:
        descriptor: How to quantize; default: 8-bit signed integers, one range for the tensor.
        in_layer: Whether the module it is for calls
            :func:`quantpatch.torch_tools.fast_paths.refuse_fast_paths` for all of its quantizers.

    Raises:
        ArgumentTypeError: It is not a descriptor.
        UnknownNameError: There is no format of the name in it.

    Attributes:
        descriptor: The same.
        format: The number format that the descriptor means; with a zero point its unsigned integers.
        disabled: Whether tensors pass unchanged.
        calibrating: Whether statistics are collected.
        quantizing: Whether tensors are quantized.
        calibrator: What collects the statistics, or None.
    """

    disabled: bool
    calibrating: bool
    quantizing: bool
    calibrator: Calibrator | None

    def __init__(self, descriptor: QuantDescriptor | None = None, *, in_layer: bool = False) -> None:
        super().__init__()
        descriptor = _DEFAULT if descriptor is None else descriptor
        if not isinstance(descriptor, QuantDescriptor):
            raise ArgumentTypeError(
                f"a TensorQuantizer takes a QuantDescriptor, such as QuantDescriptor(format='int8'), not "
                f"{descriptor!r}",
                descriptor=descriptor,
            )
        format = registry.format(descriptor)
        if descriptor.zero_point:
            check_given(descriptor.zero_point, format)
        # Straight into the dictionary: nn.Module's own __setattr__ looks for tensors and modules first,
        # and a model has hundreds of these objects.
        self.__dict__.update(
            descriptor=descriptor,
            _format=format,
            disabled=False,
            calibrating=False,
            quantizing=True,
            calibrator=None,
        )
        if in_layer:  # which makes room for the range
            return
        refuse_fast_paths(self)
        if descriptor.amax is not None:
            self.amax = descriptor.amax
        else:
            self.make_room()

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
                the descriptor's ``method``.

        Raises:
            CalibrationError: The range is dynamic, so that there is nothing to calibrate.
            UnknownNameError: No calibrator has the name of the descriptor's ``method``.
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
            method: Its name; default: the descriptor's ``method``.
            **options: Handed to it.

        Raises:
            CalibrationError: The calibrator has no such option.
            UnknownNameError: There is no such calibrator.
        """
        method = method or self.descriptor.method
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
        axis = self.descriptor.kept_axes if self._format.block_size is None else None
        calibrator = kind(self._format, axis, **options)
        if (zero_point := self._read_zero_point) is not None:
            calibrator.zero_point = of_longer_side(zero_point, self._format.bits)
        return calibrator

    def load_calib_amax(self) -> None:
        """Sets the range that the collected statistics give; the statistics are kept.

        Raises:
            CalibrationError: No data was collected.
        """
        if self.calibrator is None:
            raise CalibrationError(f"{self} collects no statistics; call enable_calib() and run the model")
        self.amax = self.range_from(self.calibrator)
        warn_of_negatives({str(self): self.calibrator})

    def range_from(self, calibrator: Calibrator) -> Tensor:
        """The range that a calibrator's statistics give this quantizer; nothing is changed.

        Raises:
            CalibrationError: It saw no data, or what it gives is not a range.
        """
        amax = self.qparams.upper_end(calibrator.compute_amax())
        if self.descriptor.scale_amax is not None:
            amax = amax * self.descriptor.scale_amax
        try:
            self._check_range(amax)
        except RangeError as error:
            raise CalibrationError(
                f"{type(calibrator).__name__} gives an invalid range: {error}", quantizer=self
            ) from error
        return amax

    # --- passing tensors -----------------------------------------------------------------------

    @property
    def lasting(self) -> dict[str, Any]:
        """What it holds, as it is outside of ``in_float``: what copies and files have of it."""
        return {**self.__dict__, **_outside.get(self, {})}

    @property
    def is_active(self) -> bool:
        """Whether a tensor comes out changed, or leaves statistics behind."""
        return not self.disabled and (self.quantizing or self.calibrating)

    @leaf_in_fx
    def forward(self, x: Tensor, *, batch_axis: int | None = 0) -> Tensor:
        """The tensor, fake-quantized; same shape, dtype, device and memory format.

        Args:
            x: The tensor.
            batch_axis: The axis of an activation's examples; None for a weight, which has none. A tensor of
                one axis has features alone. Only the gradient of a learned range depends on it.

        Raises:
            CalibrationError: It holds NaN or infinity and statistics are being collected.
            ArgumentTypeError: It is not a dense tensor of real floating-point numbers.
            RangeError: The range does not fit its shape.
        """
        if self.disabled:
            return x
        exported = lowering()
        if exported is not None and (instead := exported.forward_of(self)) is not None:
            return instead(x)
        try:
            if self.calibrating and self.calibrator is not None:
                self._collect(x)
            if self.quantizing:
                return self._quantized(x, batch_axis)
            check_operand(x)
            return x
        except (ArgumentTypeError, CalibrationError, RangeError) as error:
            self._name_in(error)
            raise
        except (RuntimeError, TypeError) as error:
            # Looked for only now: in every call it would cost time, and torch can do more with some of them
            # than with others.
            why = what_is_odd_about(x)
            if why is None:
                raise
            odd = ArgumentTypeError(why, x=x.layout)
            self._name_in(odd)
            raise odd from error

    def _collect(self, x: Tensor) -> None:
        assert self.calibrator is not None
        check_operand(x)
        x, q = x.detach(), self.qparams
        self.calibrator.collect(q.magnitudes(x) if q.zero_point else x)

    def _name_in(self, error: ArgumentTypeError | CalibrationError | RangeError) -> None:
        """Has an error that came out of this quantizer begin with its name."""
        if torch.compiler.is_compiling() or error.quantizer is not None:
            return
        error.quantizer = self
        message = str(error)
        if isinstance(error, ArgumentTypeError) and isinstance(error.value, (torch.dtype, torch.layout)):
            message += ". To leave a layer float write: qp.configure(model, {name: None})"
        name = found_name(self)
        error.args = (f"{name}: {message}" if name else message,)

    def _quantized(self, x: Tensor, batch_axis: int | None) -> Tensor:
        check_operand(x)
        descriptor = self.descriptor
        return fake_quantize(
            x,
            None if descriptor.dynamic else self._range_for(x, is_weight=batch_axis is None),
            self._format,
            axis=descriptor.kept_axes,
            zero_point=self.held_zero_point,
            batch_axis=batch_axis if descriptor.learn_amax and x.dim() > 1 else None,
        )

    def agrees_with(self, other: TensorQuantizer) -> bool:
        """Whether both are known to give the same result for the same tensor.

        Ranges are compared in main memory only, and not while tracing.
        """
        if self is other:
            return True
        if self.calibrating or other.calibrating or self.descriptor != other.descriptor:
            return False
        if (self.disabled, self.quantizing) != (other.disabled, other.quantizing):
            return False
        mine, others = (
            None if (r := q.held) is None or not (q._known or q._look(r)) else r for q in (self, other)
        )
        if not self._has_same_zero_point(other):
            return False
        if self.descriptor.dynamic or (mine is None and others is None):
            return True
        if mine is None or others is None or self.descriptor.learn_amax or is_traced():
            return False
        # Elsewhere than in main memory a comparison would make the host wait: there it is not known.
        return mine.is_cpu and others.is_cpu and torch.equal(mine, others)

    def __getstate__(self) -> dict[str, Any]:
        copied.add(self)
        return self.lasting

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name == "weight":  # which torch's RowwiseParallel asks every module inside of a layer for
                raise AttributeError(f"{error}. {PARALLELIZE_FIRST}") from None
            raise

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks each module for what to compile in its place, and would otherwise complain
        # of the first attribute whose type it does not know.
        raise ExportError(
            "torch.jit.script cannot compile a quantizer. Write torch.export.export(model, inputs), "
            "torch.jit.trace(model, inputs) or qp.export_onnx(model, inputs, path)"
        )

    # --- printing ------------------------------------------------------------------------------

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
        return f"{self.format_name}{axis}, {self.state}"


def named_quantizers(model: nn.Module, *, every_name: bool = False) -> dict[str, TensorQuantizer]:
    """Every quantizer of a model by its qualified name.

    Args:
        model: Any module.
        every_name: Whether one that is shared is there by all its names, instead of the first alone.
    """
    modules = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in modules if isinstance(module, TensorQuantizer)}


def found_name(module: nn.Module) -> str:
    """The name of a module in the outermost one that holds it; empty if none does.

    A module does not know by what name it is held, so all that there are are asked: for errors alone.
    """
    holders: dict[int, tuple[str, Any]] = {}
    for holder in gc.get_objects():
        if issubclass(type(holder), nn.Module):  # not isinstance, which asks what pretends to be one
            holders |= {id(m): (name, holder) for name, m in vars(holder).get("_modules", {}).items()}
    names: list[str] = []
    while (found := holders.pop(id(module), None)) is not None:
        names[:0], module = found[:1], found[1]
    return ".".join(names)


@contextlib.contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """A block in which no quantizer of a model quantizes; afterwards each is at the stage it was at.

    So are copies of the model that are made inside, from the beginning, and they have no hook that a
    quantizer got inside: what watches these does not watch them.
    """
    names = ("calibrating", "quantizing", "calibrator")
    stages = {q: {name: getattr(q, name) for name in names} for q in named_quantizers(model).values()}
    outermost = {
        q: {**stage, "_forward_pre_hooks": q._forward_pre_hooks.copy()}
        for q, stage in stages.items()
        if q not in _outside
    }
    try:
        _outside.update(outermost)
        for quantizer in stages:
            quantizer.disable_quant()
        yield
    finally:
        for quantizer, stage in stages.items():
            vars(quantizer).update(stage)
        for quantizer in outermost:
            _outside.pop(quantizer, None)


def outside_of(owners: Container[str], tensors: Mapping[str, T]) -> dict[str, T]:
    """Those entries of a ``state_dict`` that belong to none of the modules of these names, in their order."""

    def is_inside(key: str) -> bool:
        owner, dot, _ = key.rpartition(".")
        return bool(dot) and (owner in owners or is_inside(owner))

    return {key: tensor for key, tensor in tensors.items() if not is_inside(key)}
