"""The watch on imports."""

from __future__ import annotations

import importlib
import sys

import pytest

from quantpatch.interception.import_watch import ImportWatch


@pytest.fixture
def watch():
    seen: list[str] = []
    watches: list[ImportWatch] = []

    def make(*names: str) -> list[str]:
        watches.append(ImportWatch(names, lambda module: seen.append(module.__name__)))
        watches[-1].start()
        return seen

    yield make
    for one in watches:
        one.stop()
        one.stop()  # harmless


def test_it_reports_its_modules_only_and_leaves_them_their_loader(package, watch) -> None:
    name = package(one="x = 1", two="")
    seen = watch(f"{name}.one")
    one, two = importlib.import_module(f"{name}.one"), importlib.import_module(f"{name}.two")
    assert seen == [f"{name}.one"]
    assert type(one.__loader__) is type(two.__loader__)
    assert one.__spec__.loader is one.__loader__
    assert one.__spec__.origin == one.__file__
    importlib.reload(one)
    assert one.__spec__.loader is one.__loader__


def test_the_module_sees_its_real_loader_while_it_runs(package, watch) -> None:
    name = package(one="loader = type(__loader__).__name__, type(__spec__.loader).__name__")
    watch(f"{name}.one")
    assert importlib.import_module(f"{name}.one").loader == ("SourceFileLoader", "SourceFileLoader")


def test_several_watches_of_one_module_are_all_called(package, watch) -> None:
    name = package(one="")
    for _ in range(3):
        seen = watch(f"{name}.one")
    module = importlib.import_module(f"{name}.one")
    assert seen == [f"{name}.one"] * 3
    assert type(module.__loader__).__name__ == "SourceFileLoader"


def test_a_module_that_does_not_exist_and_one_that_fails(package, watch) -> None:
    name = package(bad="1 / 0")
    seen = watch(f"{name}.bad", f"{name}.none", name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{name}.none")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(f"{name}.bad")
    assert seen == [name]
    assert f"{name}.bad" not in sys.modules


def test_stopping_takes_away_its_own_item_only() -> None:
    before = list(sys.meta_path)
    first, second = ImportWatch(["a"], print), ImportWatch(["a"], print)
    first.start()
    second.start()
    first.stop()
    assert sys.meta_path == [second, *before]
    second.stop()
    assert sys.meta_path == before
