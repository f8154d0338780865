"""How a tensor is quantized (``QuantDescriptor``) and how a layer is (``Recipe``), as values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import attrs

from quantpatch.errors import ArgumentError, ArgumentTypeError, UnknownNameError, shown
from quantpatch.numerics.formats import Float, Integer, NumberFormat
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.qparams import check_given

#: Stands in a descriptor for the axis of a layer's output channels, which each layer knows.
CHANNEL: Literal["channel"] = "channel"
#: The same for the axis that the layer's products sum over, which blocks run along.
REDUCTION: Literal["reduction"] = "reduction"

Axis = int | tuple[int, ...] | None
T = TypeVar("T")


def _axis(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite_positive(value: float) -> bool:
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # an integer of hundreds of digits
        return False


@attrs.frozen(kw_only=True, cache_hash=True)
class QuantDescriptor:
    """How one tensor is quantized.

    Attributes:
        num_bits: Bits of an integer format, 2 to 8; or ``(exponent, mantissa)`` bits of a float format,
            such as ``(4, 3)`` for FP8 E4M3. Not used when ``format`` is given.
        axis: Axes that are *kept*, with a range for each index along them; None is one range for the
            whole tensor, ``"channel"`` the layer's output channels. For formats in blocks: the axis
            that blocks run along; ``"reduction"`` is the one that the layer's products sum over.
        groups: With ``axis=(0, 1)``: of how many groups of neighbours, each with ranges of its own, the first
            axis is made. Weights of transposed convolutions with groups have their output channels so.
        unsigned: Integers from 0 on: no negative values, unless ``zero_point`` makes room for them.
        zero_point: Which of the unsigned integers stands for 0: the grid goes from ``-zero_point`` to
            ``2**num_bits - 1 - zero_point``, and the range from ``-amax * zero_point / (2**num_bits - 1 -
            zero_point)`` to ``amax``. Those that calibration finds for signed integers are the quantizer's
            own, and in no descriptor.
        narrow_range: Leave out the most negative integer, so that the grid is symmetric.
        amax: A range known beforehand, in the tensor's own units.
        learn_amax: Train the range, once it is known, with the gradient of LSQ.
        scale_amax: Factor on every range that calibration finds.
        method: Name of the calibrator that ``calibrate`` uses by default.
        format: A number format or the name of one (``"fp8_e4m3"``), instead of ``num_bits``, ``unsigned``
            and ``narrow_range``.
        dynamic: Take the range from each tensor as it comes; never calibrated.

    Raises:
        ArgumentError: A field has an impossible value, or two contradict each other.
        ArgumentTypeError: A value is of another type.
    """

    num_bits: int | tuple[int, int] = 8
    axis: int | tuple[int, ...] | Literal["channel", "reduction"] | None = attrs.field(
        default=None, converter=_axis
    )
    groups: int = 1
    unsigned: bool = False
    narrow_range: bool = False
    zero_point: int = 0
    amax: float | None = None
    learn_amax: bool = False
    scale_amax: float | None = None
    method: str = "max"
    format: NumberFormat | str | None = None
    dynamic: bool = False
    #: The format itself; None while it is only a name, which the registry knows.
    number_format: NumberFormat | None = attrs.field(init=False, eq=False, repr=False)
    #: ``axis``, once a layer has filled in ``"channel"`` or ``"reduction"`` (before that: None).
    kept_axes: Axis = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        word = self.axis is None or isinstance(self.axis, str)
        expected = "an int, a tuple of ints, 'channel', 'reduction' or None"
        self._demand_type(word or all(_is_number(axis, int) for axis in axes), "axis", expected)
        known = self.axis in (None, CHANNEL, REDUCTION) if word else len(axes) > 0
        self._demand(known, "axis", expected)
        expected = "1, or more with axis=(0, 1)"
        self._demand_type(_is_number(self.groups, int), "groups", expected)
        self._demand(self.groups == 1 or (self.groups > 1 and self.axis == (0, 1)), "groups", expected)
        for field in ("amax", "scale_amax"):
            value = getattr(self, field)
            expected = "a positive finite number or None"
            self._demand_type(value is None or _is_number(value), field, expected)
            self._demand(value is None or _is_finite_positive(value), field, expected)
        for field in ("unsigned", "narrow_range", "learn_amax", "dynamic"):
            self._demand_type(isinstance(getattr(self, field), bool), field, "True or False")
        self._demand_type(isinstance(self.method, str), "method", "a calibrator's name, such as 'max'")
        self._demand_type(
            self.format is None or isinstance(self.format, (str, NumberFormat)),
            "format",
            "a NumberFormat, the name of one, or None",
        )
        object.__setattr__(self, "number_format", self._make_format())
        kept = None if isinstance(self.axis, str) else self.axis
        object.__setattr__(self, "kept_axes", GroupedAxes(self.groups) if self.groups > 1 else kept)
        if self.dynamic:
            clash = [f for f in ("amax", "learn_amax", "scale_amax") if getattr(self, f)]
            if clash:
                raise ArgumentError(
                    f"QuantDescriptor(dynamic=True, {clash[0]}={getattr(self, clash[0])!r}): a dynamic range "
                    f"comes from each tensor; leave out {clash[0]} or dynamic",
                    **{clash[0]: getattr(self, clash[0])},
                )

    def _demand_type(self, condition: bool, field: str, expected: str) -> None:
        self._demand(condition, field, expected, ArgumentTypeError)

    def _demand(
        self, condition: bool, field: str, expected: str, error: type[ArgumentError] = ArgumentError
    ) -> None:
        if not condition:
            value = getattr(self, field)
            raise error(
                f"QuantDescriptor({field}={shown(repr(value))}): expected {expected}", **{field: value}
            )

    def _make_format(self) -> NumberFormat | None:
        if self.format is not None:
            if isinstance(self.format, str):
                return None
            if self.zero_point:
                check_given(self.zero_point, self.format)
            return self.format
        if isinstance(self.num_bits, (tuple, list)):
            self._demand(len(self.num_bits) == 2, "num_bits", "an int, or (exponent, mantissa) bits")
            self._demand(not self.unsigned, "unsigned", "False, since float formats are signed")
            self._demand(self.zero_point == 0, "zero_point", "0, since float formats have none")
            return Float(*self.num_bits)
        self._demand_type(
            _is_number(self.num_bits, int),
            "num_bits",
            "an int from 2 to 8, or (exponent, mantissa) bits",
        )
        integers = Integer(self.num_bits, self.unsigned, self.narrow_range)
        check_given(self.zero_point, integers)
        return integers

    def replace(self, **changes: Any) -> QuantDescriptor:
        """This descriptor with other values in some fields.

        Raises:
            ArgumentError: A field has an impossible value, or two contradict each other.
            ArgumentTypeError: A value is of another type.
            UnknownNameError: There is no such field.
        """
        return _replaced(self, changes)

    def for_axes(self, channel: Axis, reduction: int | None) -> QuantDescriptor:
        """This descriptor with ``"channel"`` and ``"reduction"`` replaced by a layer's axes.

        Args:
            channel: The axis of the output channels, or axes; None: one range for the tensor.
            reduction: The axis that products sum over.
        """
        if self.axis == CHANNEL:
            return _with_axis(self, channel)
        return _with_axis(self, reduction) if self.axis == REDUCTION else self

    def for_channel_axis(self, axis: Axis) -> QuantDescriptor:
        """``for_axes`` of a weight, of whose channels the others are summed over.

        Args:
            axis: One of the first two axes, which are the channels; or two of three, as of weights of
                several experts in one.
        """
        if isinstance(axis, tuple):
            return self.for_axes(axis, 3 - sum(axis))
        return self.for_axes(axis, 1 - axis if axis in (0, 1) else -1)


def _replaced(value: T, changes: Mapping[str, Any]) -> T:
    cls: Any = type(value)
    known = {field.name for field in attrs.fields(cls) if field.init}
    for name in changes:
        if name not in known:
            raise UnknownNameError.of(f"field of {cls.__name__}", name, known)
    return cast(T, attrs.evolve(cast(Any, value), **changes))


@functools.lru_cache(maxsize=1024)
def _with_axis(descriptor: QuantDescriptor, axis: Axis) -> QuantDescriptor:
    if isinstance(axis, GroupedAxes):
        return descriptor.replace(axis=(0, 1), groups=axis.groups)
    return descriptor.replace(axis=axis)


def _names(given: Any) -> Any:
    return (given,) if isinstance(given, str) else tuple(given)


def _several(given: Any) -> Any:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _pairs(given: Any) -> Any:
    return tuple(given.items() if isinstance(given, Mapping) else given)


@attrs.frozen(kw_only=True)
class Recipe:
    """How layers are quantized: one descriptor for each kind of operand, None to leave it float.

    Attributes:
        name: What users ask for, and what reports show.
        input: Activations that come into a layer.
        weight: Weights.
        output: Activations that leave a layer.
        hidden: What a recurrent layer (``nn.LSTM`` …) hands from one time step to the next. None leaves it
            float within torch's fused kernel. Quantizing it means running in Python, step by step, which is
            slower. Cells, which run step by step anyway, take ``input`` for it if this is None.
        include: Names of targets that blocks leave float by default and this recipe wants replaced.
        rules: What differs by name, as ``configure`` takes it: ``{"conv1": None, ":last": "int8"}``. Names
            are those within the model, which is complete when a block ends: the rules are applied then, to
            each outermost module that was built in it (``convert`` applies them at once).
        tune: Methods that :func:`quantpatch.tune` uses when it is given this recipe, in their order: names,
            or methods with options.
        about: What it is for, in a line: ``quantpatch recipes`` shows it.
    """

    name: str
    input: QuantDescriptor | None = attrs.field(factory=QuantDescriptor)
    weight: QuantDescriptor | None = attrs.field(
        factory=lambda: QuantDescriptor(axis=CHANNEL, narrow_range=True)
    )
    output: QuantDescriptor | None = None
    hidden: QuantDescriptor | None = None
    include: tuple[str, ...] = attrs.field(default=(), converter=_names)
    rules: tuple[tuple[Any, Any], ...] = attrs.field(default=(), converter=_pairs)
    tune: tuple[Any, ...] = attrs.field(default=(), converter=_several)
    about: str = attrs.field(default="", eq=False)

    def __attrs_post_init__(self) -> None:
        for field in ("input", "weight", "output", "hidden"):
            value = getattr(self, field)
            if not (value is None or isinstance(value, QuantDescriptor)):
                raise ArgumentTypeError(
                    f"Recipe({field}={value!r}): expected a QuantDescriptor, or None to leave it float",
                    **{field: value},
                )

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with other values in some fields, such as ``rules={":last": None}``.

        Raises:
            ArgumentTypeError: A value is of another type.
            UnknownNameError: There is no such field.
        """
        return _replaced(self, changes)


#: A layer's descriptors of it name every operand that the layer can have a quantizer for.
EVERY_OPERAND = Recipe(name="every operand", output=QuantDescriptor(), hidden=QuantDescriptor())
