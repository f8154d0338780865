"""The integer kernels in what torch's compiler made of a program, by the layers whose weights they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from quantpatch.export.program.capture import CODES, SCALE
from quantpatch.export.program.passes import after_fusing, constant_of
from quantpatch.torch_tools import nn

# Where the arguments of oneDNN's operators are that say what else a kernel does.
_KINDS = {
    "onednn::qconv_pointwise": ("convolution", None, 7, 11),
    "onednn::qconv2d_pointwise.binary": ("convolution", 6, 8, 12),
    "onednn::qlinear_pointwise": ("linear", None, None, 7),
    "onednn::qlinear_pointwise.binary": ("linear", 6, None, 8),
}


@attrs.frozen(eq=False)
class Kernel:
    """An integer kernel.

    Attributes:
        weight: Name of the quantizer of its weight.
        kind: ``"convolution"`` or ``"linear"``.
        result: What it gives: ``"uint8"``, or ``"float32"``.
        fused: What it computes besides: ``"relu"``, ``"sum"``.
        node: The node of the compiler's graph.
    """

    weight: str
    kind: str
    result: str
    fused: tuple[str, ...]
    node: str

    def __str__(self) -> str:
        return ", ".join((self.kind, *self.fused, f"gives {self.result}"))


class Recorder:
    """What the compiler runs after it has fused: it finds kernels, and rewrites what is left.

    Args:
        constants: The program's tensors by name, with those of weights.
    """

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self._constants = constants
        self.kernels: list[Kernel] = []
        self.fused: GraphModule | None = None

    def __call__(self, graph: Graph) -> None:
        """Runs on the compiler's graph."""
        module = graph.owning_module
        assert module is not None
        after_fusing(graph)
        self.kernels = [k for node in graph.nodes if (k := self._kernel(module, node)) is not None]
        copied = Graph()
        copied.output(copied.graph_copy(graph, {}))
        self.fused = GraphModule(module, copied)

    def as_pass(self) -> Any:
        """The same, as the compiler takes it."""
        # Only now: it brings the compiler along, which takes longer to import than torch.
        from torch._inductor.custom_graph_pass import CustomGraphPass

        record = self.__call__

        class Pass(CustomGraphPass):
            def __call__(self, graph: Graph) -> None:
                record(graph)

            def __deepcopy__(self, memo: Any) -> Pass:
                return self  # the compiler copies its options

            def uuid(self) -> Any:
                return None  # it caches nothing of what this pass saw, and so runs it each time

        return Pass()

    def _kernel(self, module: GraphModule, node: Node) -> Kernel | None:
        kind = _KINDS.get(_name(node))
        if kind is None:
            return None
        given = constant_of(module, node.args[4])
        weight = "" if given is None else self._weight(given)
        layer, _, _, at = kind
        rest = node.args[at + 3 :]
        named = [x for x in rest if isinstance(x, str) and x not in ("", "none", "tanh")]
        result = str(node.args[at + 2]).removeprefix("torch.")
        return Kernel(weight, layer, result, tuple(named), node.name)

    def _weight(self, scale: Tensor) -> str:
        names = [name for name in self._constants if name.endswith(f".{SCALE}")]
        same = [name for name in names if self._constants[name].data_ptr() == scale.data_ptr()]
        same = same or [name for name in names if torch.equal(self._constants[name], scale)]
        return same[0].removesuffix(f".{SCALE}") if same else ""


def _name(node: Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    overload = node.target._overloadname
    return f"{node.target._schema.name}.{overload}".removesuffix(".default")


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
        _, other, geometry, at = _KINDS[_name(node)]
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


# --- What there is no kernel for ---------------------------------------------------------------------------


def why_float(layer: nn.Module) -> str | None:
    """Why torch's compiler has no integer kernel for a layer's products, as a clause; None if it has one."""
    without = (
        (_ConvTransposeNd, "transposed convolutions"),
        (nn.Conv3d, "convolutions of volumes"),
        (nn.RNNBase, "recurrent layers"),
        (nn.RNNCellBase, "recurrent layers"),
        (nn.Bilinear, "bilinear layers"),
    )
    for kind, what in without:
        if isinstance(layer, kind):
            return f"PyTorch's compiler has no integer kernel for {what}"
    return None
