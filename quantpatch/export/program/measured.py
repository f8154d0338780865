"""How long a lowered model takes, beside the same model compiled in float and in bfloat16."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.export.program.build import Build
from quantpatch.export.program.report import CompiledLatency
from quantpatch.layers.quantizer import in_float
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.progress import Bar

_SECONDS, _ROUNDS, _LEAST = 0.5, 50, 5


def measure(
    model: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    shown: Bar,
) -> CompiledLatency:
    """Latencies, measured in turn, so that what else the machine does counts for all."""
    shown.step("compiling it in float, to measure beside")
    with in_float(model):
        calls = [
            (run, args, kwargs),
            (Build(model, args, kwargs, [], dynamic_shapes).in_memory(), args, kwargs),
        ]
        try:
            half = copy.deepcopy(model).to(torch.bfloat16)
            few, named = pytree.tree_map(_as_bfloat16, (args, dict(kwargs)))
            calls.append((Build(half, few, named, [], dynamic_shapes).in_memory(), few, named))
        except Exception:  # a model may not be copied, or not run in bfloat16: then that is not measured
            del calls[2:]
    shown.step("measuring")
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    with torch.no_grad():
        for call, given, named in calls:
            call(*given, **named)
        for done in range(_ROUNDS):
            if done >= _LEAST and time.perf_counter() - start > _SECONDS * len(calls):
                break
            for (call, given, named), taken in zip(calls, times, strict=True):
                before = time.perf_counter()
                call(*given, **named)
                taken.append(time.perf_counter() - before)
    medians = [1e3 * statistics.median(taken) for taken in times]
    return CompiledLatency(medians[0], medians[1], medians[2] if len(medians) > 2 else None)


def _as_bfloat16(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x
