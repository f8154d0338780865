"""What a model computed, as a graph of operators and the values that go from one to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import nn

from quantpatch.dataflow.macs import Product

#: Operators that normalize a batch.
BATCHNORM = frozenset(
    f"aten::{name}"
    for name in (
        "batch_norm",
        "cudnn_batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
    )
)


@attrs.define(eq=False)
class Value:
    """What a tensor holds until it is written over.

    Attributes:
        shape: Of the tensor.
        stride: Of the tensor; empty where it has none.
        is_floating_point: Whether it holds such numbers.
        maker: The operator it comes from; None for inputs and parameters.
        uses: The operators it goes into.
        outputs_of: Names of the modules whose output it is, the innermost first.
        parameter: Qualified name of the parameter of the model that it is, or None.
        is_constant: Whether it is a parameter or a buffer of the model.
        is_result: Whether the model returns it.
    """

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    is_floating_point: bool = True
    maker: Operator | None = None
    uses: list[Operator] = attrs.field(factory=list)
    outputs_of: list[str] = attrs.field(factory=list)
    parameter: str | None = None
    is_constant: bool = False
    is_result: bool = False


@attrs.define(eq=False)
class Operator:
    """An operator that ran; a quantizer that quantizes counts as one.

    Attributes:
        name: Such as ``"aten::convolution"``; ``"quantizer"`` for a quantizer.
        module: Name of the innermost module of the model that ran it, quantizers left out.
        stack: All modules that were running, quantizers left out, the innermost last.
        inputs: The tensors among its arguments.
        outputs: What it gave.
        args: Its arguments; None in the place of each that is a tensor, or a list of them.
        kwargs: Its keyword arguments, but for tensors.
        written: Tensors that were there before and lie in memory that it wrote to, beside its outputs: each
            before and after.
        products: What it multiplies.
        quantizer: The quantizer, for one.
    """

    name: str
    module: str
    stack: tuple[nn.Module, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = attrs.field(factory=dict)
    written: tuple[tuple[Value, Value], ...] = ()
    products: tuple[Product[Value], ...] = ()
    quantizer: Any = None


@attrs.define
class Dataflow:
    """The graph.

    Attributes:
        operators: In the order they ran. What runs inside a quantizer is not among them.
        calls: How often each module ran, by name.
        quantized: What each quantizer was given, call by call, whether it is switched on or not.
        elsewhere: Modules that ran in other threads meanwhile, of which nothing else is noted.
    """

    operators: list[Operator] = attrs.field(factory=list)
    calls: Counter[str] = attrs.field(factory=Counter)
    quantized: dict[Any, list[Value]] = attrs.field(factory=dict)
    elsewhere: set[str] = attrs.field(factory=set)

    def named(self, *names: str) -> Iterator[Operator]:
        """The operators of these names (``"add"``), in-place ones (``"add_"``) too."""
        wanted = {f"aten::{name}{end}" for name in names for end in ("", "_")}
        return (operator for operator in self.operators if operator.name in wanted)
