"""How long a lowered model takes, beside the same model compiled in float and in bfloat16."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.export.program.build import Build
from quantpatch.export.program.report import CompiledLatency
from quantpatch.layers.quantizer import in_float
from quantpatch.reports.latency import medians
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.progress import Bar


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
    calls = [(run, args, kwargs), *compiled_floats(model, args, kwargs, dynamic_shapes)]
    shown.step("measuring")
    with torch.no_grad():
        found = medians([functools.partial(call, *given, **named) for call, given, named in calls])
    return CompiledLatency(found[0], found[1], found[2] if len(found) > 2 else None)


def compiled_floats(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> list[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]]:
    """The model compiled in float and in bfloat16, as ``lower`` compiles it: what to call, and with what.

    Without the second where the model cannot be copied, or does not run in bfloat16.
    """
    with in_float(model):
        calls = [(Build(model, args, kwargs, [], dynamic_shapes).in_memory(), args, kwargs)]
        with contextlib.suppress(Exception):
            half = copy.deepcopy(model).to(torch.bfloat16)
            few, named = pytree.tree_map(_as_bfloat16, (args, dict(kwargs)))
            calls.append((Build(half, few, named, [], dynamic_shapes).in_memory(), few, named))
    return calls


def _as_bfloat16(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x
