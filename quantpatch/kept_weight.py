"""A weight's quantized values, kept until anything that they depend on changes.

In eval mode a weight is quantized in every forward pass and comes out the same. What was computed once is
used again as long as the weight, the range and the settings are seen to be what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KeptWeight", "Snapshot"]

_PROBED = 32  # elements


class Snapshot:
    """Tells whether a tensor holds what it held when this was made, without reading all of it."""

    __slots__ = ("alias", "layout", "probed", "tensor", "values", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version
        # Shares the memory, and so keeps its address from being given to another tensor: an address that
        # is the same then means memory that is the same, also after `tensor.data = ...`.
        self.alias = tensor.detach()
        self.layout = self._layout(tensor)
        self.probed = self._probed(self.alias)
        self.values = None if self.probed is None else self.probed.clone()

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, on the same memory, and nothing of it was seen to change."""
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and self._layout(tensor) == self.layout
            and (self.probed is None or torch.equal(self.probed, self.values))  # type: ignore[arg-type]
        )

    @staticmethod
    def _layout(tensor: Tensor) -> tuple[object, ...]:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    @staticmethod
    def _probed(tensor: Tensor) -> Tensor | None:
        """A view of some elements, evenly spaced in memory; None where looking at them is not cheap."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        step = max(1, span // (_PROBED - 1))
        return tensor.as_strided((span // step + 1,), (step,))


class KeptWeight:
    """A weight's quantized values, and all that they depend on."""

    __slots__ = ("amax", "quantized", "settings", "weight")

    def __init__(self, quantized: Tensor, weight: Tensor, amax: Tensor | None, settings: object) -> None:
        self.quantized = quantized
        self.weight = Snapshot(weight)
        self.amax = None if amax is None else Snapshot(amax)
        self.settings = settings

    def is_of(self, weight: Tensor, amax: Tensor | None, settings: object) -> bool:
        """Whether quantizing this weight by this range and these settings would give the same again."""
        if self.settings is not settings or not self.weight.holds(weight):
            return False
        if amax is None or self.amax is None:
            return amax is None and self.amax is None
        return self.amax.holds(amax)
