"""Each test has the same random numbers: how much a method gains depends on them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers whatever order tests run in."""
    torch.manual_seed(0)
