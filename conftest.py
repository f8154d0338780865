"""What all tests share: what does not depend on the test is made once."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch.onnx._internal.exporter import _registration

from quantpatch.report import render

with warnings.catch_warnings():
    # torch.compile imports it when it is first called, in whichever test that is, and torch warns of itself.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn  # noqa: F401


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
