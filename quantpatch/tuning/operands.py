"""What weights are multiplied by, seen while the model runs, whatever code multiplies them.

Products are seen where they reach the dispatcher, below every Python function, by the memory that their
operands lie in. A weight's quantizer that is disabled gives the weight itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quantpatch.tuning.weights import Weight

# How many numbers are looked at in one piece.
_PIECE = 1 << 24


@attrs.frozen
class Layout:
    """How a product reads a weight: as matrices ``(groups, outputs, inputs)``, each times its own inputs."""

    def view(self, weight: Tensor) -> Tensor:
        """A contiguous tensor of the weight's shape, as ``(groups, outputs, …)``; the rest are inputs."""
        raise NotImplementedError

    def matrices(self, weight: Tensor) -> Tensor:
        """The same with one axis of inputs."""
        return self.view(weight.contiguous()).flatten(2)


@attrs.frozen
class Multiplied(Layout):
    """A matrix product with a weight, or with neighbouring outputs of one.

    Attributes:
        summed: The axis of the weight that is summed over, -1 or -2.
        first: The first of the outputs.
        count: How many there are.
    """

    summed: int
    first: int
    count: int

    def view(self, weight: Tensor) -> Tensor:
        """See there."""
        if self.summed == -2:
            weight = weight.transpose(-1, -2)
        if weight.dim() == 2:
            weight = weight.unsqueeze(0)
        return weight.narrow(1, self.first, self.count)


@attrs.frozen
class Convolved(Layout):
    """A convolution.

    Attributes:
        groups: Their number.
        transposed: Whether it is a transposed one.
    """

    groups: int
    transposed: bool

    def view(self, weight: Tensor) -> Tensor:
        """See there."""
        split = torch.unflatten(weight, 0, (self.groups, -1))
        return (split.transpose(1, 2) if self.transposed else split).flatten(3)


@attrs.frozen(eq=False)
class Operand:
    """What a weight was multiplied by.

    Attributes:
        weight: The weight.
        layout: How the product read it.
        x: What it was multiplied by.
        arguments: Those of a convolution: stride, padding, dilation, output padding.
    """

    weight: Weight
    layout: Layout
    x: Tensor
    arguments: tuple[tuple[int, ...], ...] = ()

    def rows(self) -> Iterator[Tensor]:
        """The inputs of the products, ``(groups, rows, inputs)``, in pieces, in float32."""
        if isinstance(self.layout, Convolved):
            kernel = self.weight.tensor.shape[2:]
            taps = max(1, kernel.numel())
            for part in torch.split(self.x, max(1, _PIECE // max(1, self.x[:1].numel() * taps))):
                yield patches(part.float(), tuple(kernel), self.layout, *self.arguments)
        else:
            x = self.x if self.x.dim() == 3 else self.x.unsqueeze(0)
            yield from (
                part.float() for part in torch.split(x, max(1, _PIECE // max(1, x[:, :1].numel())), 1)
            )


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    layout: Convolved,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    output_padding: tuple[int, ...],
) -> Tensor:
    """What a convolution multiplies its weight by, ``(groups, batch * positions, channels * kernel)``.

    A transposed one is a convolution with the kernel turned round of what it is given, with zeros between.
    """
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    ends = [(p, p) for p in padding]
    if layout.transposed:
        spread = x.new_zeros(
            *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))
        )
        spread[_every(slice(None, None, s) for s in stride)] = x
        x = spread
        pairs = zip(reach, padding, output_padding, strict=True)
        ends = [(r - p, r - p + o) for r, p, o in pairs]
        stride = (1,) * len(stride)
    x = F.pad(x, [end for pair in reversed(ends) for end in pair])
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        at = [
            d * (k - 1 - t if layout.transposed else t) for t, k, d in zip(tap, kernel, dilation, strict=True)
        ]
        cut = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(at, counts, stride, strict=True))
        taps.append(x[_every(cut)])
    stacked = torch.unflatten(torch.stack(taps, 2).flatten(3), 1, (layout.groups, -1))
    return stacked.permute(1, 0, 4, 2, 3).reshape(layout.groups, -1, stacked.shape[2] * stacked.shape[3])


def _every(slices: Iterable[slice]) -> Any:
    """An index of the last axes."""
    return (..., *slices)


class Operands(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which what weights are multiplied by is handed to a function.

    Args:
        weights: The weights; they are seen where their quantizers are disabled.
        see: Gets each operand.
    """

    def __init__(self, weights: Iterable[Weight], see: Callable[[Operand], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._by_memory: dict[int, list[Weight]] = {}
        for weight in weights:
            self._by_memory.setdefault(_memory(weight.tensor), []).append(weight)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
            self._look(left, right, args)
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, read: Tensor, args: tuple[Any, ...]) -> None:
        for weight in self._by_memory.get(_memory(read), ()):
            operand = _operand(weight, x, read, args)
            if operand is not None:
                self._see(operand)


# Where the first of their two operands is.
_PRODUCTS = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::convolution"), 0),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm"), 1),
}


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _operand(weight: Weight, x: Tensor, read: Tensor, args: tuple[Any, ...]) -> Operand | None:
    """The operand, if what was read is the weight, or a matrix of some of its outputs."""
    own = weight.tensor
    if len(args) > 6 and isinstance(args[6], bool):  # a convolution
        if read.shape != own.shape or read.storage_offset() != own.storage_offset():
            return None
        stride, padding, dilation, transposed, output_padding, groups = args[3:9]
        count = own.dim() - 2
        several = (
            tuple(v) * (count if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
        )
        return Operand(weight, Convolved(groups, transposed), x, tuple(several))
    if not own.is_contiguous() or read.dim() != own.dim() or own.dim() < 2:
        return None
    rows, columns = own.shape[-2:]
    steps = read.stride()[-2:]
    offset = read.storage_offset() - own.storage_offset()
    if read.dim() == 3 and (read.shape[0] != own.shape[0] or read.stride(0) != own.stride(0)):
        return None
    length, count = read.shape[-2:]
    if steps == (1, columns) and length == columns and offset % columns == 0:
        return Operand(weight, Multiplied(-1, int(offset // columns), count), x)
    if steps == (columns, 1) and length == rows and 0 <= offset < columns:
        return Operand(weight, Multiplied(-2, int(offset), count), x)
    return None


class Moments:
    """What is known of the inputs of a product, ``(groups, …)``.

    Attributes:
        count: How many rows of inputs there were.
        gram: The sum of ``x xᵀ`` over them, ``(groups, inputs, inputs)``.
        lost: The sum of ``d xᵀ``, with ``d`` what they lack of what they are in float; empty if not known.
        magnitude: The sum of ``|x|``, ``(groups, inputs)``.
        largest: The largest ``|x|``, ``(groups, inputs)``.

    Args:
        rows: How many of them to keep.
        gram: Whether ``gram`` is to be found.
    """

    def __init__(self, rows: int = 0, *, gram: bool = True) -> None:
        self.count = 0
        self.gram: Tensor = torch.empty(0)
        self.lost: Tensor = torch.empty(0)
        self.magnitude: Tensor = torch.empty(0)
        self.largest: Tensor = torch.empty(0)
        self._most, self._has_gram = rows, gram
        self._kept: list[Tensor] = []

    def add(self, operand: Operand, in_float: Operand | None = None) -> None:
        """Takes in an operand.

        Args:
            operand: The operand.
            in_float: What it is in float, if that is known.
        """
        if in_float is not None:
            for x, wanted in zip(operand.rows(), in_float.rows(), strict=True):
                if not self.lost.numel():
                    self.lost = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
                self.lost.baddbmm_((wanted - x).transpose(1, 2), x)
        for x in operand.rows():
            groups, count, inputs = x.shape
            if not self.count:
                self.gram = x.new_zeros(groups, inputs, inputs if self._has_gram else 0)
                self.magnitude, self.largest = x.new_zeros(groups, inputs), x.new_zeros(groups, inputs)
            if not count:
                continue
            self.count += count
            if self._has_gram:
                self.gram.baddbmm_(x.transpose(1, 2), x)
            size = x.abs()
            self.magnitude += size.sum(1)
            self.largest = torch.maximum(self.largest, size.amax(1))
            if self._most:
                # As many of each piece; which is left to chance.
                chosen = torch.randperm(count)[: self._most].to(x.device)
                self._kept.append(x[:, chosen].clone())

    @property
    def rows(self) -> Tensor:
        """Some of the rows."""
        rows = torch.cat(self._kept, 1)
        return rows[:, torch.randperm(rows.shape[1])[: self._most].to(rows.device)]


#: What is known of the inputs of weights, by the name of the weight and by how products read it.
Seen = dict[str, dict[Layout, Moments]]
