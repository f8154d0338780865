"""What holds for every test: PyTorch is afterwards exactly what it was before."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

# Tensors are too small for them here, and loading takes a while; tests that want kernels say so.
os.environ.setdefault("QUANTPATCH_KERNELS", "0")

from quantpatch.numerics.backends import numba
from quantpatch.plugins.plugin import discover
from quantpatch.plugins.registry import registry

# Tensors are tiny here: threads would only wait for each other, the more so in several processes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _torch_is_what_it_was(torch_untouched: None) -> None:
    """In every test of this folder."""


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Turns CPU kernels on, for tensors of any size, or off, where a test is parametrized with it."""
    wanted = getattr(request, "param", None)
    if wanted is not None:
        pytest.importorskip("numba")
        monkeypatch.setattr(numba, "_WANTED", wanted)
        monkeypatch.setattr(numba, "_SMALLEST", 1)
    return wanted


@pytest.fixture
def plugin() -> Iterator[Callable[..., str]]:
    """Registers a plugin made of hooks given by name; returns its name. ``plugin(entries=[...])``."""
    import quantpatch

    names: list[str] = []

    def add(name: str = "", **hooks: Any) -> str:
        name = name or f"plugin-{len(names)}"

        def hook(returned: Any) -> Any:
            return lambda: returned() if callable(returned) else returned

        module = ModuleType(name.replace("-", "_"))
        for key, returned in hooks.items():
            function = hook(returned)
            function.__name__ = f"quantpatch_{key}"
            setattr(module, f"quantpatch_{key}", quantpatch.hookimpl(function))
        registry.register(module, name)
        names.append(name)
        return name

    yield add
    for name in names:
        registry.unregister(name)


@pytest.fixture(scope="session")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs ``function(rank, folder)`` in processes, and returns what each saved in ``rank{rank}.pt``.

    One set of processes serves all tests of a module, also those of other test workers. They are forked by
    one that has imported torch and has no threads.
    """
    get_context("forkserver").set_forkserver_preload(
        ["torch.distributed.checkpoint", "torch.distributed.fsdp", "pytest", "quantpatch"]
    )

    def run(function: Callable[[int, str], None], count: int) -> list[Any]:
        run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
        name = f"ranks-{function.__module__}"
        folder: Path = (
            tmp_path_factory.getbasetemp().parent / f"{name}-{run_id}"
            if run_id
            else tmp_path_factory.mktemp(name)
        )
        try:
            if run_id:
                folder.mkdir()
        except FileExistsError:  # another worker came first
            deadline = time.monotonic() + 120
            while not (folder / "done").exists():
                assert time.monotonic() < deadline, "the worker that runs the ranks did not finish"
                time.sleep(0.1)
        else:
            mp.start_processes(function, args=(str(folder),), nprocs=count, start_method="forkserver")
            (folder / "done").touch()
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]

    return run


_unique = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes an importable package; ``package(layers="class ...")`` returns its name, unique to the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def write(**files: str) -> str:
        name = f"throwaway_{next(_unique)}"
        (tmp_path / name).mkdir()
        for module, source in {"__init__": "", **files}.items():
            (tmp_path / name / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield write
    for module in [m for m in sys.modules if m.partition(".")[0] in names]:
        del sys.modules[module]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Installs a real distribution with one plugin; returns the name of its module.

    ``more`` goes into its metadata, ``points`` into its entry points.
    """
    registry.plugins()  # looks around now: what a test installs is for registries of its own
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def make(
        plugin: str, source: str, dist: str = "", version: str = "1.2", *, more: str = "", points: str = ""
    ) -> str:
        module = f"plugin_module_{next(_unique)}"
        (tmp_path / f"{module}.py").write_text(source)
        dist = dist or f"dist-{module}"
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n{more}")
        points = points.replace("MODULE", module)
        (info / "entry_points.txt").write_text(f"[quantpatch]\n{plugin} = {module}\n{points}")
        importlib.invalidate_caches()
        modules.append(module)
        return module

    yield make
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def take_part(install: Callable[..., str]) -> Iterator[Callable[[str], None]]:
    """Has an installed plugin take part in every block of this process, whatever was asked before."""
    added: list[str] = []

    def add(plugin: str) -> None:
        registry._plugins[plugin] = discover()[plugin]
        registry._answers.clear()
        added.append(plugin)

    yield add
    for plugin in added:
        registry.unregister(plugin)
