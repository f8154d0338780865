"""The house: imports point down only, and every module can be imported alone."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import quantpatch

ROOT = Path(quantpatch.__file__).parent

# From the ground up; rooms that stand together may not import one another.
FLOORS = [
    {"errors", "interception"},
    {"torch_tools"},
    {"numerics"},
    {"calibrators", "recipes"},
    {"plugins"},
    {"layers"},
    {"dataflow", "reports"},
    {"quantize"},
    {"tuning"},
    {"analysis", "export.checkpoint", "export.prepare"},
    {"export.onnx", "export.program"},
    {"export.benchmark"},
    {"export"},
    {"mixed_precision"},
    {"page"},
    {"run"},
    {"__init__"},
    {"cli", "testing"},
    {"__main__"},
]
# What a plugin may import.
PUBLIC = {"quantpatch"} | {
    f"quantpatch.{name}"
    for name in (
        *("analysis", "calibrators", "errors", "export", "layers", "numerics", "plugins", "quantize"),
        *("mixed_precision", "recipes", "reports", "testing", "tuning"),
    )
}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    """The room that a module belongs to: a folder or file of the package, or a folder of ``export``."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[:1] == ["export"] else parts[:1]) or "__init__"


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, anywhere: bool, known: Mapping[str, Path] = MODULES) -> list[str]:
    """Modules of the package that the code imports; those that only wait in functions, if ``anywhere``."""
    found: list[str] = []
    for child in ast.iter_child_nodes(node):
        if is_for_types_only(child) or (not anywhere and isinstance(child, (ast.FunctionDef, ast.Lambda))):
            continue
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "absolute imports only"
            found += [f"{child.module}.{alias.name}" for alias in child.names]
        found += imports(child, anywhere=anywhere, known=known)
    modules = [name if name in known else name.rpartition(".")[0] for name in found]
    return [name for name in modules if name in known]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    own = room(module)
    assert own in FLOOR, f"give {own} a place in FLOORS"
    for imported in imports(ast.parse(MODULES[module].read_text()), anywhere=True):
        other = room(imported)
        assert other == own or FLOOR[other] < FLOOR[own], f"{module} imports {imported}"


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "interception/hooks",
        "interception/import_watch",
        "plugins/entry",
        "plugins/example",
        "plugins/hookspecs",
    ],
)
def test_imports_no_torch(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [line for line in named if "torch." in line or line == "import torch"] == []


def files_needed(module: str) -> set[str]:
    """The files that must have run before the code of a module can, with the doors of their folders."""
    found = set(imports(ast.parse(MODULES[module].read_text()), anywhere=False)) - {module}
    doors = {".".join(name.split(".")[:n]) for name in found for n in range(1, name.count(".") + 1)}
    # Its own folders' doors stand open already, and wait for it.
    return found | {door for door in doors if door in MODULES and not f"{module}.".startswith(f"{door}.")}


def test_no_file_imports_itself_by_way_of_others() -> None:
    arrows = {module: files_needed(module) for module in MODULES}
    while leaves := [module for module, wanted in arrows.items() if not wanted & set(arrows)]:
        for module in leaves:
            del arrows[module]
    assert arrows == {}


def modules_of_plugins() -> dict[str, Path]:
    """The modules of the plugins that are beside the package in a checkout."""
    found = {}
    for project in (ROOT.parent / "plugins").glob("*"):
        packages = [door.parent for door in project.glob("*/__init__.py")]
        for path in (*project.glob("*.py"), *(file for folder in packages for file in folder.rglob("*.py"))):
            parts = path.relative_to(project).with_suffix("").parts
            if parts[0] != "tests":
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_no_file_waits_for_itself_in_a_function_either() -> None:
    """Of plugins too. What a folder's door lists is no arrow of the files behind it."""
    modules = {**MODULES, **modules_of_plugins()}
    arrows = {
        module: set(imports(ast.parse(path.read_text()), anywhere=True, known=modules)) - {module, ROOT.name}
        for module, path in modules.items()
    }
    while leaves := [module for module, wanted in arrows.items() if not wanted & set(arrows)]:
        for module in leaves:
            del arrows[module]
    assert arrows == {}


def test_every_folder_has_a_front_door_that_lists_what_is_public() -> None:
    folders = [path for module, path in MODULES.items() if path.name == "__init__.py"]
    without = [str(path.relative_to(ROOT)) for path in folders if "__all__" not in path.read_text()]
    assert without == []


def test_the_table_of_a_front_door_names_files_that_are_there() -> None:
    for path in (path for path in MODULES.values() if path.name == "__init__.py"):
        table = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("====")[2]
        named = re.findall(r"\b([a-z_]+\.py)\b", table)
        assert [name for name in named if not (path.parent / name).is_file()] == [], path


# Files of other distributions, as the bundled plugins and what `quantpatch new-plugin` writes are.
OUTSIDE = [
    path
    for folder, pattern in [(ROOT.parent / "plugins", "*.py"), (ROOT / "plugins/scaffold", "*.py.template")]
    for path in sorted(folder.rglob(pattern))
]


@pytest.mark.skipif(not (ROOT.parent / "plugins").is_dir(), reason="not a checkout")
@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_plugins_import_public_names_only(path: Path) -> None:
    """Those in ``__all__`` of the front doors that docs/stability.md lists, and in ``errors``."""
    text = path.read_text()
    for line in re.findall(r"^\s*((?:from|import) quantpatch[ .][^()\n]*(?:\([^)]*\))?)", text, re.MULTILINE):
        (node,) = ast.parse(line.strip()).body
        assert isinstance(node, (ast.Import, ast.ImportFrom))
        module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        assert module in PUBLIC, line
        if isinstance(node, ast.ImportFrom):
            known = importlib.import_module(str(module)).__all__
            assert {alias.name for alias in node.names} <= {*known, *(m.rpartition(".")[2] for m in PUBLIC)}


def test_public_modules_are_those_that_the_stability_policy_lists() -> None:
    page = ROOT.parent / "docs/stability.md"
    if not page.is_file():
        pytest.skip("not a checkout")
    listed = re.findall(r"`(quantpatch(?:\.\w+)?)`", page.read_text().partition("## What a version")[0])
    assert {name for name in listed if name in MODULES} | {"quantpatch"} == PUBLIC


@pytest.mark.sweep
def test_every_module_imports_alone() -> None:
    """Each in an interpreter that has torch but nothing of ours: which comes first must not matter."""
    code = f"""
import importlib, importlib.util, os, sys, types
import attrs, pluggy, rich.console, rich.progress, rich.table, torch, torch._dynamo, torch.onnx, typer
if importlib.util.find_spec("numba"):
    import numba.extending  # takes longer than all the rest
package = types.ModuleType("quantpatch")  # its own __init__ would import everything in one order
package.__path__ = [{str(ROOT)!r}]
package.__version__ = "0"
sys.modules["quantpatch"] = package
failed = []
for name in {[name for name in MODULES if name != ROOT.name and not name.endswith("__main__")]!r}:
    if name.endswith(".triton_kernel") and importlib.util.find_spec("triton") is None:
        continue
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(", ".join(failed) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_imports_only_what_quantizing_needs() -> None:
    targets = ("transformers", "timm")
    compilers = ("torch._dynamo", "torch._inductor", "numba", "triton", "torch.ao.quantization.fx")
    to_show = ("onnx", "jinja2", "rich", "typer")
    later = ("analysis", "tuning", "mixed_precision", "page", "export")
    rooms = tuple(f"quantpatch.{room}" for room in later)
    names = (*targets, *compilers, *to_show, *rooms)
    code = f"import sys, quantpatch; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_front_door_has_every_public_name_and_those_rooms_that_are_imported_at_their_first_use() -> None:
    assert all(hasattr(quantpatch, name) for name in quantpatch.__all__)
    assert set(quantpatch.__all__) <= set(dir(quantpatch))
    assert quantpatch.export is importlib.import_module("quantpatch.export")
    assert quantpatch.audit is importlib.import_module("quantpatch.analysis.audit").audit
    with pytest.raises(AttributeError, match="module 'quantpatch' has no attribute 'quantise_modules'"):
        quantpatch.quantise_modules  # noqa: B018


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR)


@pytest.mark.checkout
def test_the_architecture_names_every_room_from_the_ground_up_and_only_files_that_are_there() -> None:
    page = (ROOT.parent / "ARCHITECTURE.md").read_text()
    table = page.partition("## Rooms")[2].partition("## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    rooms = [re.sub(r"/$|\.py$", "", name) for cell in cells for name in re.findall(r"`([a-z_./]+)`", cell)]
    assert set(rooms) == {room.partition(".")[0] for room in FLOOR} - {"__init__", "__main__"}
    floors = [FLOOR[room] for room in rooms]
    assert floors == sorted(floors)
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in MODULES.values()]
    files = {file for file in re.findall(r"`([a-z_/]+\.py)`", page) if not file.startswith("tests/")}
    assert [file for file in files if not any(path.endswith(f"/{file}") for path in there)] == []


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them by it: of two it collects one."""
    files = [
        path.name for folder in ("tests", "plugins") for path in (ROOT.parent / folder).rglob("test_*.py")
    ]
    assert [name for name in files if files.count(name) > 1] == []
