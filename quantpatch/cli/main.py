"""The command line. Each command is one call of the library; ``--json`` prints what it returned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quantpatch.cli import benchmark, lists, models  # noqa: F401  # which add their commands
from quantpatch.cli.app import app, print_text
from quantpatch.errors import QuantPatchError, shown
from quantpatch.plugins.scaffold import new_plugin
from quantpatch.torch_tools.atomic_files import own_version


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

    print_text(digits.run(epochs=epochs, tuning_epochs=tuning_epochs))


def main() -> None:
    """The command ``quantpatch``. Errors of the library are printed as one message, with exit code 2."""
    try:
        app(prog_name="quantpatch")
    except QuantPatchError as error:
        Console(stderr=True, soft_wrap=True).print(
            "error: " + shown(error, 20_000, keep="\n"), style="red", markup=False, highlight=False
        )
        raise SystemExit(2) from None
