"""torch changes itself when its compiler is first imported, which export does; that is not ours to undo."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _torch_with_its_compiler(request: pytest.FixtureRequest) -> None:
    importlib.import_module("torch._dynamo")  # wraps torch.manual_seed
    importlib.import_module("torch.onnx")
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    assert root is not None
    root._snapshot = root.Snapshot()
