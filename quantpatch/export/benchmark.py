"""``bench``: one model in float, and quantized in each runtime that is installed, side by side."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.errors import ArgumentError, ExportError, MissingExtraError, UnknownNameError
from quantpatch.export.onnx import export_onnx
from quantpatch.export.prepare import prepare
from quantpatch.export.program import lower
from quantpatch.export.program.measured import compiled_floats
from quantpatch.export.program.needs import demand_compiler, demand_cpu, instructions
from quantpatch.plugins.registry import registry
from quantpatch.plugins.runtime import Runtime
from quantpatch.quantize.calibrate import calibrate
from quantpatch.quantize.convert import convert
from quantpatch.recipes import Recipe
from quantpatch.reports.latency import medians
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import arguments, demand_model, evaluating, uncompiled
from quantpatch.torch_tools.progress import progress_bar
from quantpatch.torch_tools.tracing import tracing

if TYPE_CHECKING:
    from rich.table import Table

_EAGER, _COMPILED, _BFLOAT16 = "float", "float, compiled", "bfloat16, compiled"


@attrs.frozen(kw_only=True)
class BenchRow:
    """One way to run a model.

    Attributes:
        name: The runtime, or how the float model runs.
        ms: How long it takes, a median; None if it does not run here.
        ratio: The same over that of the compiled float model; None if there is none.
        error: How far its results are from the float model's, over their size (of the vectors of all values).
        integers: How many layers run on integers.
        floats: How many layers of which the weights are quantized run on floats.
        why: Why it does not run here, and what to do; empty if it does.
    """

    name: str
    ms: float | None = None
    ratio: float | None = None
    error: float | None = None
    integers: int = 0
    floats: int = 0
    why: str = ""


@attrs.frozen
class BenchReport(Report):
    """What ``bench`` measured; prints as a table.

    Attributes:
        model: Class of the model.
        recipe: By which it was quantized.
        instructions: What this processor multiplies integers with.
        threads: How many threads ran it.
        rows: Each way to run it.
    """

    model: str
    recipe: str
    instructions: str
    threads: int
    rows: tuple[BenchRow, ...]

    def __rich__(self) -> Table:
        title = f"{self.model}, {self.recipe}, {self.threads} threads, {self.instructions}"
        numbers = ("ms", "of compiled float", "error", "on integers")
        table = table_of("runs", *numbers, "why not", right=numbers, title=title)
        for row in self.rows:
            layers = f"{row.integers} of {row.integers + row.floats}" if row.integers + row.floats else ""
            found = (
                "" if value is None else f"{value:{how}}"
                for value, how in ((row.ms, ".3g"), (row.ratio, ".2f"), (row.error, ".2g"))
            )
            table.add_row(row.name, *found, layers, row.why)
        return table


@attrs.frozen
class _Way:
    """What runs, and what it gives."""

    name: str
    call: Callable[[], Any]
    integers: int = 0
    floats: int = 0


def bench(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    recipe: str | Recipe = "int8",
    data: Iterable[Any] | None = None,
    runtimes: Iterable[str] | str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> BenchReport:
    """Runs a model in float, and quantized in each runtime that is installed, side by side.

    For each runtime a copy of the model is quantized, prepared, calibrated, and lowered or written as a file,
    which its check compares with that copy. Then all take turns, so that what else the machine does counts
    for all. The model is unchanged.

    Args:
        model: A float model, on the CPU.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        recipe: How it is quantized.
        data: Batches to calibrate with, as ``calibrate`` takes them; by default the arguments alone.
        runtimes: Names of runtimes, ``"inductor"`` for ``lower``; by default all that can run here.
        threads: How many threads each may use; by default as many as torch does.
        progress: Whether to show what is being done (on a terminal only).

    Returns:
        Latencies, their ratio to the model compiled in float, and the error to the float model.

    Raises:
        ArgumentError: ``threads`` is not positive.
        ExportError: The model is not on the CPU.
        MissingExtraError: A runtime that was named is not installed.
        UnknownNameError: There is no such runtime, or none that runs here.
    """
    demand_model(model, "bench")
    model = uncompiled(model)
    args, kwargs = arguments(args, kwargs)
    demand_cpu(model, (args, kwargs), "bench measures on CPUs")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, expected a number from 1 on", threads=threads)
    chosen = _chosen(runtimes)
    batches = None if data is None else list(data)

    def calibrated(runtime: str) -> nn.Module:
        own = copy.deepcopy(model)
        convert(own, recipe)
        prepare(own, args, kwargs=kwargs, runtime=runtime)
        calibrate(own, batches or (lambda m: m(*args, **kwargs)), progress=False)
        return own

    ways = [_Way(_EAGER, functools.partial(model, *args, **kwargs))]
    missing: list[BenchRow] = []
    bar = progress_bar(type(model).__name__, 2 + len(chosen), progress=progress)
    with (
        tracing(), evaluating(model), torch.no_grad(), _threads(threads), bar as shown,
        tempfile.TemporaryDirectory() as folder,
    ):  # fmt: skip
        shown.step("compiling it in float")
        try:
            demand_compiler()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about what it calls itself
                floats = compiled_floats(model, args, kwargs)
        except ExportError as error:
            missing.append(BenchRow(name=_COMPILED, why=str(error)))
        else:
            ways += [
                _Way(name, functools.partial(call, *given, **named))
                for name, (call, given, named) in zip((_COMPILED, _BFLOAT16), floats, strict=False)
            ]
        for name, runtime in chosen.items():
            shown.step(f"making it for {name}")
            try:
                if runtime.file == "onnx":
                    runtime.function("opens")  # before the work: what it needs may not be installed
                own = calibrated(name)
                way = _in_file if runtime.file == "onnx" else _lowered
                ways.append(way(own, args, kwargs, name, Path(folder) / f"{name}.onnx", threads))
            except (ExportError, MissingExtraError) as error:
                if runtimes is not None and isinstance(error, MissingExtraError):
                    raise
                missing.append(BenchRow(name=name, why=str(error)))
        shown.step("measuring")
        rows = _measured(ways)
        count = torch.get_num_threads()
    named = recipe if isinstance(recipe, str) else recipe.name
    return BenchReport(type(model).__name__, named, instructions(), count, (*rows, *missing))


def _chosen(names: Iterable[str] | str | None) -> dict[str, Runtime]:
    """The runtimes that were asked for, or all that this can run."""
    known = {name: registry.runtime(name) for name in registry.named("quantpatch_runtimes", Runtime)}
    here = {name: runtime for name, runtime in known.items() if runtime.opens or runtime.file == "program"}
    if names is None:
        return here
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in here:
            raise UnknownNameError.of("runtime to measure", name, here)
    return {name: here[name] for name in wanted}


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _lowered(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], name: str, path: Path, threads: int | None
) -> _Way:
    made = lower(model, args, kwargs=kwargs, latency=False, progress=False)
    call = functools.partial(made, *args, **kwargs)
    return _Way(name, call, len(made.report.integers), len(made.report.skipped))


def _in_file(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], name: str, path: Path, threads: int | None
) -> _Way:
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    names = [f"input_{index}" for index in range(len(inputs))]
    written = export_onnx(
        model, args, path, kwargs=kwargs, runtime=name, input_names=names, latency=False, progress=False
    )
    run = registry.runtime(name).call("opens", path, threads or torch.get_num_threads())
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    compared = written.comparison
    on_integers = {} if compared is None else compared.on_integers
    layers = {n.rpartition(".")[0] for n in written.quantizers if n.endswith("weight_quantizer")}
    return _Way(name, functools.partial(run, feed), len(on_integers), len(layers) - len(on_integers))


def _measured(ways: list[_Way]) -> list[BenchRow]:
    expected = _values(ways[0].call())
    times = medians([way.call for way in ways])
    compiled = next((ms for way, ms in zip(ways, times, strict=True) if way.name == _COMPILED), None)
    rows = []
    for way, ms in zip(ways, times, strict=True):
        error = (_values(way.call()) - expected).norm() / expected.norm().clamp_min(1e-30)
        ratio = None if compiled is None else ms / compiled
        rows.append(
            BenchRow(
                name=way.name,
                ms=ms,
                ratio=ratio,
                error=cast(float, error.item()),
                integers=way.integers,
                floats=max(way.floats, 0),
            )
        )
    return rows


def _values(outputs: Any) -> Tensor:
    """All values of what a model or a file gives, in their order."""
    leaves = pytree.tree_leaves(list(outputs) if isinstance(outputs, (list, tuple)) else outputs)
    return torch.cat([torch.as_tensor(x).detach().double().flatten() for x in leaves])
