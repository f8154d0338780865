"""The command that measures a model in each runtime."""

from __future__ import annotations

from typing import Annotated

import typer

from quantpatch.cli.app import AsJson, Inputs, app, print_report
from quantpatch.cli.models import built, naming_shapes, object_at, tensor_of
from quantpatch.export import bench


@app.command("bench")
def bench_command(
    build: Annotated[str, typer.Argument(help="package.module:function that builds the float model.")],
    inputs: Inputs,
    recipe: Annotated[
        str, typer.Option(help="Recipe, such as int8: `quantpatch recipes` lists them.")
    ] = "int8",
    data: Annotated[
        str | None,
        typer.Option(
            help="package.module:function that gives batches, to find ranges from (default: inputs)."
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="Runtime, such as onnxruntime; once for each (default: all that are installed)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that each may use (default: as many as torch does).", min=1)
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show how far it is, on a terminal.")] = True,
    as_json: AsJson = False,
) -> None:
    """Build a model, and measure it in float, compiled, and quantized in each runtime that is installed."""
    model = built(object_at(build), build)
    tensors = tuple(tensor_of(text) for text in inputs)
    batches = None if data is None else object_at(data)()
    with naming_shapes(inputs):
        found = bench(
            model,
            tensors,
            recipe=recipe,
            data=batches,
            runtimes=runtime,
            threads=threads,
            progress=progress,
        )
    print_report(found, as_json)
