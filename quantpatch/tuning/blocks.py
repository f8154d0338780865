"""Weights of a model looked at block by block, each with all before it as they have become.

A block is an element of the outermost list of modules around a layer, such as one of a transformer, or else
of the innermost sequence. Runs of the model wait at each block (``torch_tools/paused.py``), so that a model
runs about twice, however many blocks it has, and what is held is what one block is given. Where data is a
function, and for blocks that are entered more than once in a run, or whose weights are used elsewhere too,
the model is run anew up to the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from quantpatch.layers.quantizer import in_float, named_quantizers
from quantpatch.torch_tools.paused import Call, PausedRun, PausedRuns
from quantpatch.torch_tools.progress import Bar
from quantpatch.tuning.operands import Moments, Operand, Operands, Seen
from quantpatch.tuning.weights import Weight

if TYPE_CHECKING:
    from quantpatch.tuning.tuning import Tuning


class Block:
    """The weights of one block.

    Attributes:
        name: Of the module.
        parts: Those of it that are looked at, in the order they are used; those together that multiply the
            same.
    """

    def __init__(self, name: str, parts: list[list[Weight]], blocks: Blocks) -> None:
        self.name, self.parts = name, parts
        self._blocks = blocks

    @property
    def weights(self) -> list[Weight]:
        """All of them."""
        return [weight for part in self.parts for weight in part]

    def moments(self, part: list[Weight] | None = None, *, rows: int = 0, gram: bool = True) -> Seen:
        """What is known of the inputs of weights, which are not quantized while that is found out.

        Args:
            part: One of the parts; those behind it are not quantized either. Default: all.
            rows: How many of the inputs to keep, of each.
            gram: Whether the sum of ``x xᵀ`` is to be found.
        """
        weights = self.weights
        part = weights if part is None else part
        return self._blocks.moments(self, part, weights[weights.index(part[0]) :], rows, gram)


class Blocks:
    """The blocks that weights are in, in the order they are used; a context manager that gives them.

    Args:
        tuning: The tuning.
        weights: The weights, by name, in the order they are used.
        in_float: Whether nothing is quantized while they are looked at.
        beside_float: Whether it is to be known what inputs lack of what they are in float, where it can be.
    """

    def __init__(
        self, tuning: Tuning, weights: Mapping[str, Weight], *, in_float: bool, beside_float: bool
    ) -> None:
        self._tuning, self._model, self._in_float = tuning, tuning.model, in_float
        self._groups: dict[str, list[list[Weight]]] = {}
        for name, weight in weights.items():
            parts = self._groups.setdefault(tuning.block_of(name), [])
            if not parts or not tuning.fed_alike(parts[-1][-1].name, name):
                parts.append([])
            parts[-1].append(weight)
        self._stack = contextlib.ExitStack()
        self._runs: PausedRuns | None = None
        self._float_runs: PausedRuns | None = None
        self._float_weights = list(tuning.rounded_before)
        self._beside_float = beside_float

    def __enter__(self) -> Iterator[Block]:
        stops = [self._model.get_submodule(name) for name in self._groups if self._tuning.can_wait_at(name)]
        with contextlib.ExitStack() as stack:
            if stops:
                self._runs = stack.enter_context(self._tuning.paused_runs(stops))
            if stops and self._beside_float:
                self._float_runs = stack.enter_context(self._tuning.paused_runs(stops))
            bar = stack.enter_context(self._tuning.bar(len(self._groups)))
            self._stack = stack.pop_all()
        return self._each(bar)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _each(self, bar: Bar) -> Iterator[Block]:
        for name, parts in self._groups.items():
            bar.step(name or "the model")
            self._tuning.seed_block(name)
            block, module = Block(name, parts, self), self._model.get_submodule(name)
            floats = self._float_runs
            if floats is not None:
                with in_float(self._model), self._as_in_float():  # through the block before
                    floats.waiting_at(module)
                self._float_weights = [_with_copy(weight.tensor) for weight in block.weights]
            yield block
            for runs in (self._runs, floats):
                if runs is not None:
                    runs.pass_(module)
            self._tuning.keep_block()
            bar.advance()

    def moments(
        self, block: Block, part: list[Weight], unrounded: list[Weight], rows: int, gram: bool
    ) -> Seen:
        """See ``Block.moments``."""
        tuning = self._tuning
        module = self._model.get_submodule(block.name)
        seen: Seen = {weight.name: {} for weight in part}

        def add(operand: Operand, wanted: Operand | None = None) -> None:
            by_layout = seen[operand.weight.name]
            if operand.layout not in by_layout:
                by_layout[operand.layout] = Moments(rows, gram=gram)
            by_layout[operand.layout].add(operand, wanted)

        with in_float(self._model) if self._in_float else contextlib.nullcontext(), disabled(unrounded):
            waiting = [] if self._runs is None else self._runs.waiting_at(module)
            if not waiting:
                ran = tuning.until_all(seen)

                def see(operand: Operand) -> None:
                    add(operand)
                    ran(operand.weight.name)

                with Operands(part, see):
                    tuning.run(block.name)
            for run in waiting:
                here = self._operands(run, part)
                there: list[Operand | None] = [None] * len(here)
                if self._float_runs is not None:
                    there = self._in_float_beside(run, part, module, here)
                for operand, wanted in zip(here, there, strict=True):
                    add(operand, wanted)
        return seen

    def _operands(self, run: PausedRun, part: list[Weight]) -> list[Operand]:
        """What weights are multiplied by where a run waits."""
        found: list[Operand] = []
        ran = self._tuning.until_all(weight.name for weight in part)

        def see(operand: Operand) -> None:
            found.append(attrs.evolve(operand, x=operand.x.clone()))  # it may be changed in place
            ran(operand.weight.name)

        def look(call: Call) -> None:
            with Operands(part, see):
                call()

        run.look(look)
        return found

    def _in_float_beside(
        self, run: PausedRun, part: list[Weight], module: nn.Module, here: list[Operand]
    ) -> list[Operand | None]:
        """The same of the run over the same batch in float, where that is alike."""
        assert self._float_runs is not None
        there: list[Operand] = []
        waiting = {other.number: other for other in self._float_runs.waiting_at(module)}
        if run.number in waiting:
            with _let_through(module), self._as_in_float():
                there = self._operands(waiting[run.number], part)
        if len(here) != len(there):
            return [None] * len(here)
        return [wanted if _alike(own, wanted) else None for own, wanted in zip(here, there, strict=True)]

    @contextlib.contextmanager
    def _as_in_float(self) -> Iterator[None]:
        """A block in which the weights of the block at work, or before it, are what they were at first."""
        now = [_with_copy(tensor) for tensor, _ in self._float_weights]
        try:
            _copy(self._float_weights)
            yield
        finally:
            _copy(now)


def _alike(operand: Operand, in_float: Operand) -> bool:
    """Whether two operands have the same rows in the same order, one of them quantized."""
    if (operand.weight, operand.layout, operand.x.shape) != (
        in_float.weight,
        in_float.layout,
        in_float.x.shape,
    ):
        return False
    return bool((operand.x - in_float.x).norm() < in_float.x.norm())


@contextlib.contextmanager
def _let_through(module: nn.Module) -> Iterator[None]:
    """A block in which quantizers give what they get, and layers do not know.

    Without quantizers at work a layer may hand its operands to products in another order.
    """
    hooks = [
        quantizer.register_forward_hook(lambda _, args, __: args[0])
        for quantizer in named_quantizers(module).values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_copy(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor.detach().clone()


def _copy(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)


@contextlib.contextmanager
def disabled(weights: Iterable[Weight]) -> Iterator[None]:
    """A block in which weights are not quantized."""
    on = [q for q in dict.fromkeys(weight.quantizer for weight in weights) if not q.disabled]
    try:
        for quantizer in on:
            quantizer.disable()
        yield
    finally:
        for quantizer in on:
            quantizer.enable()
