"""A lowered model held against the model: its results, and the integers of each of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from quantpatch.export.program.build import Build
from quantpatch.export.program.capture import CODES
from quantpatch.export.program.kernels import KINDS, Kernel, Recorder, operator_name
from quantpatch.export.program.report import LoweringComparison
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.random_inputs import random_like


def compare(
    model: nn.Module, run: Callable[..., Any], built: Build, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LoweringComparison:
    """A lowered model's results beside the model's, on its arguments and on random ones."""
    largest = relative = 0.0
    count = within = 0
    checked = KernelCheck()
    not_random = ""
    for index, (given, named) in enumerate(((args, dict(kwargs)), random_like(args, kwargs))):
        with torch.no_grad():
            try:
                expected = _tensors(model(*given, **named))
            except Exception as error:
                if not index:
                    raise
                not_random = f"the model takes no others ({type(error).__name__})"
                break
            results = _tensors(run(*given, **named))
            if not index:
                checked = check_kernels(built.recorder, built.constants, [*built.inputs.flat(given, named)])
        for ours, theirs in zip(expected, results, strict=True):
            size = ours.abs().max().item() if ours.numel() else 0.0
            off = (ours - theirs).abs().masked_fill((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0)
            if off.numel():
                largest = max(largest, off.max().item())
                relative = max(relative, off.max().item() / max(size, 1e-30))
            count += off.numel()
            within += int((off <= 1.001 * size / 127).sum())
    return LoweringComparison(
        largest,
        relative,
        within / count if count else 1.0,
        checked.integers,
        checked.differing,
        checked.furthest,
        not_random,
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return [x.detach().double() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


# --- The integers of kernels ------------------------------------------------------------------------------


@attrs.frozen
class KernelCheck:
    """How the integers of kernels compare with what the model's arithmetic makes of the same inputs.

    Attributes:
        integers: How many were compared.
        differing: How many differ.
        furthest: By how many steps at most.
    """

    integers: int = 0
    differing: int = 0
    furthest: int = 0


def check_kernels(recorder: Recorder, constants: Mapping[str, Tensor], inputs: list[Any]) -> KernelCheck:
    """Each kernel that gives integers, against the model's own arithmetic on the very integers it got.

    Args:
        recorder: Has the compiler's graph, and the kernels in it.
        constants: The program's tensors by name.
        inputs: Those of the compiled function.
    """
    if recorder.fused is None:
        return KernelCheck()
    runner = _Checking(recorder.fused, {k.node: k for k in recorder.kernels if k.weight}, constants)
    with torch.no_grad():
        runner.run(*inputs)
    return KernelCheck(runner.integers, runner.differing, runner.furthest)


class _Checking(Interpreter):
    """Runs a graph, and compares kernels on the way."""

    def __init__(
        self, module: GraphModule, kernels: Mapping[str, Kernel], constants: Mapping[str, Tensor]
    ) -> None:
        super().__init__(module)
        self._kernels = kernels
        self._constants = constants
        self.integers = self.differing = self.furthest = 0

    def run_node(self, n: Node) -> Any:
        kernel = self._kernels.get(n.name)
        if kernel is None or kernel.result != "uint8":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        expected = self._expected(n, kernel, args)  # first: a sum is computed in place
        result = super().run_node(n)
        off = (expected.int() - result.int()).abs()
        self.integers += off.numel()
        self.differing += int((off != 0).sum())
        self.furthest = max(self.furthest, int(off.max()))
        return result

    def _expected(self, node: Node, kernel: Kernel, args: tuple[Any, ...]) -> Tensor:
        _, other, geometry, at = KINDS[operator_name(node)]
        x = (args[0].float() - args[2]) * args[1]
        weight = self._constants[f"{kernel.weight}.{CODES}"].float()
        scale = args[4].reshape([-1, *[1] * (weight.dim() - 1)])
        bias = args[6 if other is None else 7]
        if geometry is None:
            y = F.linear(x, weight * scale, bias)
        else:
            stride, padding, dilation, groups = args[geometry : geometry + 4]
            y = torch.convolution(
                x, weight * scale, bias, stride, padding, dilation, False, [0] * len(stride), groups
            )
        rest = args[at + 3 :]
        if other is not None:
            added = args[other]
            y = y + ((added.float() - rest[1]) * rest[0] if added.dtype == torch.uint8 else added)
            rest = rest[4:]
        y = _ACTIVATIONS[rest[0]](y, rest[1], rest[2])
        codes: Tensor = (y / args[at]).round().add(args[at + 1]).clamp(0, 255)
        return codes


_ACTIVATIONS: dict[str, Callable[[Tensor, Any, str], Tensor]] = {
    "none": lambda y, bounds, how: y,
    "relu": lambda y, bounds, how: F.relu(y),
    "hardtanh": lambda y, bounds, how: y.clamp(*bounds),
    "hardswish": lambda y, bounds, how: F.hardswish(y),
    "swish": lambda y, bounds, how: F.silu(y),
    "gelu": lambda y, bounds, how: F.gelu(y, approximate=how or "none"),
}
