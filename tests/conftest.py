"""What holds for every test: PyTorch is afterwards exactly what it was before."""

from __future__ import annotations

import importlib
import itertools
import operator
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.onnx
from torch import nn

from quantpatch.registry import registry


def _owners() -> list[Any]:
    modules = [
        nn,
        *(
            importlib.import_module(m.name)
            for m in pkgutil.iter_modules(nn.modules.__path__, "torch.nn.modules.")
        ),
    ]
    classes = {
        value: None
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("torch.nn")
    }
    return [*classes, nn, nn.functional, torch]


# Tensors are tiny here: threads would only wait for each other, the more so in several processes.
torch.set_num_threads(1)

# What torch imports and replaces by itself when something is first compiled is no test's doing.
torch.compile(lambda x: x + 1, backend="aot_eager")(torch.zeros(1))

OWNERS = _owners()
assert nn.Module in OWNERS
assert len(OWNERS) > 150


class Snapshot:
    """The dictionaries of every class of torch.nn and of torch: keys in order, values by identity."""

    def __init__(self) -> None:
        self.dicts = [(owner, list(vars(owner)), list(vars(owner).values())) for owner in OWNERS]
        self.meta_path = list(sys.meta_path)

    def differences(self) -> list[str]:
        found = [
            f"vars({owner!r}): {_difference(owner, keys, values)}"
            for owner, keys, values in self.dicts
            if not _same(owner, keys, values)
        ]
        if not (
            len(sys.meta_path) == len(self.meta_path)
            and all(map(operator.is_, sys.meta_path, self.meta_path))
        ):
            found.append(f"sys.meta_path: {self.meta_path} became {sys.meta_path}")
        return found


def _same(owner: Any, keys: list[str], values: list[Any]) -> bool:
    now = vars(owner)
    if list(now) == keys:
        return all(map(operator.is_, now.values(), values))
    if not isinstance(owner, ModuleType):
        # Python itself leaves this note on a class when an object of it is first copied or pickled.
        own = {key: value for key, value in now.items() if key in keys or key != "__slotnames__"}
        return list(own) == keys and all(map(operator.is_, own.values(), values))
    # torch imports some of its submodules when they are first used, which puts them at the end.
    own = {
        key: value
        for key, value in now.items()
        if key in keys or sys.modules.get(f"{owner.__name__}.{key}") is not value
    }
    return list(own) == keys and all(map(operator.is_, own.values(), values))


def _difference(owner: Any, keys: list[str], values: list[Any]) -> str:
    now = dict(vars(owner))
    was = dict(zip(keys, values, strict=True))
    changed = [
        f"{key}: {was[key]!r} became {now[key]!r}" for key in keys if key in now and now[key] is not was[key]
    ]
    gone = [f"{key} is gone" for key in keys if key not in now]
    new = [f"{key} is new" for key in now if key not in was]
    return "; ".join(changed + gone + new) or "the order of keys"


_snapshot = Snapshot()


@pytest.fixture(autouse=True)
def _torch_is_what_it_was() -> Iterator[None]:
    global _snapshot
    if _snapshot.differences():
        _snapshot = Snapshot()  # the tests of a plugin ran before, whose package changes torch when imported
    yield
    found = _snapshot.differences()
    if found:
        _snapshot = Snapshot()  # one test's fault is reported once
    assert not found, "\n".join(found)


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
