"""How far a model's outputs are from what they were in float."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.errors import ArgumentError
from quantpatch.torch_tools.forward import as_batch, as_batches, run_batch, unwrapped

_CALLS = 16  # of a model in an evaluation, that are kept for batches


def demand_batches(data: Any) -> list[Any]:
    """The batches that a user gave, to go over them again and again.

    Raises:
        ArgumentError: There is none.
        ArgumentTypeError: They are not batches.
    """
    batches = list(as_batches(data))
    if not batches:
        raise ArgumentError("data holds no batch, so there is nothing to find ranges from", data=data)
    return batches


class Calls:
    """A block that keeps what a model is called with, as batches; the first calls only.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.batches: list[Any] = []

    def __enter__(self) -> Calls:
        self._handle = self._model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.batches) == _CALLS:
            return
        self.batches.append(as_batch(model, args, kwargs))


class Outputs:
    """What a model gives for batches now, to compare with what it gives later.

    Args:
        model: The model, in float and in eval mode.
        batches: What to run it on.

    Raises:
        ArgumentError: It gives no tensor of floating-point numbers, or what it gives is not finite.
        InputError: The batches are on another device.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model, self._batches = unwrapped(model), batches
        self._reference = [list(self._of(batch)) for batch in batches]
        leaves = [leaf for given in self._reference for leaf in given]
        name = type(model).__name__
        if not leaves:
            raise ArgumentError(
                f"{name} gives no tensor of floating-point numbers for the data, so how far it is from float "
                f"is unknown; let its forward return one",
                model=model,
            )
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            raise ArgumentError(f"{name} gives NaN or infinity for the data, in float", data=batches)

    def _of(self, batch: Any) -> Iterator[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that what draws numbers draws the same each time
            for leaf in tree_leaves(run_batch(self._model, batch)):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    yield leaf.detach()

    def noise(self, most: int | None = None) -> float:
        """The power of the difference by that of the float outputs: a mean over the outputs that there are.

        Args:
            most: How many batches to run at most; default: all.
        """
        signal: dict[int, float] = {}
        difference: dict[int, float] = {}
        for batch, reference in zip(self._batches[:most], self._reference, strict=False):
            for n, (f, q) in enumerate(_pairs(reference, self._of(batch))):
                f, q = f.double(), q.double()
                signal[n] = signal.get(n, 0.0) + f.square().sum().item()
                difference[n] = difference.get(n, 0.0) + (f - q).square().sum().item()
        ratios = [_ratio(difference[n], signal[n]) for n in signal]
        return math.fsum(ratios) / len(ratios) if ratios else 0.0


def _pairs(reference: list[Tensor], now: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    given = list(now)
    if [f.shape for f in reference] != [q.shape for q in given]:
        raise ArgumentError(
            f"the model gives outputs of shapes {[tuple(q.shape) for q in given]} quantized and "
            f"{[tuple(f.shape) for f in reference]} in float, which cannot be compared",
            model=None,
        )
    return zip(reference, given, strict=True)


def _ratio(difference: float, signal: float) -> float:
    if math.isnan(difference):
        return math.inf
    if signal:
        return difference / signal
    return math.inf if difference else 0.0
