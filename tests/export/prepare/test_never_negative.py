"""Which values are never negative, whatever the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantpatch.dataflow import dataflow
from quantpatch.export.prepare.placement import is_never_negative


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def is_known(function: Callable[[Tensor], Tensor]) -> bool:
    model = Calling(function)
    flow = dataflow(model, lambda: model(torch.randn(1, 2, 4, 4)))
    return is_never_negative(flow.operators[-1].outputs[0])


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: F.relu6(x).flatten(),
        lambda x: x.sigmoid() + x.relu(),
        lambda x: x.relu() * 3,
        lambda x: F.pad(x.abs(), (1, 1, 1, 1), mode="reflect"),
        lambda x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear"),
    ],
)
def test_never_negative(function: Callable[[Tensor], Tensor]) -> None:
    assert is_known(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu() * -1,
        lambda x: x.relu() * -0.5,
        lambda x: x.relu() + -1,
        lambda x: torch.add(x.relu(), x.relu(), alpha=-1),
        lambda x: x.relu() + x,
        lambda x: -x.relu(),
        lambda x: F.pad(x.relu(), (1, 1), value=-1),
        lambda x: F.hardtanh(x),
    ],
)
def test_maybe_negative(function: Callable[[Tensor], Tensor]) -> None:
    assert not is_known(function)
