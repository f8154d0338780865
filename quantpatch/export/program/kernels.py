"""The integer kernels in what torch's compiler made of a program, by the layers whose weights they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.conv import _ConvTransposeNd

from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.export.program.capture import CODES, SCALE, why_no_operator
from quantpatch.export.program.passes import after_fusing
from quantpatch.export.program.weight_constants import constant_of
from quantpatch.torch_tools import nn

# Where the arguments of oneDNN's operators are that say what else a kernel does.
KINDS = {
    "onednn::qconv_pointwise": ("convolution", None, 7, 11),
    "onednn::qconv2d_pointwise.binary": ("convolution", 6, 8, 12),
    "onednn::qlinear_pointwise": ("linear", None, None, 7),
    "onednn::qlinear_pointwise.binary": ("linear", 6, None, 8),
}


# Those that read weights as integers and compute in floats.
WEIGHT_ONLY = {
    "aten::_weight_int8pack_mm": "linear of 8-bit weights alone",
    "aten::_weight_int4pack_mm_for_cpu": "linear of 4-bit weights alone",
}


@attrs.frozen(eq=False)
class Kernel:
    """An integer kernel.

    Attributes:
        weight: Name of the quantizer of its weight.
        kind: ``"convolution"`` or ``"linear"``, and whether the weights alone are integers.
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
        self.kernels = [k for node in graph.nodes if (k := self._kernel(module, node)) is not None]
        after_fusing(graph)
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
        name = operator_name(node)
        if name in WEIGHT_ONLY:
            weight = self._weight(constant_of(module, node.args[1]), CODES)
            return Kernel(weight, WEIGHT_ONLY[name], dtype_of(node), (), node.name)
        if name not in KINDS:
            return None
        layer, _, _, at = KINDS[name]
        weight = self._weight(constant_of(module, node.args[4]), SCALE)
        named = [x for x in node.args[at + 3 :] if isinstance(x, str) and x not in ("", "none", "tanh")]
        result = str(node.args[at + 2]).removeprefix("torch.")
        return Kernel(weight, layer, result, tuple(named), node.name)

    def _weight(self, tensor: Tensor | None, end: str) -> str:
        """The quantizer of the weight that a tensor belongs to; freezing may have copied it."""
        if tensor is None:
            return ""
        names = [name for name in self._constants if name.endswith(f".{end}")]
        same = [name for name in names if self._constants[name].data_ptr() == tensor.data_ptr()]
        same = same or [name for name in names if torch.equal(self._constants[name], tensor)]
        return same[0].removesuffix(f".{end}") if same else ""


def operator_name(node: Node) -> str:
    """The name of a node's operator with its overload, ``"onednn::qlinear_pointwise.binary"``."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    overload = node.target._overloadname
    return f"{node.target._schema.name}.{overload}".removesuffix(".default")


def dtype_of(node: Node) -> str:
    """The type of a node's values, ``"bfloat16"``."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def layers_on_integers(
    found: Sequence[ExportedQuantizer], recorder: Recorder, reasons: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The layers that run on integers, and why the others do not.

    Args:
        found: The model's quantizers.
        recorder: Has the kernels.
        reasons: Why weights are read as floats, by the names of their quantizers, where that is known; and
            why products of activations are, by theirs.
    """
    kernels: dict[str, str] = {}
    for kernel in recorder.kernels:  # of a weight in parts, there is one for each
        kernels.setdefault(kernel.weight.partition("[")[0], str(kernel))
    quantized = {id(operand.layer) for operand in found if operand.weight is None}
    weights = [operand for operand in found if operand.weight is not None]
    count = Counter(id(operand.layer) for operand in weights)
    integers: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for operand in weights:
        layer = operand.name.rpartition(".")[0]
        # Attention has several weights, each with a kernel of its own, or none.
        name = layer if layer and count[id(operand.layer)] == 1 else operand.name.removesuffix("_quantizer")
        if operand.name in kernels:
            integers[name] = kernels[operand.name]
        else:
            why = why_float(operand.layer) if operand.layer is not None else None
            why = why or reasons.get(operand.name) or why_no_operator(operand)
            if why is None and id(operand.layer) not in quantized:
                why = "its input is float, and integer kernels take integers on both sides"
            skipped[name] = why or "the compiler found no kernel for how its operands are computed"
    names = {operand.name for operand in found}
    return integers, skipped | {name: why for name, why in reasons.items() if name not in names}


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
