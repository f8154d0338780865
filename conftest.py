"""What all tests share: what does not depend on the test is made once."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch.onnx._internal.exporter import _registration

from quantpatch.reports import render

with warnings.catch_warnings():
    # torch.compile imports it when it is first called, in whichever test that is, and torch warns of itself.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all``: also what is tried now and then only."""
    parser.addoption("--all", action="store_true", help="all parameters of tests marked sweep")


def pytest_configure(config: pytest.Config) -> None:
    """The markers of tests that try more than differs from day to day, and of those that read our source."""
    config.addinivalue_line(
        "markers", "sweep(n): every n-th of its parameters unless --all or named by ::; without n, none"
    )
    config.addinivalue_line("markers", "checkout: needs the source of the packages beside the tests")


@pytest.hookimpl(tryfirst=True)  # before they are shuffled: each run makes the same choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thins out sweeps. With an n that divides no number of values, each value of each parameter is left."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    seen: Counter[str] = Counter()
    left: list[pytest.Item] = []
    out: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("sweep")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if not marker.args or seen[test] % marker.args[0] != 1:
                out.append(item)
                continue
        left.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = left


@pytest.fixture(autouse=True, scope="session")
def _the_exporters_own_functions_are_read_once() -> Iterator[None]:
    """torch.onnx parses the source of its 500 functions in each call, which is half of a small export."""
    registry = _registration.ONNXRegistry
    read = functools.cache(registry.from_torchlib)

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        made = copy.copy(read(*args, **kwargs))
        made.functions = {name: [*functions] for name, functions in made.functions.items()}
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(autouse=True)
def _reports_have_no_terminal() -> Iterator[None]:
    """Their width is that of COLUMNS, if a test sets it, and not of the terminal that pytest runs in."""

    def size(fallback: tuple[int, int]) -> os.terminal_size:
        return os.terminal_size((int(os.environ.get("COLUMNS", fallback[0])), fallback[1]))

    # Not the fixture, which would be made before, and so undone after, those that look at what tests leave.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setattr(render, "get_terminal_size", size)
        yield
