"""Every hook is documented with its signature, has a user among the plugins that ship, and a test."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from quantpatch.plugins import hookspecs

ROOT = Path(__file__).resolve().parents[2]
HOOKS = [name for name in hookspecs.__all__ if name.startswith("quantpatch_")]
SHIPPED = [*(ROOT / "quantpatch").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
TESTS = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "plugins").glob("*/tests/test_*.py")]


def implementations(path):
    """The hooks that a file implements: functions of a hook's name marked as such."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in HOOKS:
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            if any(mark.rpartition(".")[2].startswith("hookimpl") for mark in marks):
                yield node.name


def test_every_function_of_the_specification_is_a_hook_that_is_exported():
    functions = [name for name, value in vars(hookspecs).items() if inspect.isfunction(value)]
    assert sorted(name for name in functions if name.startswith("quantpatch_")) == sorted(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_it_is_typed_and_documented_with_its_signature(hook):
    function = getattr(hookspecs, hook)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert "Returns:" in function.__doc__
    assert "@quantpatch.hookimpl" in function.__doc__, "show how it is implemented"
    heading = f"### `{hook}{str(signature).replace(chr(39), '')}`"
    assert heading in (ROOT / "docs" / "plugins.md").read_text()


@pytest.mark.checkout
@pytest.mark.parametrize("hook", HOOKS)
def test_a_plugin_that_ships_uses_it(hook):
    users = [path for path in SHIPPED if "tests" not in path.parts and hook in implementations(path)]
    assert users, f"no plugin that ships implements {hook}"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_test_registers_a_plugin_that_implements_it(hook):
    # The fixture `plugin` takes hooks by name, without their prefix.
    by_fixture = re.compile(rf"plugin\([^()]*\b{hook.removeprefix('quantpatch_')}=")
    testing = [p for p in TESTS if by_fixture.search(p.read_text()) or f"def {hook}(" in p.read_text()]
    assert testing, f"no test registers a plugin that implements {hook}"
