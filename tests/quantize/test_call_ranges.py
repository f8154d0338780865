"""Layers that are called several times on tensors of different ranges are named, with what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.quantize.call_ranges import CallRanges

LEVELS = (10.0, 1.0, 0.1)


class Detector(nn.Module):
    """Levels of a pyramid that share a head."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.scales = scales

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.body(x).tanh()
        return [self.head(scale * y) for scale in self.scales]


def detector(*scales: float) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules():
        return Detector(*scales).eval()


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    "use",
    [
        lambda m: qp.calibrate(m, images(), progress=False),
        lambda m: qp.calibrate(torch.compile(m, backend="eager"), images(), progress=False),
        lambda m: qp.prepare(m, images()[0]),
        lambda m: qp.audit(m, images()[0]),
    ],
    ids=["calibrate", "calibrate compiled", "prepare", "audit"],
)
def test_ranges_that_are_far_apart_are_reported_with_layer_calls_and_ranges(use) -> None:
    with pytest.warns(qp.QuantPatchWarning, match="have one range for all") as told:
        use(detector(*LEVELS))
    (message,) = [str(w.message) for w in told if "one range for all" in str(w.message)]
    assert "head.input_quantizer takes 3 tensors, of ranges " in message
    ranges = [float(r) for r in message.split("of ranges ")[1].split(". The")[0].split(", ")]
    assert [round(r / ranges[2]) for r in ranges] == [100, 10, 1]
    assert "copy.deepcopy(layer)" in message
    assert "{'head': None}" in message
    assert "body" not in message


def test_by_hand_too() -> None:
    model = detector(*LEVELS)

    def calibrate() -> None:
        with qp.calibrating(model):
            for x in images():
                model(x)

    with pytest.warns(qp.QuantPatchWarning, match="head"):
        calibrate()


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.0, 1.0), (1.0,)])
def test_ranges_near_each_other_and_single_calls_are_not(scales) -> None:
    model = detector(*scales)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qp.calibrate(model, [x * factor for x, factor in zip(images(), (1, 50), strict=True)], progress=False)
        qp.audit(model, images()[0])


def test_what_the_warning_advises_ends_it() -> None:
    class Copies(Detector):
        def __init__(self) -> None:
            super().__init__(*LEVELS)
            self.heads = nn.ModuleList(copy.deepcopy(self.head) for _ in LEVELS)
            for head in self.heads:
                head.weight, head.bias = self.head.weight, self.head.bias
            del self.head

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.body(x).tanh()
            return [head(scale * y) for head, scale in zip(self.heads, self.scales, strict=True)]

    with qp.quantize_modules():
        model = Copies().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qp.calibrate(model, images(), progress=False)
        left = detector(*LEVELS)
        qp.configure(left, {"head": None})
        qp.calibrate(left, images(), progress=False)


def test_steps_of_recurrent_cells_are_no_calls_of_theirs() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[1], 4)
            for step in x:
                h = self.cell(step, h)
            return h

    with qp.quantize_modules():
        model = Steps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qp.calibrate(model, [torch.randn(5, 2, 4) * torch.logspace(0, 2, 5)[:, None, None]], progress=False)


def test_hooks_are_gone_afterwards_and_copies_made_inside_are_not_watched(tmp_path: Path) -> None:
    model = detector(*LEVELS)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with CallRanges(model) as calls:
        twin = copy.deepcopy(model)
        model(images()[0])
    seen = calls.differing()
    assert list(seen) == ["head.input_quantizer"]
    twin(100 * images()[0])
    assert calls.differing() == seen
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_float_model_gets_no_hooks() -> None:
    model = nn.Linear(2, 2)
    with CallRanges(model):
        assert not model._forward_pre_hooks


class Scan(nn.Module):
    """Steps over its input; its projection is read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0) @ self.project.weight


class QuantScan(qp.QuantizedLayer, Scan):
    inputs = ()
    weights = {}

    def descriptors(self, recipe: qp.Recipe) -> Iterator[tuple[str, qp.QuantDescriptor]]:
        assert recipe.input is not None
        yield "state", recipe.input

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.quantize_operand("state", self.project.input_quantizer(step)) for step in x]
        return self.run_float({}, (torch.stack(steps),), {})


class Scans(nn.Module):
    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.scan, self.scales = Scan(), scales

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.scan(scale * x) for scale in self.scales]


def test_steps_inside_a_layer_are_one_call_of_it() -> None:
    x = torch.randn(5, 2, 4) * torch.logspace(0, 2, 5)[:, None, None]
    for scales in ((1.0,), (1.0, 100.0)):
        with qp.quantize_modules(custom=[(__name__, "Scan", QuantScan)]):
            model = Scans(scales)
        with CallRanges(model) as calls:
            model(x)
        seen = calls.differing()
        assert set(seen) == (
            {"scan.state_quantizer", "scan.project.input_quantizer"} if scales[1:] else set()
        )
        assert all(later == pytest.approx(100 * first) for first, later in seen.values())
