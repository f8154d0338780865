"""fold_batchnorm: the same outputs without the batch norm, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.prepare.batchnorm import fold_batchnorm


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics that are not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3, groups=8), nn.BatchNorm1d(8)), (2, 8, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed groups": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
        (2, 4, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)), (5, 4)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("seen_in", ["trace", "run"])
def test_same_outputs(case: str, quantized: bool, seen_in: str) -> None:
    build, shape = CASES[case]
    torch.manual_seed(1)
    with qp.quantize_modules() if quantized else qp.keep_float():
        model = lively(build())
    x = torch.randn(shape)
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()
    expected = model(x)
    report = fold_batchnorm(model, x if seen_in == "run" else None)
    assert report.folded == {"1": "0"}
    assert report.skipped == {}
    assert str(report).splitlines()[-1].split() == ["1", "folded", "into", "0"]
    assert type(model[1]) is nn.Identity
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_from_before_is_folded_as_it_is_loaded(case: str) -> None:
    build, _ = CASES[case]
    before, model = lively(build()), lively(build())
    qp.convert(model)
    fold_batchnorm(model)
    assert "1.running_var" in before.state_dict()
    model.load_state_dict(before.state_dict())
    fold_batchnorm(before)
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].bias, before[0].bias)
    model.load_state_dict(before.state_dict())  # one from afterwards stays as it is
    assert torch.equal(model[0].weight, before[0].weight)


def test_a_checkpoint_is_folded_also_by_a_copy_within_another_model_and_of_a_part() -> None:
    before, model = lively(Branching()), lively(Branching())
    fold_batchnorm(model)
    with torch.no_grad():
        before.block.conv1.weight.mul_(2)
    state = before.state_dict()
    expected = copy.deepcopy(before)
    fold_batchnorm(expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        outer = nn.ModuleDict({"module": twin})
        outer.load_state_dict({f"module.{key}": value for key, value in state.items()})
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in expected.state_dict().items())
    model.block.load_state_dict(before.block.state_dict(), assign=True)
    assert torch.equal(model.block.conv1.weight, expected.block.conv1.weight)
    assert list(state) == list(before.state_dict())  # what was given is not changed
    del state["block.norm1.running_var"]
    with pytest.raises(RuntimeError, match="block.norm1"):
        model.load_state_dict(state)


@pytest.mark.parametrize("per_channel", [True, False])
def test_ranges_from_before_are_scaled_as_they_are_loaded_or_else_refused(per_channel: bool) -> None:
    recipe = qp.Recipe(name="r", weight=qp.QuantDescriptor(axis="channel" if per_channel else None))
    x = torch.randn(2, 3, 6, 6)
    models = []
    for fold in (False, True):
        with qp.quantize_modules(recipe=recipe):
            models.append(lively(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))))
        if fold:
            fold_batchnorm(models[-1])
        qp.calibrate(models[-1], [x], progress=False)
    before, folded = models
    with torch.no_grad():
        before[0].weight_quantizer.amax.mul_(0.5)
    if not per_channel:
        with pytest.raises(RuntimeError, match=r"1\.running_mean"):
            folded.load_state_dict(before.state_dict())
        return
    folded.load_state_dict(before.state_dict())
    fold_batchnorm(before)
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in before.state_dict().items())


def test_known_ranges_are_scaled_with_the_weights() -> None:
    with qp.quantize_modules():
        model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 6, 6)
    qp.calibrate(model, [x], progress=False)
    expected = model(x)
    fold_batchnorm(model)
    own = model[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)
    assert torch.allclose(model[0].weight_quantizer.amax, own, rtol=1e-5)
    # The same integers but for a few on the edge between two.
    assert (model(x) - expected).abs().mean() < 1e-3 * expected.abs().mean()


class Block(nn.Module):
    """A residual block, called in an order that is not that of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.own = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        return self.own(x) if x.sum() > 0 else x


def test_what_is_folded_is_read_from_the_graph_also_in_parts() -> None:
    model = lively(Branching())
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    report = fold_batchnorm(model)
    assert report.folded == {"block.norm1": "block.conv1", "block.norm2": "block.conv2"}
    assert "torch.fx cannot trace" in report.skipped["own"]
    assert "left: " in str(report)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_run_shows_what_no_trace_does() -> None:
    model = lively(Branching())
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    report = fold_batchnorm(model, x)
    assert set(report.folded) == {"block.norm1", "block.norm2"}
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def left_because(model: nn.Module) -> str:
    whys = []
    for args in (None, torch.randn(2, 4, 5, 5)):  # by a trace and by a run
        report = fold_batchnorm(model, args)
        assert report.folded == {}
        whys += report.skipped.values()
    assert whys[0] == whys[1]
    return whys[0]


def test_what_is_left() -> None:
    class Twice(nn.Module):
        def __init__(self, again: str) -> None:
            super().__init__()
            self.conv, self.norm, self.again = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), again

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if self.again == "output":
                return self.norm(y) + y
            return self.norm(self.conv(y) if self.again == "layer" else torch.relu(y))

    assert "used elsewhere" in left_because(lively(Twice("output")))
    assert "more than once" in left_because(lively(Twice("layer")))
    assert "no layer comes right before" in left_because(lively(Twice("relu")))
    assert "ReLU" in left_because(lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))))
    stats = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert "no running statistics" in left_because(lively(stats))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    assert "parametrized" in left_because(lively(normed))
    conv = nn.Conv2d(4, 4, 1)
    other = nn.Conv2d(4, 4, 1)
    other.weight = conv.weight
    assert "tied" in left_because(lively(nn.Sequential(other, nn.ReLU(), conv, nn.BatchNorm2d(4))))
    hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda *_: None)
    assert "hooks" in left_because(lively(hooked))


def test_quantizers_that_stand_in_the_way() -> None:
    with qp.quantize_modules(recipe=qp.Recipe(name="o", output=qp.QuantDescriptor())):
        model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert "output before it is quantized" in left_because(model)
    with qp.quantize_modules(recipe=qp.Recipe(name="t", weight=qp.QuantDescriptor())):
        model = lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    qp.calibrate(model, [torch.randn(2, 4, 3, 3)], progress=False)
    assert "fold before calibrating" in left_because(model)


def test_training_is_refused() -> None:
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


class Activated(nn.BatchNorm2d):
    """Batch norm with an activation inside, as networks for images have it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.PReLU(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Written(Activated):
    """The same with torch's forward written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self.training or (self.running_mean is None and self.running_var is None)
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        y = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, batch, 0.1, self.eps)
        return self.act(y).tanh()


class Weighing(nn.BatchNorm2d):
    """One whose weight is read a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.sum()


class Standardized(nn.Conv2d):
    """A convolution with another tensor than its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Same(nn.Conv2d):
    """A convolution that pads in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 1, 0), value=0.5))


def between(norm: nn.Module, conv: type[nn.Module] = nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)]
    return lively(nn.Sequential(*first, conv(4, 4, 1), norm, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


Y = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [Activated, Written])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_else_a_subclass_does_goes_on_when_it_is_folded(kind: type[nn.Module], quantized: bool) -> None:
    model = between(kind(4))
    expected, state = model(Y), copy.deepcopy(model.state_dict())
    if quantized:
        qp.convert(model)
    report = fold_batchnorm(model, Y) if not quantized else qp.prepare(model, Y).batchnorm
    assert report.folded == {"1": "0", "3": "2", "5": "4"}
    for q in (m for m in model.modules() if isinstance(m, qp.TensorQuantizer)):
        q.disable()
    assert torch.allclose(model(Y), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model[3], kind)
    assert [key for key in model.state_dict() if key.startswith("3.")] == ["3.act.weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(dict(state))  # strict, and without torch's versions beside it
        assert torch.allclose(twin(Y), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(twin.train()(Y), expected, rtol=1e-4, atol=1e-5)
    assert fold_batchnorm(model, Y).skipped == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._dynamo's own
def test_what_remains_of_a_subclass_is_compiled_and_exported_without_the_normalization() -> None:
    model = between(Written(4))
    fold_batchnorm(model, Y)
    expected = model(Y)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(Y), expected)
    for strict in (False, True):
        names = {str(node.target) for node in torch.export.export(model, (Y,), strict=strict).graph.nodes}
        assert not [name for name in names if "norm" in name]


def test_a_fold_that_changes_the_model_is_undone_and_named_and_the_others_stay() -> None:
    model = between(Weighing(4))
    expected, state = model(Y), copy.deepcopy(model.state_dict())
    with pytest.warns(qp.QuantPatchWarning, match="3: the model failed with AttributeError"):
        report = fold_batchnorm(model, Y)
    assert report.folded == {"1": "0", "5": "4"}
    assert list(report.skipped) == ["3"]
    assert torch.allclose(model(Y), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if key[0] in "23")
    model.load_state_dict(state)
    assert torch.allclose(model(Y), expected, rtol=1e-4, atol=1e-5)


def test_how_far_off_a_model_was_is_reported() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.other, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x))
            return self.last(self.other(y)) * (self.conv.bias is None) + y

    model = lively(Watching())
    expected = model(Y)
    with pytest.warns(qp.QuantPatchWarning, match=r"changed by 0\.\d+ of its size"):
        report = fold_batchnorm(model, Y)
    assert report.folded == {"last": "other"}
    assert model.conv.bias is None
    assert torch.allclose(model(Y), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_with_a_forward_of_their_own_are_folded_into_where_that_is_right() -> None:
    for kind, right in ((Same, True), (Standardized, False)):
        model = between(nn.BatchNorm2d(4), kind)
        expected = model(Y)
        report = fold_batchnorm(model, Y)
        assert ("3" in report.folded) is right
        assert right or "another tensor than its weight" in report.skipped["3"]
        assert torch.allclose(model(Y), expected, rtol=1e-4, atol=1e-5)


def test_without_a_run_subclasses_with_a_forward_of_their_own_are_left() -> None:
    for model in (between(Activated(4)), between(nn.BatchNorm2d(4), Standardized)):
        report = fold_batchnorm(model)
        assert report.folded == {"1": "0", "5": "4"}
        assert "give the arguments" in report.skipped["3"]


def test_a_model_that_is_never_the_same_is_folded() -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x) + Counting.calls

    assert fold_batchnorm(lively(Counting(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), Y).folded == {"1": "0"}


def test_rounding_that_a_model_amplifies_is_not_taken_for_a_difference() -> None:
    class Amplifying(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(1e5 * super().forward(x))

    model = lively(Amplifying(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    expected = model(Y)
    assert fold_batchnorm(model, Y).folded == {"1": "0"}
    assert (model(Y) - expected).norm() / expected.norm() > 1e-3
    model = lively(Amplifying(nn.Conv2d(4, 4, 1), Weighing(4)))
    with pytest.warns(qp.QuantPatchWarning, match="1: the model failed"):
        assert fold_batchnorm(model, Y).folded == {}
