"""The command line itself: the options of a block, and how commands print."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantpatch.errors import shown
from quantpatch.reports.render import as_text

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
    "strict": (
        bool | None,
        typer.Option("--strict", help="Fail where operations cannot be followed.", show_default=False),
    ),
}
# Those of blocks in which a model is built, whose forwards have operations.
_OF_MODELS = ("operations", "strict")


def with_block(command: Callable[..., None], *, builds: bool = False) -> Callable[..., None]:
    """A command whose ``block`` is what ``quantize_modules`` takes, each with an option of its own.

    Args:
        command: The command.
        builds: Whether it builds a model, whose forwards have operations.
    """
    known = {name: option for name, option in _BLOCK.items() if builds or name not in _OF_MODELS}

    @functools.wraps(command)
    def called(**given: Any) -> None:
        block = {name: given.pop(name) for name in known}
        for name in ("skip", "include"):
            block[name] = block[name] or ()
        block["custom"] = _entries(block["custom"])
        if builds:
            block["operations"] = _operations(block["operations"])
            block["strict"] = bool(block["strict"])
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


with_building_block = functools.partial(with_block, builds=True)


def _operations(given: list[str] | None) -> dict[str, list[str]] | list[str] | None:
    """What ``--operations`` says, as ``operations=`` takes it."""
    if not given:
        return None
    found: dict[str, list[str]] = {}
    for text in given:
        where, _, names = text.rpartition("=")
        found.setdefault(where or "*", []).extend(name.strip() for name in names.split(","))
    return found["*"] if found.keys() == {"*"} else found  # names alone are no rules, which have to match


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


def print_text(what: Any) -> None:
    """Prints what rich can show, or a report."""
    # Where the output is not a terminal, nothing is cut off to fit one.
    typer.echo(shown(as_text(what, of_names=True), 10_000_000, keep="\n"))


def print_report(report: Any, as_json: bool) -> None:
    """Prints a report, as JSON if that is asked for."""
    if as_json:
        typer.echo(report.to_json())
    else:
        print_text(report)


def look_here() -> None:
    """Lets modules of the current folder be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
