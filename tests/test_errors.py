"""Errors carry their culprit."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import pytest

from quantpatch import errors
from quantpatch.errors import (
    ArgumentError,
    MissingExtraError,
    PluginError,
    QuantPatchError,
    UnknownNameError,
    listed,
    near_misses,
    shown,
)


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n.endswith("Error")])
def test_every_error_is_a_quantpatch_error_and_survives_pickling(name) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, QuantPatchError)
    error = pickle.loads(pickle.dumps(cls("what", plugin="mine")))
    assert (type(error), str(error)) == (cls, "what")
    if isinstance(error, ArgumentError):
        assert (error.argument, error.value) == ("plugin", "mine")
    else:
        assert error.plugin == "mine"


CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith(("Error", "Warning"))]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_says_when_it_is_raised_and_what_it_carries(cls) -> None:
    assert cls.__doc__ is not vars(cls.__base__).get("__doc__")
    for attribute in vars(cls).get("__annotations__", {}):
        assert f"\n    {attribute}: " in inspect.cleandoc(cls.__doc__)  # Python 3.13 takes out the indent


@pytest.fixture(scope="module")
def used() -> set[str]:
    """Names of what the package calls, such as ``FileError(...)`` or ``UnknownNameError.of(...)``."""
    root = Path(errors.__file__).parent
    names = set()
    for file in root.rglob("*.py"):
        if file.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.value if isinstance(node.func, ast.Attribute) else node.func
                names.add(called.id if isinstance(called, ast.Name) else "")
    return names


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not QuantPatchError])
def test_every_error_is_raised_somewhere(cls, used) -> None:
    assert cls.__name__ in used or cls is errors.QuantPatchWarning  # which warn_caller makes


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ArgumentError, ValueError),
        (errors.ArgumentTypeError, TypeError),
        (errors.ArgumentTypeError, errors.ArgumentError),
        (errors.UnknownNameError, errors.ArgumentError),
        (errors.UnknownNameError, LookupError),
        (errors.InputError, RuntimeError),
        (errors.BlockError, RuntimeError),
        (errors.CheckError, AssertionError),
        (errors.FileError, OSError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_who_knows_only_python_catches_the_error_that_python_has_for_it(cls, builtin) -> None:
    assert issubclass(cls, builtin)


def test_culprits_have_defaults() -> None:
    assert PluginError("x").plugin == ""


def test_unknown_names_know_what_there_is() -> None:
    error = UnknownNameError.of("recipe", "int88", ["int8", "fp8"], "hint")
    assert (error.kind, error.name, error.known) == ("recipe", "int88", ("fp8", "int8"))
    assert str(error) == "unknown recipe 'int88'. Did you mean 'int8'? hint"
    assert isinstance(error, LookupError)


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("linear", ["torch.nn.Linear"], "Did you mean 'torch.nn.Linear'? "),
        ("torch.nn.Linea", ["Linear", "Conv2d"], "Did you mean 'Linear'? "),
        ("x", [], "There are none. "),
        ("x", ["bb", "aa"], "There are: 'bb', 'aa'. "),
        ("x", [f"name{i}" for i in range(20)], ""),
        ("", [f"name{i}" for i in range(20)], ""),
    ],
)
def test_near_misses(name, known, sentence) -> None:
    assert near_misses(name, known) == sentence


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'quantpatch[demo]'" in str(MissingExtraError.of("demo", "sklearn", "the demo"))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("encoder.0.attn", "encoder.0.attn"),
        ("größe·层", "größe·层"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\nb\u202ec", r"a\nb\u202ec"),
        ("half \ud800", r"half \ud800"),
        (17, "17"),
    ],
)
def test_text_from_outside_is_shown_without_what_a_terminal_acts_on(text, seen) -> None:
    assert shown(text) == seen


def test_long_text_is_shown_with_its_ends_and_its_length() -> None:
    text = shown("a" * 1_000_000 + "z")
    assert text.startswith("aaaa")
    assert text.endswith("z (1,000,001 characters)")
    assert len(text) < 200


def test_a_message_may_keep_its_lines() -> None:
    assert shown("one\ntwo\r", keep="\n") == "one\ntwo\\r"


@pytest.mark.parametrize(
    ("items", "options", "text"),
    [
        ([], {}, ""),
        (["a", "b"], {"limit": 2}, "a, b"),
        (["a", "b", "c"], {"limit": 2}, "a, b and 1 more"),
        (range(12), {}, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
        ("abcd", {"limit": 2, "separator": "; "}, "a; b; and 2 more"),
        ("abcd", {"limit": 1, "separator": "\n  "}, "a\n  and 3 more"),
    ],
)
def test_of_a_long_list_the_first_are_shown_and_the_others_counted(items, options, text) -> None:
    assert listed(iter(items), **options) == text
