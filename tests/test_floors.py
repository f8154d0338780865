"""The house: imports point down only, and every module can be imported alone."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantpatch

ROOT = Path(quantpatch.__file__).parent

# From the ground up; what stands together may not import one another, but for a package its own parts.
FLOORS = [
    {"errors", "division"},
    {"formats", "entries", "example", "grouped_axes", "sharded", "ranks"},
    {"affine", "raised", "slots", "mimicry", "construction", "statements"},
    {"activations"},
    {"kernels"},
    {"rounding"},
    {
        "fake_quant",
        "interception",
        "lazy_imports",
        "hookspecs",
        "running",
        "fast_paths",
        "fx_leaf",
        "classes",
        "files",
        "places",
    },
    {"snapshot", "tracing"},
    {"descriptor"},
    {"calibrators", "recipes"},
    {"plugins"},
    {"registry"},
    {"range_tensor"},
    {"held_range", "targets"},
    {"table", "quantizer", "outcome"},
    {"layers", "settings", "roots", "late_ranges"},
    {"configure", "opening", "to_calibrate", "call_ranges", "zero_points", "weight_reads"},
    {"builtin", "scope", "report", "new_plugin"},
    {"calibration", "models", "audit", "export"},
    {"analysis", "explain"},
    {"demo", "testing", "run", "__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def part(module: str) -> str:
    """The part of the house that a module belongs to."""
    return "__init__" if module == ROOT.name else module.split(".")[1]


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, anywhere: bool) -> list[str]:
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
        found += imports(child, anywhere=anywhere)
    known = [name if name in MODULES else name.rpartition(".")[0] for name in found]
    return [name for name in known if name in MODULES]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    own = part(module)
    assert own in FLOOR, f"give {own} a place in FLOORS"
    for imported in imports(ast.parse(MODULES[module].read_text()), anywhere=True):
        other = part(imported)
        assert other == own or FLOOR[other] < FLOOR[own], f"{module} imports {imported}"


@pytest.mark.parametrize(
    "module", ["interception", "lazy_imports", "entries", "example", "errors", "hookspecs", "tracing"]
)
def test_the_ground_floor_imports_no_torch(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [line for line in named if "torch" in line] == []


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


def test_importing_the_package_imports_no_target_package() -> None:
    code = "import sys, quantpatch; print([m for m in ('transformers', 'timm') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_part_has_a_place() -> None:
    parts = {module.name for module in pkgutil.iter_modules(quantpatch.__path__)}
    assert parts <= set(FLOOR)
