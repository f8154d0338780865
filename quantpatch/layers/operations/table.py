"""The operations of which a forward can have its operands quantized, and how code spells them."""

from __future__ import annotations

import dis
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch.nn import functional as F

from quantpatch.errors import UnknownNameError
from quantpatch.recipes.descriptor import Axis

#: Names of the operands to quantize, by operation; None leaves an operand float.
Operations = Mapping[Callable[..., Any], tuple[str | None, ...]]

#: What a user asks for: every operation that multiplies.
PRODUCTS = "products"


@attrs.frozen
class Operand:
    """An operand of an operation.

    Attributes:
        role: What it is called.
        channels: The axis of the output channels, where the operand is a weight.
        summed: The axis that products sum over, which formats in blocks run along; None: that of a layer's
            features.
    """

    role: str
    channels: Axis = None
    summed: int | None = None


@attrs.frozen
class Operation:
    """An operation, by whatever function of torch's.

    Attributes:
        name: What rules and quantizers call it.
        operands: Its operands, by position of the argument; None for one that is not multiplied.
        multiplies: Whether it is one of the ``"products"``.
        of_result: Whether its result is quantized, instead of its operands.
        equation: Which argument says how it multiplies, the first or the last: 0 or -1.
    """

    name: str
    operands: tuple[Operand | None, ...]
    multiplies: bool = True
    of_result: bool = False
    equation: int | None = None


_LEFT, _RIGHT = Operand("left", -2, -1), Operand("right", -1, -2)
_TWO = (Operand("left"), Operand("right"))
_MATMUL = Operation("matmul", (_LEFT, _RIGHT))
_ADDED_MATMUL = Operation("matmul", (None, _LEFT, _RIGHT))


def _convolution(name: str, axes: int, channels: int) -> Operation:
    return Operation(name, (Operand("input", None, -1 - axes), Operand("weight", channels, 1 - channels)))


ATTENTION = Operation(
    "attention",
    (
        Operand("query", -2, -1),
        Operand("key", -2, -1),
        Operand("value", -1, -2),
        Operand("probabilities", None, -1),  # which no argument holds
    ),
)
_FACTORS = (*_TWO, Operand("operand_2"), Operand("operand_3"))
EINSUM = Operation("einsum", (None, *_FACTORS), equation=0)

#: By the function that code calls.
TABLE: dict[Callable[..., Any], Operation] = {
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.linalg.matmul), _MATMUL),
    **dict.fromkeys((torch.dot, torch.vdot, torch.inner, torch.tensordot), Operation("matmul", _TWO)),
    **dict.fromkeys((torch.addmm, torch.addmv, torch.baddbmm, torch.addbmm), _ADDED_MATMUL),
    torch.einsum: EINSUM,
    F.linear: Operation("linear", (Operand("input", None, -1), Operand("weight", 0, 1))),
    F.bilinear: Operation("bilinear", (Operand("input1"), Operand("input2"), Operand("weight", 0, 1))),
    **{getattr(F, f"conv{n}d"): _convolution(f"conv{n}d", n, 0) for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): _convolution(f"conv_transpose{n}d", n, 1) for n in (1, 2, 3)},
    torch.conv_tbc: Operation("conv_tbc", (Operand("input"), Operand("weight", 2, 1))),
    torch.cdist: Operation("cdist", _TWO),
    F.scaled_dot_product_attention: ATTENTION,
    torch.add: Operation("add", _TWO, multiplies=False),
    torch.sub: Operation("sub", _TWO, multiplies=False),
    torch.mul: Operation("mul", _TWO, multiplies=False),
    torch.div: Operation("div", _TWO, multiplies=False),
    **dict.fromkeys((torch.cat, torch.concat), Operation("cat", (Operand("tensors"),), multiplies=False)),
    torch.stack: Operation("stack", (Operand("tensors"),), multiplies=False),
    **dict.fromkeys(
        (torch.softmax, F.softmax),
        Operation("softmax", (Operand("output"),), multiplies=False, of_result=True),
    ),
}
for _name in ("_grouped_mm",):
    if hasattr(torch, _name):
        TABLE[getattr(torch, _name)] = _MATMUL
if hasattr(F, "grouped_mm"):
    TABLE[F.grouped_mm] = _MATMUL

#: Functions of other packages, which need not be installed, by module and name.
_OF_OTHERS = {
    ("einops", "einsum"): Operation("einsum", _FACTORS, equation=-1),
    ("opt_einsum", "contract"): EINSUM,
}

#: Names of operations, each with whether it multiplies.
NAMES: dict[str, bool] = {operation.name: operation.multiplies for operation in TABLE.values()}

#: Operators of Python, each with the function that it stands for.
OPERATORS = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mult": torch.mul,
    "Div": torch.div,
    "MatMult": torch.matmul,
}


def quantizer_name(operand: str) -> str:
    """Name of the submodule that quantizes an operand."""
    return f"{operand}_quantizer"


def spelling(operation: Callable[..., Any]) -> str:
    """The name of a function, for messages and for tensors' methods."""
    return getattr(operation, "__name__", str(operation))


def table() -> dict[Callable[..., Any], Operation]:
    """Every function that is an operation, those of other packages that have been imported among them."""
    found = {getattr(sys.modules.get(module), name, None): op for (module, name), op in _OF_OTHERS.items()}
    return TABLE | {function: operation for function, operation in found.items() if function is not None}


def named(names: Iterable[str]) -> frozenset[str]:
    """Names of operations, with those that ``"products"`` stands for.

    Raises:
        UnknownNameError: There is no such operation.
    """
    found: set[str] = set()
    for name in names:
        if name != PRODUCTS and name not in NAMES:
            raise UnknownNameError.of("operation", name, [PRODUCTS, *NAMES])
        found |= {n for n, multiplies in NAMES.items() if multiplies} if name == PRODUCTS else {name}
    return frozenset(found)


class Wanted:
    """The operations that are looked for in a class, and how their operands are called.

    Args:
        operations: Each function with its operation.
        names: Names for operands, by function, from an author; those of others are made of the operation's
            name, its number, and the operand's role: ``matmul_0_left``.
    """

    def __init__(self, operations: Mapping[Callable[..., Any], Operation], names: Operations) -> None:
        self.operations = operations
        self.operands: dict[str, Operand] = {}
        self._names = names
        self._places: dict[Any, int] = {}
        self._aliases: dict[Any, Callable[..., Any]] = {}
        self._methods: dict[str, Callable[..., Any]] = {}
        for function in operations:
            name = spelling(function)
            self._aliases[function] = function
            for method in (name, f"{name}_", f"__{name}__"):
                if hasattr(torch.Tensor, method):
                    self._methods.setdefault(method, function)
                    self._aliases[getattr(torch.Tensor, method)] = function
            if function in OPERATORS.values():
                spelled = "truediv" if function is torch.div else name
                for form in (spelled, f"i{spelled}"):
                    self._aliases[getattr(operator, form)] = function
        self._hints = {*map(spelling, operations), *self._methods}

    @classmethod
    def declared(cls, names: Operations) -> Wanted:
        """Those that the author of a replacement declares, functions of a package's own among them."""
        known = {function: _declared(function, given) for function, given in names.items()}
        return cls(known, names)

    @classmethod
    def of(cls, operations: Operations | str) -> Wanted:
        """Those of a replacement: what its author declares, or a name, such as ``"products"``."""
        return cls.by_name([operations]) if isinstance(operations, str) else cls.declared(operations)

    @classmethod
    def by_name(cls, names: Iterable[str]) -> Wanted:
        """Those that a user asks for."""
        chosen = named(names)
        return cls({function: op for function, op in table().items() if op.name in chosen}, {})

    def called(self, function: Any) -> Callable[..., Any] | None:
        """The operation that a function is a spelling of."""
        try:
            return self._aliases.get(function)
        except TypeError:  # it has no hash
            return None

    def method(self, name: str) -> Callable[..., Any] | None:
        """The operation that a tensor's method is a spelling of."""
        return self._methods.get(name)

    def operator(self, kind: str) -> Callable[..., Any] | None:
        """The operation that an operator is a spelling of."""
        function: Any = OPERATORS.get(kind)
        return function if function in self.operations else None

    def is_named(self, function: Callable[..., Any]) -> bool:
        """Whether an author has named its operands: activations, wherever they come from."""
        return function in self._names

    def hinted(self, code: types.CodeType) -> bool:
        """Whether a function's code has an operator, or a name, that may be one of the operations."""
        if not self._hints.isdisjoint(code.co_names):
            return True
        return any(
            (operator := _operator_of(instruction)) is not None and OPERATORS[operator] in self.operations
            for instruction in dis.get_instructions(code)
        )

    def place(self, function: Callable[..., Any], given: Iterable[int]) -> list[tuple[int, str, Operand]]:
        """One more place of an operation: the arguments to quantize, each with its name.

        Args:
            function: The operation's function.
            given: Positions of the arguments that stand there.
        """
        operation, names = self.operations[function], self._names.get(function)
        key = operation.name if names is None else function
        number = self._places[key] = self._places.get(key, -1) + 1
        present = set(given)
        found: list[tuple[int, str, Operand]] = []
        for position, operand in enumerate(operation.operands):
            hidden = operation.of_result or (function is F.scaled_dot_product_attention and position == 3)
            if operand is None or not (hidden or position in present):
                continue
            if names is None:
                name = f"{operation.name}_{number}_{operand.role}"
            else:
                name = operand.role if not number else f"{operand.role}_{number}"
            found.append((position, name, operand))
            self.operands[name] = operand
        return found


_SYMBOLS = {"+": "Add", "-": "Sub", "*": "Mult", "/": "Div", "@": "MatMult"}
_NAMES_BEFORE_311 = {
    "ADD": "Add",
    "SUBTRACT": "Sub",
    "MULTIPLY": "Mult",
    "TRUE_DIVIDE": "Div",
    "MATRIX_MULTIPLY": "MatMult",
}


def _operator_of(instruction: dis.Instruction) -> str | None:
    """The operator that an instruction computes, as ``OPERATORS`` calls it."""
    if instruction.opname == "BINARY_OP":
        return _SYMBOLS.get(instruction.argrepr.removesuffix("="))
    _, _, name = instruction.opname.partition("_")
    return _NAMES_BEFORE_311.get(name)


def _declared(function: Callable[..., Any], names: tuple[str | None, ...]) -> Operation:
    """An operation whose operands an author names."""
    known = TABLE.get(function)
    operands: list[Operand | None] = []
    for position, name in enumerate(names):
        base = known.operands[position] if known is not None and position < len(known.operands) else None
        operands.append(None if name is None else Operand(name, None, base.summed if base else None))
    if function is F.scaled_dot_product_attention:
        return Operation("attention", (*operands, *[None] * (4 - len(operands))))
    return Operation(spelling(function), tuple(operands), of_result=bool(known and known.of_result))
