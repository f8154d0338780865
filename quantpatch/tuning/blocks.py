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

from quantpatch.layers.quantizer import in_float
from quantpatch.torch_tools.paused import Call, PausedRuns
from quantpatch.torch_tools.progress import Bar
from quantpatch.tuning.operands import Moments, Operand, Operands, Seen
from quantpatch.tuning.weights import Weight

if TYPE_CHECKING:
    from quantpatch.tuning.tuning import Tuning


class Block:
    """The weights of one block.

    Attributes:
        name: Of the module.
        weights: Those of it that are looked at, in the order they are used.
    """

    def __init__(self, name: str, weights: list[Weight], blocks: Blocks) -> None:
        self.name, self.weights = name, weights
        self._blocks = blocks

    def moments(self, *, rows: int = 0, gram: bool = True) -> Seen:
        """What is known of the inputs of its weights, which are not quantized while that is found out.

        Args:
            rows: How many of the inputs to keep, of each.
            gram: Whether the sum of ``x xᵀ`` is to be found.
        """
        return self._blocks.moments(self, rows, gram)


class Blocks:
    """The blocks that weights are in, in the order they are used; a context manager that gives them.

    Args:
        tuning: The tuning.
        weights: The weights, by name, in the order they are used.
        in_float: Whether nothing is quantized while they are looked at.
    """

    def __init__(self, tuning: Tuning, weights: Mapping[str, Weight], *, in_float: bool) -> None:
        self._tuning, self._model, self._in_float = tuning, tuning.model, in_float
        self._groups: dict[str, list[Weight]] = {}
        for weight in weights.values():
            self._groups.setdefault(tuning.block_of(weight.name), []).append(weight)
        self._stack = contextlib.ExitStack()
        self._runs: PausedRuns | None = None

    def __enter__(self) -> Iterator[Block]:
        stops = [self._model.get_submodule(name) for name in self._groups if self._tuning.can_wait_at(name)]
        with contextlib.ExitStack() as stack:
            if stops:
                self._runs = stack.enter_context(self._tuning.paused_runs(stops))
            bar = stack.enter_context(self._tuning.bar(len(self._groups)))
            self._stack = stack.pop_all()
        return self._each(bar)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _each(self, bar: Bar) -> Iterator[Block]:
        for index, (name, weights) in enumerate(self._groups.items()):
            bar.step(name or "the model")
            self._tuning.seed_block(index)
            yield Block(name, weights, self)
            bar.advance()

    def moments(self, block: Block, rows: int, gram: bool) -> Seen:
        """See ``Block.moments``."""
        tuning, runs = self._tuning, self._runs
        module = self._model.get_submodule(block.name)
        seen: Seen = {weight.name: {} for weight in block.weights}
        ran = tuning.until_all(seen)

        def see(operand: Operand) -> None:
            by_layout = seen[operand.weight.name]
            if operand.layout not in by_layout:
                by_layout[operand.layout] = Moments(rows, gram=gram)
            by_layout[operand.layout].add(operand)
            ran(operand.weight.name)

        def look(call: Call) -> None:
            with Operands(block.weights, see):
                call()

        with in_float(self._model) if self._in_float else contextlib.nullcontext():
            waiting = [] if runs is None else runs.waiting_at(module)
            with disabled(block.weights):
                for run in waiting:
                    run.look(look)
                if not waiting:
                    with Operands(block.weights, see):
                        tuning.run(block.name)
            if runs is not None:
                runs.pass_(module)
        return seen


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
