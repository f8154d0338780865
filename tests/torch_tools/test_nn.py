"""The classes of torch.nn as torch defined them, whatever a library has put under their names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantpatch
from quantpatch.torch_tools import nn

ROOT = Path(quantpatch.__file__).parent

# Names are rebound before quantpatch is imported: to subclasses that compute something else.
REBOUND = """
import sys
from torch import nn

def stranger(cls):
    return type(cls.__name__, (cls,), {{"__module__": "library", "forward": None}})

torchs = {{
    name: cls for name, cls in vars(nn).items()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module
}}
for name, cls in torchs.items():
    for module in {modules}:
        setattr(module, name, stranger(cls))

import torch
import quantpatch as qp
from quantpatch.layers import builtin

for family, names in builtin.FAMILIES.items():
    for name in names:
        replacement = getattr(sys.modules[f"quantpatch.layers.{{family}}"], f"Quant{{name}}")
        assert torchs[name] in replacement.__mro__, name
        assert not any(base.__module__ == "library" for base in replacement.__mro__), name

with qp.quantize_modules():
    layers = [torchs["Conv2d"](3, 8, 3), torchs["BatchNorm2d"](8), torchs["Flatten"]()]
    layers.append(torchs["Linear"](288, 2))
    rebound = nn.Linear(2, 2)
assert type(layers[0]).__name__ == "QuantConv2d" and type(layers[3]).__name__ == "QuantLinear"
assert type(rebound) is nn.Linear
model = torchs["Sequential"](*layers).eval()
qp.prepare(model, torch.randn(2, 3, 8, 8))
assert isinstance(model[1], torchs["Identity"]), "batch norm was not folded"
"""


@pytest.mark.parametrize(
    "modules", ["[nn]", "[nn, nn.modules, sys.modules[cls.__module__]]"], ids=["exported", "defining"]
)
def test_built_in_layers_stand_on_torchs_classes_whatever_stands_under_their_names(modules: str) -> None:
    code = REBOUND.format(modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]


@pytest.mark.parametrize("name", sorted(name for name in vars(nn) if name[0].isupper()))
def test_each_class_is_that_of_torch(name: str) -> None:
    assert getattr(nn, name) is getattr(torch.nn, name, None) or name == "DistributedDataParallel"


def test_no_module_takes_a_layer_from_torchs_names() -> None:
    """Those that build models of their own, as users do, take what is there."""
    from_torch = {"Module", "Parameter"}
    builders = {ROOT / "cli" / "demo.py", *ROOT.rglob("*examples.py")}
    for path in set(ROOT.rglob("*.py")) - builders:
        tree = ast.parse(path.read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "torch"
            for alias in node.names
        }
        names = {"torch.nn", *imported & {"nn"}}
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        used = {node.attr for node in attributes if ast.unparse(node.value) in names}
        layers = {
            name
            for name in used - from_torch
            if isinstance(cls := getattr(torch.nn, name, None), type) and issubclass(cls, torch.nn.Module)
        }
        assert not layers, f"{path}: import nn from quantpatch.torch_tools"
