"""One tuning of a model: its data, what is changed and can be undone, and what is to be reported."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from quantpatch.errors import CalibrationError, TuningError, listed
from quantpatch.layers.before_tuning import held, remember, restore, rounded_by
from quantpatch.layers.input_factor import drop_input_factor, input_factor_of, multiply_input_of
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.quantize.calibrate import calibrate
from quantpatch.quantize.reasons import Reason
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import (
    EnoughOfBatch,
    as_batches,
    evaluating,
    run_batch,
    run_over,
    unwrapped,
)
from quantpatch.torch_tools.paused import PausedRuns
from quantpatch.torch_tools.progress import Bar, progress_bar
from quantpatch.tuning.blocks import Blocks, disabled
from quantpatch.tuning.operands import Operand, Operands
from quantpatch.tuning.reasons import AlreadyRounded, NoData, NotBetter, OffGrid, Recorded
from quantpatch.tuning.report import Tuned, TuningStep, relative
from quantpatch.tuning.resuming import Record, Records
from quantpatch.tuning.weights import Weight, weights_of


class Tuning:
    """What a ``Tuner`` works on. If anything fails, the model is as it was.

    Args:
        model: The model.
        data: As ``calibrate`` takes it.
        calibration: Options of ``calibrate`` for ranges that are needed and not known.
        progress: Whether to show a progress bar (on a terminal or in a notebook only).
        seed: Of what is left to chance.
        offload: A folder to put what blocks are given into; None: it is held in memory.

    Attributes:
        model: The model.
        tuned: What the method at work has tuned, by name.
        skipped: What it has not, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any] | Callable[[nn.Module], Any],
        *,
        calibration: Mapping[str, Any],
        progress: bool,
        seed: int = 0,
        offload: Path | None = None,
    ) -> None:
        self.model = model
        self.tuned: dict[str, Tuned] = {}
        self.skipped: dict[str, Reason] = {}
        self._data = list(data) if isinstance(data, Iterator) else data  # it is needed more than once
        self._calibration = {"strict": False, **calibration, "existing": "keep", "progress": progress}
        self._progress = progress
        self._undo = contextlib.ExitStack()
        self._method = ""
        self._seed, self._offload = seed, offload
        self._step = 0
        #: What the method at work had rounded when it was interrupted, with what that was before.
        self.rounded_before: list[tuple[Tensor, Tensor]] = []
        self._records: Records | None = None
        # What has changed since it was kept: tensors, and whether they were rounded; ranges; factors.
        self._written: dict[tuple[nn.Module, str], bool] = {}
        self._ranges: set[TensorQuantizer] = set()
        self._factors: set[str] = set()
        self._once: frozenset[str] = frozenset()
        self._blocks: dict[str, str] = {}
        self._fed: dict[str, int] = {}
        self._waits: frozenset[str] = frozenset()
        self._order: tuple[str, ...] | None = None

    def __enter__(self) -> Tuning:
        self._undo.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._undo.pop_all()
        self._undo.__exit__(kind, *error)

    @contextlib.contextmanager
    def step(self, number: int, method: str) -> Iterator[list[TuningStep]]:
        """A block in which one method is at work; what it did is in the list afterwards."""
        self._step, self._method = number, method
        known = [] if self._records is None else [r for r in self._records.known if r.step == number]
        self.tuned = {name: Tuned(**said) for r in known for name, said in r.tuned.items()}
        self.skipped = {name: Recorded(why) for r in known for name, why in r.skipped.items()}
        steps: list[TuningStep] = []
        yield steps
        steps.append(TuningStep(method, self.tuned, self.skipped))
        if not self.is_done(number):
            self._keep(is_finished=True)
            self.rounded_before.clear()

    # --- going on where another tuning was -------------------------------------------------------

    def go_on(self, records: Records, methods: Sequence[str]) -> None:
        """Makes the model what another tuning had made of it, and has this one keep what it does.

        Args:
            records: What the other has kept.
            methods: The names of the methods, in their order.
        """
        quantizers = named_quantizers(self.model)
        finished = {record.step: record.is_finished for record in records.known}  # as the last of it says
        for record in records.known:
            self._method = methods[record.step]
            for key, tensor in record.tensors.items():
                kind, _, name = key.partition(":")
                if kind == "parameter":
                    layer, _, attribute = name.rpartition(".")
                    module = self.model.get_submodule(layer)
                    parameter: Any = module._parameters[attribute]
                    if name in record.rounded and not finished[record.step]:
                        self.rounded_before.append((parameter, parameter.detach().clone()))
                    self.write(module, attribute, tensor, rounded=name in record.rounded)
                elif kind == "factor":
                    owner = self.model.get_submodule(name)
                    self.guard_by(functools.partial(_set_factor, owner, input_factor_of(owner)))
                    multiply_input_of(owner, tensor.to(next(owner.parameters()).device))
                else:
                    quantizer = quantizers[name]
                    self._guard_range(quantizer)
                    _forget(quantizer)
                    if tensor.numel():
                        quantizer.replace_range(tensor)
                    if (zero_point := record.zero_points[name]) is not None:
                        quantizer.use_zero_point(zero_point)
        self._records = records
        self._clear_changes()

    def is_done(self, number: int) -> bool:
        """Whether a method had done all that it does, by number."""
        known = [] if self._records is None else self._records.known
        return any(record.step == number and record.is_finished for record in known)

    def keep_block(self) -> None:
        """Keeps what has been done, if all of it is weights that are rounded for good."""
        if self._written and all(self._written.values()):
            self._keep(is_finished=False)

    def changed_factor(self, layer: str) -> None:
        """Takes note that a layer multiplies its input by another factor, or by one at all."""
        self._factors.add(layer)

    def _keep(self, *, is_finished: bool) -> None:
        records = self._records
        if records is None:
            self._clear_changes()
            return
        tensors: dict[str, Tensor] = {}
        zero_points: dict[str, int | None] = {}
        rounded: list[str] = []
        names = {module: name for name, module in self.model.named_modules()}
        for (module, attribute), is_rounded in self._written.items():
            name = f"{names[module]}.{attribute}".lstrip(".")
            parameter: Any = module._parameters[attribute]
            tensors[f"parameter:{name}"] = parameter.detach().clone().contiguous()
            if is_rounded:
                rounded.append(name)
        for name, quantizer in named_quantizers(self.model).items():
            if quantizer in self._ranges:
                amax = quantizer.amax
                tensors[f"range:{name}"] = torch.empty(0) if amax is None else amax.detach().clone()
                found = quantizer.zero_point if quantizer.zero_point_is_found else None
                zero_points[name] = None if found is None else int(found)
        for name in self._factors:
            factor = input_factor_of(self.model.get_submodule(name))
            if factor is not None:
                tensors[f"factor:{name}"] = factor.detach().clone().contiguous()
        tuned = {name: attrs.asdict(tuned) for name, tuned in self.tuned.items()}
        skipped = {name: str(reason) for name, reason in self.skipped.items()}
        new = Record(self._step, is_finished, tuned, skipped, tuple(rounded), zero_points, tensors)
        records.put(new)
        self._clear_changes()

    def _clear_changes(self) -> None:
        self._written.clear()
        self._ranges.clear()
        self._factors.clear()

    # --- running ---------------------------------------------------------------------------------

    def run(self, what: str = "") -> int:
        """Runs the model over the data, in eval mode and without gradients.

        Args:
            what: What the progress bar shows behind the method.

        Returns:
            How often it was called.
        """
        calls = itertools.count()

        def count(*_: Any) -> None:
            next(calls)

        hook = unwrapped(self.model).register_forward_pre_hook(count)
        with evaluating(self.model), torch.no_grad():
            description = f"{self._method} {what}".rstrip()
            try:
                run_over(self.model, self._data, progress=self._progress, description=description)
            except CalibrationError as error:
                raise TuningError(str(error), method=self._method) from error
            finally:
                hook.remove()
        return next(calls)

    def until_all(self, names: Iterable[str]) -> Callable[[str], None]:
        """What ends the run on a batch as soon as all weights of interest are used: behind them nothing is.

        Args:
            names: Of the weights.

        Returns:
            To be called with each name as it is used.
        """
        wanted, ran = set(names), set[str]()
        stops = isinstance(self._data, Iterable) and wanted <= self._once

        def has_run(name: str) -> None:
            ran.add(name)
            if stops and len(ran) == len(wanted):
                ran.clear()
                raise EnoughOfBatch

        return has_run

    def run_in_float(self, what: str = "") -> int:
        """The same with no quantizer at work."""
        with in_float(self.model):
            return self.run(what)

    def calibrate(self) -> None:
        """Finds the ranges that are not known yet."""
        wanting = [
            q
            for q in named_quantizers(self.model).values()
            if not (q.disabled or q.descriptor.dynamic) and q.amax is None
        ]
        if wanting:
            for quantizer in wanting:
                self._undo.callback(_forget, quantizer)
                self._ranges.add(quantizer)
            calibrate(self.model, self._data, **self._calibration)

    # --- weights ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, Weight]:
        """The weights that can be tuned and that no method has rounded, by name, in the order they are used.

        The others are noted as skipped.

        Raises:
            TuningError: The data reaches none.
        """
        weights, skipped = weights_of(self.model)
        self.skipped |= skipped
        if self._order is None:
            self._look_at_order(weights)
        assert self._order is not None
        order = [name for name in self._order if name in weights]
        self.skipped |= {name: NoData() for name in weights if name not in order}
        if weights and not order:
            raise TuningError(
                f"the data reaches none of the {len(weights)} weights of {type(self.model).__name__} that "
                f"{self._method} could tune, such as {listed(weights, 3)}: give batches that run "
                f"their layers",
                method=self._method,
                layers=tuple(weight.layer_name for weight in weights.values()),
            )
        for name in order:
            method = rounded_by(weights[name].owner, weights[name].attribute)
            if method and name not in self.tuned:
                self.skipped[name] = AlreadyRounded(method)
        return {name: weights[name] for name in order if name not in {**self.tuned, **self.skipped}}

    def _look_at_order(self, weights: Mapping[str, Weight]) -> None:
        """Finds the order in which weights are used, and the blocks that hold all uses of theirs."""
        found: Counter[str] = Counter()
        entered: Counter[str] = Counter()
        inside: list[str] = []
        outside: set[str] = set()
        blocks = {name: self._block_of(weight.layer_name) for name, weight in weights.items()}
        for name, block in blocks.items():  # one in another is a part of that
            around = [other for other in blocks.values() if block.startswith(f"{other}." if other else "")]
            blocks[name] = min((block, *around), key=len)

        last: list[Tensor] = []

        def see(operand: Operand) -> None:
            name, x = operand.weight.name, operand.x
            found[name] += 1
            if name not in self._fed:
                if not last or (x.data_ptr(), x.numel()) != (last[0].data_ptr(), last[0].numel()):
                    self._fed[name] = len(self._fed)
                else:
                    self._fed[name] = max(self._fed.values())
            last[:] = [x]  # which is held, so that nothing else comes to lie there
            if blocks[name] not in inside:
                outside.add(blocks[name])

        def enter(name: str) -> None:
            entered[name] += 1
            inside.append(name)

        with contextlib.ExitStack() as stack:
            for name in dict.fromkeys(blocks.values()):
                module = self.model.get_submodule(name)
                before = module.register_forward_pre_hook(lambda *_, name=name: enter(name))
                after = module.register_forward_hook(lambda *_: inside.pop() and None)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(disabled(weights.values()))
            stack.enter_context(Operands(weights.values(), see))
            calls = self.run_in_float("looks at the order of layers")
        self._order = tuple(found)
        self._once = frozenset(name for name, count in found.items() if count == calls)
        self._blocks = blocks
        self._waits = frozenset(
            name for name, count in entered.items() if count == calls and name not in outside
        )

    def in_blocks(
        self, weights: Mapping[str, Weight], *, in_float: bool = False, beside_float: bool = False
    ) -> Blocks:
        """The blocks that weights are in, in the order they are used, in a ``with`` statement.

        Args:
            weights: Some of ``weights()``.
            in_float: Whether nothing is quantized while they are looked at.
            beside_float: Whether it is to be known what inputs lack of what they are in float.
        """
        return Blocks(self, weights, in_float=in_float, beside_float=beside_float)

    def fed_alike(self, weight: str, other: str) -> bool:
        """Whether two weights multiply the same tensor."""
        return self._fed[weight] == self._fed[other]

    def block_of(self, weight: str) -> str:
        """The name of the block that a weight is in."""
        return self._blocks[weight]

    def _block_of(self, layer: str) -> str:
        parts = layer.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        holders = [(self.model.get_submodule(holder), name) for holder, name in itertools.pairwise(names)]
        lists = [name for holder, name in holders if isinstance(holder, nn.ModuleList)]
        sequences = [name for holder, name in holders if isinstance(holder, nn.Sequential)]
        return lists[0] if lists else sequences[-1] if sequences else layer

    @property
    def has_batches(self) -> bool:
        """Whether the data is batches, and not a function that runs the model."""
        return isinstance(self._data, Iterable)

    def can_wait_at(self, block: str) -> bool:
        """Whether runs can wait where they enter a block: they do so once, and its weights are used there."""
        return self.has_batches and block in self._waits

    @contextlib.contextmanager
    def paused_runs(self, stops: Iterable[nn.Module]) -> Iterator[PausedRuns]:
        """A block with runs over the data, in eval mode and without gradients, that wait at modules."""
        assert isinstance(self._data, Iterable)
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.no_grad())
            folder = None
            if self._offload is not None:
                kept = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="quantpatch-", dir=self._offload)
                )
                folder = Path(kept)
            runner = unwrapped(self.model)
            yield stack.enter_context(PausedRuns(runner, as_batches(self._data), stops, folder=folder))

    def bar(self, total: int) -> contextlib.AbstractContextManager[Bar]:
        """A progress bar of the method at work."""
        return progress_bar(self._method, total, progress=self._progress)

    def seed_block(self, block: str) -> None:
        """Makes what is left to chance in a block the same whatever was done before."""
        torch.manual_seed(self._seed + 7919 * list(self._blocks.values()).index(block))

    # --- changing --------------------------------------------------------------------------------

    def write_rounded(
        self, weight: Weight, value: Tensor, before: float, after: float, size: float, note: str
    ) -> None:
        """Gives a weight the values that it was rounded to, if that is better and they are on its grid.

        Args:
            weight: The weight.
            value: What it was rounded to.
            before: The squared error of rounding to nearest.
            after: That of the values.
            size: What errors are relative to.
            note: What else is to be reported of it.
        """
        settled = weight.settled(value) if after < before else None
        if not after < before:
            self.skipped[weight.name] = NotBetter(relative(before, size))
        elif settled is None:
            self.skipped[weight.name] = OffGrid(weight.quantizer.format_name)
        else:
            self.write(weight.owner, weight.attribute, settled, rounded=True)
            self.tuned[weight.name] = Tuned(relative(before, size), relative(after, size), note)

    def write(
        self,
        module: nn.Module,
        name: str,
        value: Tensor,
        *,
        rounded: bool = False,
        before: Tensor | None = None,
    ) -> None:
        """Gives a parameter another value; ``revert`` knows the one before.

        Args:
            module: Has the parameter.
            name: Its name there.
            value: The new one.
            rounded: Whether it is on the grid of its quantizer now, which no method is to change.
            before: A copy of what it was before; default: what it is.
        """
        tensor: Any = module._parameters[name]
        if before is None:
            before = tensor.detach().clone()
            self.guard(module, name, before)
        with torch.no_grad():
            tensor.copy_(value)
        remember(module, name, before, rounded_by=self._method if rounded else "")
        self._written[module, name] = rounded

    def guard(self, module: nn.Module, name: str, before: Tensor) -> None:
        """Has a parameter become what it was if anything fails; ``write`` does so itself."""
        tensor: Any = module._parameters[name]
        notes = held(module)

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(before)
            restore(module, notes)

        self._undo.callback(undo)

    def guard_by(self, undo: Callable[[], None]) -> None:
        """Has something be done if anything fails, before what was guarded sooner is undone."""
        self._undo.callback(undo)

    def forget(self, quantizer: TensorQuantizer) -> None:
        """Makes a range unknown that data gave, since other values come now; it is found again at the end."""
        if quantizer.descriptor.dynamic or quantizer.descriptor.amax is not None or quantizer.amax is None:
            return
        self._guard_range(quantizer)
        _forget(quantizer)

    def _guard_range(self, quantizer: TensorQuantizer) -> None:
        """Has a range become what it was if anything fails."""
        self._ranges.add(quantizer)
        if quantizer.amax is None:
            self._undo.callback(_forget, quantizer)
            return
        amax = quantizer.amax.detach().clone()
        zero_point = quantizer.zero_point if quantizer.zero_point_is_found else None

        def undo() -> None:
            quantizer.replace_range(amax)
            if zero_point is not None:
                quantizer.use_zero_point(zero_point)

        self._undo.callback(undo)

    def outputs(self) -> list[Any]:
        """What the model gives for the first batch; where the data is a function, for all that it does."""
        found: list[Any] = []
        runner = unwrapped(self.model)

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(dict(output) if isinstance(output, Mapping) else output)

        hook = runner.register_forward_hook(take)
        try:
            if isinstance(self._data, Iterable):
                for batch in itertools.islice(as_batches(self._data), 1):
                    run_batch(runner, batch)
            else:
                self._data(runner)
        finally:
            hook.remove()
        return found


def _set_factor(layer: nn.Module, factor: Tensor | None) -> None:
    if factor is None:
        drop_input_factor(layer)
    else:
        multiply_input_of(layer, factor)


def _forget(quantizer: TensorQuantizer) -> None:
    quantizer.forget_zero_point()
    quantizer.amax = None
