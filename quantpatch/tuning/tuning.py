"""One tuning of a model: its data, what is changed and can be undone, and what is to be reported."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import CalibrationError, TuningError, listed
from quantpatch.layers.before_tuning import held, remember, restore, rounded_by
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
from quantpatch.tuning.operands import Layout, Moments, Operand, Operands
from quantpatch.tuning.reasons import AlreadyRounded, NoData, NotBetter, OffGrid
from quantpatch.tuning.report import Tuned, TuningStep, relative
from quantpatch.tuning.weights import Weight, weights_of

#: What is known of the inputs of a weight, by how products read it.
Seen = dict[str, dict[Layout, Moments]]


class Tuning:
    """What a ``Tuner`` works on. If anything fails, the model is as it was.

    Args:
        model: The model.
        data: As ``calibrate`` takes it.
        calibration: Options of ``calibrate`` for ranges that are needed and not known.
        progress: Whether to show a progress bar (on a terminal or in a notebook only).

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
    ) -> None:
        self.model = model
        self.tuned: dict[str, Tuned] = {}
        self.skipped: dict[str, Reason] = {}
        self._data = list(data) if isinstance(data, Iterator) else data  # it is needed more than once
        self._calibration = {"strict": False, **calibration, "existing": "keep", "progress": progress}
        self._progress = progress
        self._undo = contextlib.ExitStack()
        self._method = ""
        self._once: frozenset[str] = frozenset()
        self._order: tuple[str, ...] | None = None

    def __enter__(self) -> Tuning:
        self._undo.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._undo.pop_all()
        self._undo.__exit__(kind, *error)

    @contextlib.contextmanager
    def step(self, method: str) -> Iterator[list[TuningStep]]:
        """A block in which one method is at work; what it did is in the list afterwards."""
        self._method, self.tuned, self.skipped = method, {}, {}
        steps: list[TuningStep] = []
        yield steps
        steps.append(TuningStep(method, self.tuned, self.skipped))

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

    def until_all(self, names: Iterable[str], once: Container[str]) -> Callable[[str], None]:
        """What ends the run on a batch as soon as all that is of interest has run: behind it nothing is.

        Args:
            names: Of what is of interest.
            once: Of what runs exactly once whenever the model is called.

        Returns:
            To be called with each name as it has run.
        """
        wanted, ran = set(names), set[str]()
        stops = isinstance(self._data, Iterable) and all(name in once for name in wanted)

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
            calibrate(self.model, self._data, **self._calibration)

    def moments(
        self, weights: Iterable[Weight], what: str = "", *, rows: int = 0, in_float: bool = False
    ) -> Seen:
        """What is known of the inputs of weights, which are not quantized while that is found out.

        Args:
            weights: Those to look at.
            what: What the progress bar shows behind the method.
            rows: How many of the inputs to keep, of each.
            in_float: Whether nothing else is quantized either.
        """
        weights = list(weights)
        seen: Seen = {weight.name: {} for weight in weights}
        ran = self.until_all(seen, self._once)

        def see(operand: Operand) -> None:
            by_layout = seen[operand.weight.name]
            if operand.layout not in by_layout:
                by_layout[operand.layout] = Moments(rows)
            by_layout[operand.layout].add(operand)
            ran(operand.weight.name)

        with _disabled(weight.quantizer for weight in weights), Operands(weights, see):
            (self.run_in_float if in_float else self.run)(what)
        return seen

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
            found: Counter[str] = Counter()
            with (
                _disabled(weight.quantizer for weight in weights.values()),
                Operands(weights.values(), lambda operand: found.update([operand.weight.name])),
            ):
                calls = self.run("looks at the order of layers")
            self._order = tuple(found)
            self._once = frozenset(name for name, count in found.items() if count == calls)
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
            if method:
                self.skipped[name] = AlreadyRounded(method)
        return {name: weights[name] for name in order if name not in self.skipped}

    def blocks(self, weights: Mapping[str, Weight]) -> Iterator[tuple[str, list[Weight]]]:
        """Weights in the order they are used, those of one block together, and what to call them.

        A block is an element of the outermost list of modules around a layer, such as one of a transformer,
        or else of the innermost sequence.
        """
        groups: dict[str, list[Weight]] = {}
        for weight in weights.values():
            groups.setdefault(self._block_of(weight.layer_name), []).append(weight)
        for index, (name, group) in enumerate(groups.items(), 1):
            yield f"{name or 'the model'} ({index} of {len(groups)})", group

    def _block_of(self, layer: str) -> str:
        parts = layer.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        holders = [(self.model.get_submodule(holder), name) for holder, name in itertools.pairwise(names)]
        lists = [name for holder, name in holders if isinstance(holder, nn.ModuleList)]
        sequences = [name for holder, name in holders if isinstance(holder, nn.Sequential)]
        return lists[0] if lists else sequences[-1] if sequences else layer

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
        amax = quantizer.amax.detach().clone()
        zero_point = quantizer.zero_point if quantizer.zero_point_is_found else None

        def undo() -> None:
            quantizer.replace_range(amax)
            if zero_point is not None:
                quantizer.use_zero_point(zero_point)

        self._undo.callback(undo)
        _forget(quantizer)

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


def _forget(quantizer: TensorQuantizer) -> None:
    quantizer.forget_zero_point()
    quantizer.amax = None


@contextlib.contextmanager
def _disabled(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """A block in which quantizers let tensors pass."""
    on = [q for q in dict.fromkeys(quantizers) if not q.disabled]
    try:
        for quantizer in on:
            quantizer.disable()
        yield
    finally:
        for quantizer in on:
            quantizer.enable()
