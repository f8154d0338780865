"""Modules that ``torch.fx`` takes as they are.

Its tracer goes into every module that is not of ``torch.nn``, with stand-ins for tensors that cannot be
computed with. A quantized layer is to be one node of the graph, as the float layer is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, fx

Forward = TypeVar("Forward", bound=Callable[..., Any])


def leaf_in_fx(forward: Forward) -> Forward:
    """Makes a module's forward a ``call_module`` node wherever ``torch.fx`` traces it inside a model."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if type(x) is Tensor:
                continue
            first = x[0] if type(x) in (tuple, list) and x else x
            tracer: Any = first.tracer if isinstance(first, fx.Proxy) else None
            if tracer is not None and tracer.root is not self:
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]
