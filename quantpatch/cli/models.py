"""Commands that build a model, or run a script that does."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quantpatch.analysis.audit import audit
from quantpatch.cli.app import AsJson, Inputs, app, look_here, print_report, with_building_block
from quantpatch.errors import ArgumentError, ArgumentTypeError, CheckError, InputError, QuantPatchError
from quantpatch.mixed_precision import search
from quantpatch.page import report
from quantpatch.page.page import checked_path
from quantpatch.quantize.scope import quantize_modules
from quantpatch.quantize.to_calibrate import Existing
from quantpatch.run import RunSettings, launch


@app.command("run", context_settings={"allow_interspersed_args": False})
@with_building_block
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


def object_at(path: str) -> Any:
    """The function (or model) that ``package.module:name`` means."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ArgumentError(f"{path!r} does not name a function; write package.module:build", build=path)
    look_here()
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"cannot find {path!r}: {type(error).__name__}: {error}", build=path) from error


def built(found: Any, path: str) -> torch.nn.Module:
    """The model that what ``package.module:name`` means is, or builds."""
    model = found() if callable(found) and not isinstance(found, torch.nn.Module) else found
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(
            f"{path} gave {model!r}, expected a model; name a function that builds one", build=path
        )
    return model


def tensor_of(text: str) -> torch.Tensor:
    """The tensor that ``--input`` means."""
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
    found, tensors = object_at(build), [tensor_of(text) for text in inputs]
    with quantize_modules(**block):
        return built(found, build), tensors


@contextlib.contextmanager
def naming_shapes(inputs: list[str]) -> Iterator[None]:
    """A block that runs a model; if it fails, says on what."""
    try:
        yield
    except QuantPatchError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = " and ".join(inputs)
        raise InputError(f"the model failed on inputs of shape {shapes}: {error}") from error


@app.command("audit")
@with_building_block
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
        with naming_shapes(inputs):
            coverage = audit(model, tuple(tensors), minimum=minimum)
    except CheckError as error:
        print_report(error.report, as_json)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print_report(coverage, as_json)


@app.command("report")
@with_building_block
def report_command(
    build: Annotated[str, typer.Argument(help="package.module:function that builds the model.")],
    inputs: Inputs,
    block: Any,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page (default: the model's class).")] = "",
) -> None:
    """Build a model in a block, run it, and write what is known of it as a page."""
    model, tensors = _model_in(block, build, inputs)
    with naming_shapes(inputs):
        typer.echo(f"wrote {report(model, tuple(tensors), path=output, title=title)}")


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
    progress: Annotated[bool, typer.Option(help="Show how far it is, on a terminal.")] = True,
    as_json: AsJson = False,
) -> None:
    """Build a model, and find the recipe of each layer that keeps its metric and costs least."""
    candidates = candidate or ["int8", "w4a8", "int4", "float"]
    model = built(object_at(build), build)
    result = search(
        model,
        object_at(evaluate),
        max_drop=max_drop,
        candidates=[None if name == "float" else name for name in candidates],
        cost=cost,  # type: ignore[arg-type]
        data=None if data is None else object_at(data)(),
        budget=budget,
        resume=resume,
        progress=progress,
    )
    if picture is not None:
        result.picture(picture)
    print_report(result, as_json)
