"""What layers compute through while a model is exported, as long as a block says so.

An exporter has quantizers compute through operators that it can write, and recurrent layers step by step
where its target has no operator for them. Layers ask for what is in force here, so that nothing is put into
them: an error leaves nothing behind, and another thread that runs the model meanwhile computes as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class Lowering:
    """What some layers compute through.

    Args:
        quantizers: By quantizer, what gives its result in the place of its own forward.
        in_steps: Recurrent layers that run step by step.
    """

    def __init__(
        self, quantizers: Mapping[nn.Module, Callable[[Tensor], Tensor]], in_steps: Iterable[nn.Module] = ()
    ) -> None:
        self._forwards = {id(vars(quantizer)): forward for quantizer, forward in quantizers.items()}
        self._in_steps = {id(vars(layer)) for layer in in_steps}
        self._alive = [*quantizers, *in_steps]  # so that no other object gets the place of one

    # torch.export calls layers on objects of its own that share their ``__dict__``.

    def forward_of(self, quantizer: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What a quantizer computes through; None if that is its own forward."""
        return self._forwards.get(id(vars(quantizer)))

    def runs_in_steps(self, layer: Any) -> bool:
        """Whether a recurrent layer runs step by step."""
        return id(vars(layer)) in self._in_steps


_IN_FORCE: ContextVar[Lowering | None] = ContextVar("quantpatch lowering", default=None)


def lowering() -> Lowering | None:
    """What is in force here, if anything is; torch.compile, which is not an exporter, never sees any."""
    # The compiler takes the first for a constant, and cannot follow a context variable in all releases.
    return None if torch.compiler.is_dynamo_compiling() else _IN_FORCE.get()


@contextlib.contextmanager
def lowered(what: Lowering) -> Iterator[None]:
    """A block, of this thread or task, in which some layers compute through something else."""
    token = _IN_FORCE.set(what)
    try:
        yield
    finally:
        _IN_FORCE.reset(token)
