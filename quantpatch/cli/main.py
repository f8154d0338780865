"""The command line. Each command is one call of the library; ``--json`` prints what it returned."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import attrs
import torch
import typer
from rich.console import Console
from rich.table import Table

from quantpatch.analysis.audit import audit
from quantpatch.errors import ArgumentError, ArgumentTypeError, CheckError, InputError, QuantPatchError, shown
from quantpatch.mixed_precision import search
from quantpatch.page import report
from quantpatch.page.page import checked_path
from quantpatch.plugins.registry import registry
from quantpatch.plugins.scaffold import new_plugin
from quantpatch.quantize.compose import compose
from quantpatch.quantize.explain import explain
from quantpatch.quantize.reasons import NotByDefault
from quantpatch.quantize.resolve import Decision
from quantpatch.quantize.scope import quantize_modules
from quantpatch.quantize.to_calibrate import Existing
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import CHANNEL, REDUCTION, QuantDescriptor
from quantpatch.reports.folding import alike
from quantpatch.reports.render import as_text
from quantpatch.reports.report import table_of
from quantpatch.run import RunSettings, launch
from quantpatch.torch_tools.atomic_files import own_version

app = typer.Typer(
    help="Quantize PyTorch models without touching their code.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="Shape of an input, such as 1,3,224,224 (or 1,128:int for indices); once for each input.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
# The options of a block, in each command that opens one, and without it in none.
_BLOCK: dict[str, tuple[Any, Any]] = {
    "recipe": (str | None, typer.Option(help="Recipe, such as int8: `quantpatch recipes` lists them.")),
    "skip": (list[str] | None, typer.Option(help="Layers to leave float.")),
    "custom": (
        list[str] | None,
        typer.Option(help="Entry, such as torch.nn.Linear=mylib.layers:QuantLinear: target and replacement."),
    ),
    "include": (list[str] | None, typer.Option(help="Layers that are float by default.")),
    "plugins": (list[str] | None, typer.Option("--plugin", help="Plugins that take part (default: all).")),
    "subclasses": (
        bool | None,
        typer.Option(
            "--subclasses/--no-subclasses",
            help="Quantize subclasses of known layers as well.",
            show_default=False,
        ),
    ),
    "operations": (
        list[str] | None,
        typer.Option(
            help="Operations inside forwards: products, matmul,add ..., or where they are: '*.attn=products'."
        ),
    ),
}


def _with_block(command: Callable[..., None], *, builds: bool = False) -> Callable[..., None]:
    """A command whose ``block`` is what ``quantize_modules`` takes, each with an option of its own.

    Args:
        command: The command.
        builds: Whether it builds a model, whose forwards have operations.
    """
    known = {name: option for name, option in _BLOCK.items() if builds or name != "operations"}

    @functools.wraps(command)
    def called(**given: Any) -> None:
        block = {name: given.pop(name) for name in known}
        for name in ("skip", "include"):
            block[name] = block[name] or ()
        block["custom"] = _entries(block["custom"])
        if builds:
            block["operations"] = _operations(block["operations"])
        command(**given, block=block)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "block"]
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
        )
        for name, (kind, option) in known.items()
    ]
    first = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    called.__signature__ = signature.replace(parameters=[*first, *options])  # type: ignore[attr-defined]
    return called


_building = functools.partial(_with_block, builds=True)


def _operations(given: list[str] | None) -> dict[str, list[str]] | None:
    """What ``--operations`` says, as ``operations=`` takes it."""
    if not given:
        return None
    found: dict[str, list[str]] = {}
    for text in given:
        where, _, names = text.rpartition("=")
        found.setdefault(where or "*", []).extend(name.strip() for name in names.split(","))
    return found


def _entries(given: list[str] | None) -> list[tuple[str, str, str]]:
    """What ``--custom`` says, as ``custom=`` takes it."""
    found = []
    for text in given or ():
        target, _, replacement = text.partition("=")
        module, _, name = target.rpartition(".")
        if not (module and name and replacement):
            raise typer.BadParameter(
                f"{text!r} does not name a target and a replacement; write "
                f"torch.nn.Linear=mylib.layers:QuantLinear",
                param_hint="--custom",
            )
        found.append((module, name, replacement))
    return found


def _print(what: Any) -> None:
    # Where the output is not a terminal, nothing is cut off to fit one.
    typer.echo(shown(as_text(what, of_names=True), 10_000_000, keep="\n"))


def _print_report(report: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
    else:
        _print(report)


def _add_row(table: Table, *cells: Any) -> None:
    """Adds a row of what may come from plugins, whose names and messages a terminal is not to act on."""
    table.add_row(*(shown(cell, 4000, keep="\n") for cell in cells))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantpatch {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List the plugins that are installed, and whether they take part."""
    found = registry.plugins()
    if as_json:
        _print_json(
            [{**attrs.asdict(p, recurse=False), "entries": [str(e) for e in p.entries]} for p in found]
        )
        return
    table = table_of("plugin", "distribution", "state", "hooks", "entries")
    for plugin in found:
        distribution = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "-"
        state = f"{plugin.state}: {plugin.reason}" if plugin.reason else plugin.state
        hooks = ", ".join(hook.removeprefix("quantpatch_") for hook in plugin.hooks) or "-"
        _add_row(table, plugin.name, distribution, state, hooks, len(plugin.entries))
    _print(table)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: how each quantizes what layers take, hold and give."""
    found = registry.recipes()
    operands: tuple[str, ...] = ("input", "weight", "output", "hidden")
    if as_json:
        rows = [
            {"name": name, "plugin": plugin, **{o: _descriptor(getattr(recipe, o)) for o in operands}}
            for name, (recipe, plugin) in found.items()
        ]
        _print_json(rows)
        return
    # No column for what every recipe leaves float.
    operands = tuple(o for o in operands if any(getattr(recipe, o) for recipe, _ in found.values()))
    table = table_of("recipe", *operands, "plugin")
    for name, (recipe, plugin) in found.items():
        _add_row(table, name, *(_in_words(getattr(recipe, o)) for o in operands), plugin)
    _print(table)


def _descriptor(descriptor: QuantDescriptor | None) -> dict[str, Any] | None:
    if descriptor is None:
        return None
    return {**attrs.asdict(descriptor, recurse=False), "format": registry.format(descriptor).name}


def _in_words(descriptor: QuantDescriptor | None) -> str:
    """A descriptor for a cell of a table: its format, which ranges it has, and where they are from."""
    if descriptor is None:
        return "float"
    parts = [registry.format(descriptor).name]
    if descriptor.axis not in (None, REDUCTION):  # blocks run along it by nature
        parts.append("per channel" if descriptor.axis == CHANNEL else f"axis {descriptor.axis}")
    if descriptor.dynamic:
        parts.append("dynamic")
    return ", ".join(parts)


@app.command()
@_with_block
def layers(block: Any, as_json: AsJson = False) -> None:
    """List what a block would replace, by what, and on whose word."""
    _look_here()
    recipe = registry.recipe(block.pop("recipe") or DEFAULT_RECIPE)
    include = (*recipe.include, *block.pop("include"))
    table = compose(registry.entries(block["plugins"]), include=include, **block)
    decisions = list(table.values())
    if as_json:
        headings = ("target", "replacement", "plugin", "state")
        _print_json([dict(zip(headings, _cells(decision), strict=True)) for decision in decisions])
        return
    _print(_Layers(decisions))


def _cells(decision: Decision) -> tuple[str | None, ...]:
    """A target, what replaces it, the plugin with the entry, and whether a block replaces it."""
    entry = decision.entry
    assert entry is not None
    waits = "replaced if its module gets imported" if decision.target is None else "replaced"
    state = waits if decision.reason is None else str(decision.reason)
    return decision.name, entry.replacement_name, entry.plugin, state


def _likeness(decision: Decision) -> Any:
    """What targets have in common that can be shown as one."""
    reason = decision.reason
    why = NotByDefault if isinstance(reason, NotByDefault) else reason
    package, _, _ = decision.name.partition(".")
    return package, None if decision.entry is None else decision.entry.plugin, why, decision.target is None


@attrs.frozen
class _Layers:
    """What a block would replace, as a table."""

    decisions: list[Decision]

    def __rich__(self) -> Table:
        return self._table([_cells(decision) for decision in self.decisions])

    def folded(self) -> Table:
        """One row for the targets in a package that are replaced alike; their modules are in JSON."""
        return self._table([self._folded(group) for group in alike(self.decisions, _likeness)])

    @staticmethod
    def _folded(group: list[Decision]) -> tuple[str | None, ...]:
        if len(group) == 1:
            return _cells(group[0])
        rows = [_cells(decision) for decision in group]
        parts = [decision.name.split(".") for decision in group]
        same = itertools.takewhile(
            lambda found: len(set(found)) == 1, zip(*(p[:-1] for p in parts), strict=False)
        )
        modules, names = ".".join(found[0] for found in same), [p[-1] for p in parts]
        made = (str(replacement).rpartition(":")[2] for _, replacement, _, _ in rows)
        by_rule = all(m.startswith(f"Quant{name}") for name, m in zip(names, made, strict=True))
        replaced_by = "Quant..." if by_rule else "each by its own"
        _, _, plugin, state = rows[0]
        if isinstance(group[0].reason, NotByDefault):
            state = str(NotByDefault(tuple(names)))
        return f"{modules}: {', '.join(names)}", replaced_by, plugin, state

    @staticmethod
    def _table(rows: list[tuple[str | None, ...]]) -> Table:
        table = table_of("target", "replacement", "plugin", "state")
        for row in rows:
            _add_row(table, *(cell or "custom" for cell in row))
        return table


@app.command("explain")
@_with_block
def explain_command(
    target: Annotated[str, typer.Argument(help="A class or function, such as torch.nn.Linear.")],
    block: Any,
    as_json: AsJson = False,
) -> None:
    """Say who would replace a class in a block, who would not, and why."""
    _look_here()
    _print_report(explain(target, **block), as_json)


@app.command("run", context_settings={"allow_interspersed_args": False})
@_building
def run_command(
    command: Annotated[list[str], typer.Argument(help="The script (or module) and its arguments.")],
    block: Any,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
    calibrate: Annotated[
        int, typer.Option(help="Calls of each model that run in float and set its ranges.", min=0)
    ] = 0,
    method: Annotated[
        str | None, typer.Option(help="Calibrator of activations, such as entropy, for these calls.")
    ] = None,
    weight_method: Annotated[str | None, typer.Option(help="The same for weights.")] = None,
    existing: Annotated[
        Existing, typer.Option(help="What becomes of ranges that are known already.")
    ] = "keep",
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Look for zero points of activations in these calls.")
    ] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Report what share of each model ran quantized.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="File for a page about each model, such as report.html.")
    ] = None,
) -> None:
    """Run an unmodified script with a block around it: every layer that it builds comes out quantized."""
    calibration = {
        "method": method, "weight_method": weight_method, "existing": existing, "zero_points": zero_points
    }  # fmt: skip
    for name, value in calibration.items():
        if value not in (None, False, "keep") and not calibrate:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("it is for calibration: add --calibrate N", param_hint=option)
    settings = RunSettings(
        block=block,
        calibrate=calibrate,
        calibration=calibration,
        audit=audit,
        report="" if page is None else str(checked_path(page).absolute()),
    )
    launch(settings, command, module=module)


def _look_here() -> None:
    """Lets modules of the current folder be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _build(path: str) -> Any:
    """The function (or model) that ``package.module:name`` means."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ArgumentError(f"{path!r} does not name a function; write package.module:build", build=path)
    _look_here()
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"cannot find {path!r}: {type(error).__name__}: {error}", build=path) from error


def _built(found: Any, path: str) -> torch.nn.Module:
    """The model that what ``package.module:name`` means is, or builds."""
    model = found() if callable(found) and not isinstance(found, torch.nn.Module) else found
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(
            f"{path} gave {model!r}, expected a model; name a function that builds one", build=path
        )
    return model


def _tensor(text: str) -> torch.Tensor:
    sizes, _, kind = text.partition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
        if kind not in ("", "int") or min(shape) < 0:
            raise ValueError
    except ValueError:
        raise ArgumentError(
            f"--input {text!r} is not a shape; write sizes with commas, such as 1,3,224,224, or "
            f"1,128:int for indices",
            input=text,
        ) from None
    if kind:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _model_in(block: dict[str, Any], build: str, inputs: list[str]) -> tuple[torch.nn.Module, list[Any]]:
    """The model that a function builds in a block, and its inputs."""
    found, tensors = _build(build), [_tensor(text) for text in inputs]
    with quantize_modules(**block):
        return _built(found, build), tensors


@contextlib.contextmanager
def _naming_shapes(inputs: list[str]) -> Iterator[None]:
    """A block that runs a model; if it fails, says on what."""
    try:
        yield
    except QuantPatchError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = " and ".join(inputs)
        raise InputError(f"the model failed on inputs of shape {shapes}: {error}") from error


@app.command("audit")
@_building
def audit_command(
    build: Annotated[str, typer.Argument(help="package.module:function that builds the model.")],
    inputs: Inputs,
    block: Any,
    minimum: Annotated[float | None, typer.Option(help="Fail below this share.", min=0.0, max=1.0)] = None,
    as_json: AsJson = False,
) -> None:
    """Build a model in a block, run it once, and report what share of it ran quantized.

    The exit code is 1 if that is below --minimum.
    """
    model, tensors = _model_in(block, build, inputs)
    try:
        with _naming_shapes(inputs):
            coverage = audit(model, tuple(tensors), minimum=minimum)
    except CheckError as error:
        _print_report(error.report, as_json)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    _print_report(coverage, as_json)


@app.command("report")
@_with_block
def report_command(
    build: Annotated[str, typer.Argument(help="package.module:function that builds the model.")],
    inputs: Inputs,
    block: Any,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("report.html"),
) -> None:
    """Build a model in a block, run it, and write what is known of it as a page."""
    model, tensors = _model_in(block, build, inputs)
    with _naming_shapes(inputs):
        typer.echo(f"wrote {report(model, tuple(tensors), path=output)}")


@app.command("search")
def search_command(
    build: Annotated[str, typer.Argument(help="package.module:function that builds the model.")],
    evaluate: Annotated[
        str,
        typer.Option(help="package.module:function that gets the model, returns a metric; more is better."),
    ],
    data: Annotated[
        str | None, typer.Option(help="package.module:function that gives batches, to find ranges from.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="How much of the metric may be lost.", min=0.0)] = 0.01,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Recipe, or float; once for each (default: int8, w4a8, int4 and float)."),
    ] = None,
    cost: Annotated[str, typer.Option(help="What is to be least: bits, macs or latency.")] = "bits",
    budget: Annotated[int | None, typer.Option(help="Evaluations at most.", min=1)] = None,
    resume: Annotated[Path | None, typer.Option(help="File that keeps results, to go on from.")] = None,
    picture: Annotated[Path | None, typer.Option(help="File for a picture of the frontier.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build a model, and find the recipe of each layer that keeps its metric and costs least."""
    candidates = candidate or ["int8", "w4a8", "int4", "float"]
    model = _built(_build(build), build)
    result = search(
        model,
        _build(evaluate),
        max_drop=max_drop,
        candidates=[None if name == "float" else name for name in candidates],
        cost=cost,  # type: ignore[arg-type]
        data=None if data is None else _build(data)(),
        budget=budget,
        resume=resume,
    )
    if picture is not None:
        result.picture(picture)
    _print_report(result, as_json)


@app.command("new-plugin")
def new_plugin_command(
    name: Annotated[str, typer.Argument(help="The plugin's name, such as mylib.")],
    folder: Annotated[Path, typer.Option(help="Where to put it.")] = Path(),
) -> None:
    """Write a complete distribution for a plugin: a layer, its tests, and what installs them."""
    path = new_plugin(name, folder)
    typer.echo(f"wrote {path}; next: pip install -e '{path}[dev]' && pytest {path}")


@app.command()
def demo(
    epochs: Annotated[
        int, typer.Option(help="Passes over the images that train the float model.", min=1)
    ] = 20,
    tuning_epochs: Annotated[int, typer.Option(help="Passes that fine-tune the quantized ones.", min=0)] = 4,
) -> None:
    """Train, calibrate and fine-tune a small CNN on handwritten digits (needs the extra 'demo')."""
    from quantpatch.cli import demo as digits  # imports scikit-learn, which only this command needs

    _print(digits.run(epochs=epochs, tuning_epochs=tuning_epochs))


def main() -> None:
    """The command ``quantpatch``. Errors of the library are printed as one message, with exit code 2."""
    try:
        app(prog_name="quantpatch")
    except QuantPatchError as error:
        Console(stderr=True, soft_wrap=True).print(
            "error: " + shown(error, 20_000, keep="\n"), style="red", markup=False, highlight=False
        )
        raise SystemExit(2) from None
