"""Weights that transformers ties, by patterns on names: no range is among them.

``"predictions.decoder.weight"``, searched for, is found in ``"predictions.decoder.weight_quantizer._amax"``,
too, and ``"class_embed.1"`` ties all that is below it. A range is its own layer's, whatever weight that has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import quantpatch as qp

__all__ = ["leave_ranges_untied"]


class _WithoutRanges:
    """A model as transformers sees it while it looks for the names of what it ties."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        modules = model.named_modules(remove_duplicate=False)
        self._quantizers = {name for name, module in modules if isinstance(module, qp.TensorQuantizer)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self._kept(self._model.named_parameters(*args, **kwargs))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self._kept(self._model.named_buffers(*args, **kwargs))

    def _kept(self, named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        return ((name, each) for name, each in named if name.rpartition(".")[0] not in self._quantizers)


def leave_ranges_untied() -> None:
    """Has transformers look for what it ties among the tensors of the float model, from now on."""
    known: Any = PreTrainedModel.get_expanded_tied_weights_keys
    expand = getattr(known, "__wrapped__", known)  # this module may be loaded anew

    @functools.wraps(expand)
    def get_expanded_tied_weights_keys(self: Any, *args: Any, **kwargs: Any) -> Any:
        return expand(_WithoutRanges(self), *args, **kwargs)

    PreTrainedModel.get_expanded_tied_weights_keys = get_expanded_tied_weights_keys  # type: ignore[method-assign]
