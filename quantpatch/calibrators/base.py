"""The calibrator: it sees the tensors of one quantizer and turns what it saw into a range.

What every calibrator must get right is here once: values that are not finite, empty batches, kept
axes, inference mode, several processes. A calibrator of one's own is left with its statistics.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantpatch.errors import CalibrationError, listed, warn_caller
from quantpatch.numerics.formats import NumberFormat
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import reduce_amax
from quantpatch.torch_tools.distributed import Ranks
from quantpatch.torch_tools.sharded import whole

AllReduce = Callable[[Tensor, dist.ReduceOp.RedOpType], Tensor]
"""Reduces a tensor over the ranks and returns the result; the argument is left alone."""


class Calibrator(abc.ABC):
    """Collects statistics of the tensors one quantizer sees and turns them into its range.

    A subclass keeps its statistics in tensors and implements four methods, which need not look after
    gradients, finiteness, empty batches or the number of processes:

    * ``_start(shape, device)``: make the statistics of no data, for ranges of ``shape``;
    * ``_update(x, amax)``: take in a batch; ``amax`` is its largest magnitude, of ``shape``;
    * ``_range()``: the range that the statistics give, of ``shape``;
    * ``_reduce(all_reduce)``: make the statistics those of all ranks.

    Options of its own are keyword-only arguments of its ``__init__``.

    Args:
        format: The number format that the range is for.
        axis: The axes that are *kept*, each of their positions having a range of its own (``0`` for
            the weight of a linear or convolution layer); negative ones count from the end. None: one
            range for the whole tensor.

    Attributes:
        format: The number format.
        zero_point: How many integers, unsigned then, are for the shorter side of the range; None: they are
            what the format says. Tensors that :meth:`collect` gets say how far the longer side must reach. It
            may be set before :meth:`compute_amax`, when the statistics show that the range needs one.
        axis: The kept axes, as given.
        batches: Number of batches given to :meth:`collect` since the last :meth:`reset`.
        negative_share: Which share of the values were negative, of a format that holds none; else 0.
        lowest: The least of them, or 0.
    """

    def __init__(self, format: NumberFormat, axis: int | tuple[int, ...] | None = None) -> None:
        self.format = format
        self.zero_point: int | None = None
        self.axis = axis
        self.batches = 0
        self.lowest = 0.0
        self._values = self._negative_values = 0
        self._shape: torch.Size | None = None
        self._device = torch.device("cpu")

    @property
    def qparams(self) -> QParams:
        """The format and the zero point, which together say what the grid is."""
        return QParams(self.format, None, zero_point=self.zero_point)

    @property
    def saw_data(self) -> bool:
        """Whether there are statistics: a batch that was not empty, here or on another rank."""
        return self._shape is not None

    @property
    def negative_share(self) -> float:
        """See the class."""
        return self._negative_values / max(1, self._values)

    def collect(self, x: Tensor) -> None:
        """Takes in one batch. An empty one counts as no data.

        Statistics are of what the format can hold: if that is nothing negative, negative values count as the
        zeros that they become, and ``negative_share`` counts them.

        Args:
            x: Of any shape that has the kept axes, dtype and device. It is read in float32, without
                gradient, and not kept.

        Raises:
            CalibrationError: A value is NaN or infinite (in float32), the tensor does not have the
                kept axes, or their lengths are not those of the batches before. The statistics are
                as before the call.
        """
        self.batches += 1
        if x.numel() == 0:
            return
        with _plain_tensors():
            if not x.is_floating_point():
                x = x.to(torch.float32)
            x = whole(x)
            if isinstance(self.axis, GroupedAxes):
                x = self.axis.split(x)
            count, negative, lowest = x.numel(), 0, 0.0
            if self.qparams.lower_end() == 0.0:
                lowest = float(x.amin())
                # NaN is not below 0, and left for the check that follows, as infinity is.
                if -math.inf < lowest < 0.0:
                    negative = int((x < 0).sum())
                    x = x.clamp(min=0)
            amax = self._amax_of(x)
            self._values += count
            self._negative_values += negative
            self.lowest = min(self.lowest, lowest)
            if self._shape is None:
                self._begin(amax.shape, amax.device)
            self._update(x, amax.to(self._device))

    def compute_amax(self) -> Tensor:
        """The range that the statistics give. They are not consumed: more can be collected.

        Returns:
            Float32, 0-dim per tensor; with kept axes of the shape of ``x`` whose other axes are 1,
            such as ``(C, 1, 1, 1)``. A tensor of its own, which no later batch changes.

        Raises:
            CalibrationError: No data was seen.
        """
        shape = self._range_shape()
        with _plain_tensors():
            found = self._range().to(torch.float32, copy=True).reshape(shape)
            return found.squeeze(1) if isinstance(self.axis, GroupedAxes) else found

    def reset(self) -> None:
        """Forgets all that was collected."""
        self.batches = 0
        self.lowest = 0.0
        self._values = self._negative_values = 0
        self._shape = None

    def synchronize(self, group: dist.ProcessGroup | None = None) -> None:
        """Makes the statistics those of the data of all ranks.

        Every rank of the group must call it, also one without data. Do so once, when all batches are
        in: what is collected afterwards would be weighed against statistics that already count the
        other ranks. Without ``torch.distributed`` initialised there is nothing to do. Where it fails on one
        rank it fails on all.

        Args:
            group: The process group; None for the default one.

        Raises:
            CalibrationError: The ranks saw kept axes of different lengths, or another rank failed or is gone.
        """
        with Ranks(group) as ranks:
            if ranks.count == 1:
                return
            seen = sorted({shape for shape in ranks.gather(self._shape) if shape is not None})
            if len(seen) > 1:
                raise ranks.all_raise(
                    CalibrationError(
                        f"the ranks saw ranges of different shapes {', '.join(str(tuple(s)) for s in seen)} "
                        f"for axis={self.axis!r}: they must run the same model"
                    )
                )
            with _plain_tensors():
                if self._shape is None and seen:
                    self._begin(seen[0], self._device)
                if seen:
                    self._reduce(ranks.reduce)

    @abc.abstractmethod
    def _start(self, shape: torch.Size, device: torch.device) -> None:
        """Makes the statistics of no data.

        Args:
            shape: Shape of the ranges: ``()`` per tensor, else such as ``(C, 1, 1, 1)``.
            device: Where to keep them.
        """

    @abc.abstractmethod
    def _update(self, x: Tensor, amax: Tensor) -> None:
        """Takes in a batch.

        Args:
            x: Not empty, finite, floating point; read only.
            amax: ``max |x|`` over the axes not kept; float32, of the shape and on the device given
                to ``_start``.
        """

    @abc.abstractmethod
    def _range(self) -> Tensor:
        """The range; a tensor with as many values as the shape given to ``_start`` has."""

    @abc.abstractmethod
    def _reduce(self, all_reduce: AllReduce) -> None:
        """Makes the statistics those of all ranks.

        Args:
            all_reduce: Reduces a tensor over the ranks. Every rank must call it equally often, with
                tensors of equal shape.
        """

    def _range_shape(self) -> torch.Size:
        """Shape of the range; CalibrationError if no data was seen."""
        if self._shape is None:
            raise CalibrationError(
                f"{type(self).__name__} saw no data ({self.batches} batches, none with a value in it), "
                "so it cannot give a range. Run batches through the layer first."
            )
        return self._shape

    def _begin(self, shape: torch.Size, device: torch.device) -> None:
        self._start(shape, device)
        self._shape, self._device = shape, device

    def _amax_of(self, x: Tensor) -> Tensor:
        """``max |x|`` over the axes not kept, once it is known to be usable."""
        axis = self.axis.SPLIT if isinstance(self.axis, GroupedAxes) else self.axis
        axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
        if any(not -x.dim() <= a < x.dim() for a in axes):
            raise CalibrationError(
                f"batch {self.batches} has shape {tuple(x.shape)}, which has no axis {self.axis!r} to keep"
            )
        amax = reduce_amax(x, axis=axis)
        if self._shape is not None and amax.shape != self._shape:
            raise CalibrationError(
                f"batch {self.batches} of shape {tuple(x.shape)} gives ranges of shape {tuple(amax.shape)} "
                f"for axis={self.axis!r}, but the batches before gave {tuple(self._shape)}. Keep only axes "
                "whose length does not change, or calibrate per tensor (axis=None)."
            )
        if not bool(torch.isfinite(amax).all()):
            count = int((~torch.isfinite(x.to(torch.float32))).sum())
            raise CalibrationError(
                f"{count} of the {x.numel()} values of batch {self.batches} are NaN or infinite in float32: "
                "no range can be computed from them. Look for the layer or the input that makes them.",
                batch=self.batches,
                count=count,
            )
        return amax


def warn_of_negatives(calibrators: Mapping[str, Calibrator]) -> None:
    """Warns of those that saw negative values, of which their formats hold none.

    Args:
        calibrators: By the names of their quantizers.
    """
    found = {name: c for name, c in calibrators.items() if c.negative_share}
    if not found:
        return
    shown = (
        f"{name or 'the model itself'}: {c.negative_share:.2%} of the values, down to {c.lowest:.4g}"
        for name, c in found.items()
    )
    warn_caller(
        f"these quantizers of unsigned numbers saw negative values: {listed(shown, separator='; ')}. Such "
        f"values become 0, and the ranges are those of the others. Where they matter use signed integers "
        f"(unsigned=False); qp.calibrate(..., zero_points=True) then finds how many of them are to be "
        f"negative"
    )


def _plain_tensors() -> AbstractContextManager[Any]:
    """No gradients, and ordinary tensors even where the model runs in inference mode.

    A tensor made in inference mode could neither be updated by a later batch outside of it nor serve
    as the range of a layer in training.
    """
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack
