"""prepare: batch norm folded, and quantizers where a runtime's integer kernels want them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import UnknownNameError
from quantpatch.export import Preparation, load, prepare, save
from quantpatch.layers import Add


class Block(nn.Module):
    """A residual block whose activation is a function."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + x)


class Forked(nn.Module):
    """Skip connections by concatenation, with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.down = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(torch.cat([y, self.up(self.down(self.pool(y)))], 1))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(256, 5)
    )


def built(make: object, recipe: str = "int8") -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        return make().eval()  # type: ignore[operator]


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(make: object, **options: object) -> tuple[nn.Module, Preparation]:
    model = built(make)
    report = prepare(model, X, **options)  # type: ignore[arg-type]
    return model, report


def test_residual_additions_have_quantized_operands_and_results() -> None:
    model, report = prepared(residual)
    assert report.placed == (
        "1.output_quantizer",  # behind the ReLU
        "2.body.3.output_quantizer",  # convolutions that go into an addition
        "3.body.3.output_quantizer",
        "2.output_quantizer",  # what the next block adds
    )
    assert report.skipped == {}
    assert set(report.batchnorm.folded) == {"2.body.1", "2.body.4", "3.body.1", "3.body.4"}
    assert model[2]._forward_hooks


def test_a_tensor_is_quantized_once_for_all_who_take_it() -> None:
    model, report = prepared(residual)
    assert report.shared == {
        "2.body.0.input_quantizer": "1.output_quantizer",
        "3.body.0.input_quantizer": "2.output_quantizer",
    }
    assert model[2].body[0].input_quantizer is model[1].output_quantizer
    qp.calibrate(model, [X], progress=False)
    y = model[1](model[0](X))
    assert torch.equal(model[1].output_quantizer(y), y)


def test_what_follows_a_relu_is_unsigned_before_any_data_is_seen() -> None:
    model, report = prepared(residual)
    assert set(report.unsigned) == {
        "1.output_quantizer",
        "2.output_quantizer",
        "2.body.3.input_quantizer",
        "3.body.3.input_quantizer",
        "5.input_quantizer",
    }
    assert model[2].body[3].output_quantizer.format.name == "int8"
    assert model[0].input_quantizer.format.name == "int8"


@pytest.mark.parametrize(
    ("before", "unsigned"),
    [
        (nn.ReLU6(), True),
        (nn.Sigmoid(), True),
        (nn.Softmax(1), True),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), True),
        (nn.Hardtanh(), False),
        (nn.Hardswish(), False),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), False),
    ],
)
def test_what_is_never_negative_is_known_from_the_operators(before: nn.Module, unsigned: bool) -> None:
    model, report = prepared(lambda: nn.Sequential(copy.deepcopy(before), nn.Conv2d(3, 4, 1)).eval())
    assert (model[1].input_quantizer.format.name == "uint8") is unsigned
    assert ("1.input_quantizer" in report.unsigned) is unsigned


def test_concatenations_have_quantized_operands_that_max_pooling_passes_on() -> None:
    model, report = prepared(Forked)
    assert set(report.placed) == {
        "first.1.output_quantizer",
        "up.output_quantizer",
        "last.output_quantizer",
    }
    assert report.shared == {"down.input_quantizer": "first.1.output_quantizer"}
    assert model.last.input_quantizer.format.name == "int8"


def test_preparing_again_changes_nothing() -> None:
    model, _ = prepared(residual)
    names = [name for name, _ in model.named_modules()]
    again = prepare(model, X)
    assert (again.placed, again.shared, again.unsigned) == ((), {}, ())
    assert [name for name, _ in model.named_modules()] == names
    assert len(model[2]._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._dynamo's own
def test_the_model_computes_with_what_was_placed() -> None:
    model, _ = prepared(residual)
    qp.calibrate(model, [X], progress=False)
    before = model(X)
    model[2].output_quantizer.disable()
    assert not torch.equal(model(X), before)
    model[2].output_quantizer.enable()
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, backend="eager"),
    ):
        assert torch.equal(twin(X), before)


def test_training_goes_through_what_was_placed() -> None:
    model, _ = prepared(residual)
    qp.calibrate(model, [X], progress=False)
    model.train()(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_checkpoint_brings_what_was_placed_and_shared(tmp_path) -> None:
    model, report = prepared(residual)
    qp.calibrate(model, [X], progress=False)
    save(model, tmp_path / "m.safetensors")

    def build() -> nn.Module:
        fresh = residual().eval()
        qp.fold_batchnorm(fresh)
        return fresh

    for start in (build, lambda: (lambda m: (qp.convert(m), m)[1])(build())):
        again = load(start, tmp_path / "m.safetensors").eval()
        assert torch.equal(again(X), model(X))
        assert again[2].body[0].input_quantizer is again[1].output_quantizer
        assert set(again.state_dict()) == set(model.state_dict())
    # A file without them takes them out of a model that has them.
    plain = build()
    qp.convert(plain)
    qp.calibrate(plain, [X], progress=False)
    save(plain, tmp_path / "plain.safetensors")
    load(model, tmp_path / "plain.safetensors")
    assert torch.equal(model(X), plain(X))
    assert not model[2]._forward_hooks
    assert not [name for name, _ in model.named_modules() if name in report.placed]


def test_revert_takes_out_what_was_placed() -> None:
    model, _ = prepared(residual)
    qp.revert(model)
    assert not [m for m in model.modules() if isinstance(m, qp.TensorQuantizer) or m._forward_hooks]


def test_an_operand_that_no_module_gives_is_named_with_what_to_do() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x) + torch.tanh(x))

    _, report = prepared(lambda: nn.Sequential(Inside()))
    assert list(report.skipped) == ["0"]
    assert "nn.ReLU" in report.skipped["0"]
    assert "left: what it adds" in str(report)
    _, report = prepared(Inside)
    assert "what the model itself computes" in str(report)


def test_a_layer_that_runs_twice_gets_no_range_for_two_tensors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(torch.tanh(self.layer(x))))

    _, report = prepared(Twice)
    assert report.placed == ()
    assert "more than once" in report.skipped["layer"]


def test_data_dependent_code_is_followed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x))) if x.sum() != 0 else x

    assert prepared(Branching)[1].placed == ("first.output_quantizer", "second.output_quantizer")


def test_what_the_model_returns_is_quantized_where_a_convolution_gives_it() -> None:
    """Else ONNX Runtime runs the convolution on floats."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), Block(3)
            self.flat = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.first(x)
            return self.block(y), self.flat(y), y.tanh()

    _, report = prepared(Two)
    assert set(report.placed) == {
        "first.1.output_quantizer",
        "block.output_quantizer",
        "block.body.3.output_quantizer",
        "flat.0.output_quantizer",
    }
    assert report.skipped == {}
    assert prepared(lambda: nn.Sequential(nn.Linear(8, 4)))[1].placed == ()  # its kernel gives floats


def test_outputs_stay_float_if_asked_and_are_named() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.ReLU())

    _, report = prepared(build, outputs=False)
    assert report.placed == ("0.output_quantizer",)
    assert list(report.skipped) == ["2"]
    assert "outputs=False" in report.skipped["2"]


def test_a_quantizer_stands_behind_what_moves_values_where_none_can_stand_before() -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.up, self.last = nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x) + self.second(x))
            return self.last(torch.tanh(self.up(y)))

    _, report = prepared(Coarse)
    assert report.skipped == {}
    assert "up.output_quantizer" in report.placed


def test_what_a_quantizer_at_an_output_changes_is_undone_and_named() -> None:
    class Counting(nn.Module):
        """Computes something else where its convolution has a hook."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.last = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.act(self.conv(x)))) + len(self.act._forward_hooks)

    model = built(Counting)
    with pytest.warns(qp.QuantPatchWarning, match=r"act is left: .* changed by \d"):
        report = prepare(model, X)
    assert "act.output_quantizer" not in report.placed
    assert "undone" in report.skipped["act"]
    assert not model.act._forward_hooks
    assert not [name for name, _ in model.named_modules() if name.startswith("act.")]


def test_linear_layers_and_float_activations_get_none() -> None:
    assert prepared(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))[1].placed == ()
    model = built(residual, "int8-weight-only")
    assert prepare(model, X).placed == ()


def test_operations_that_are_modules_have_their_quantizers_already() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.add = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Add()
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.add(self.one(x), self.two(x)))

    assert prepared(Added)[1].placed == ("last.output_quantizer",)


def stem(activation: nn.Module, channels: int = 3, size: int = 3, groups: int = 1) -> nn.Module:
    """A convolution of images, and what follows."""
    first = nn.Conv2d(channels, 12, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(12), activation, nn.Conv2d(12, 5, 1), nn.ReLU())


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU(inplace=True), nn.GELU("tanh")])
def test_images_stay_float_where_a_small_convolution_has_an_activation_without_an_integer_kernel(
    activation: nn.Module,
) -> None:
    model, report = prepared(lambda: stem(activation))
    assert list(report.skipped) == ["0"]
    assert "switched off" in report.skipped["0"]
    assert report.placed == ("4.output_quantizer",)
    off = [name for name, m in model.named_modules() if isinstance(m, qp.TensorQuantizer) and m.disabled]
    assert off == ["0.input_quantizer", "0.weight_quantizer"]
    qp.calibrate(model, [X], progress=False)  # and nothing has to be said of those
    (unquantized,) = [line for line in qp.audit(model, X).rows if line.reason]
    assert "switched off" in unquantized.reason
    again = prepare(model, X)
    assert (again.placed, again.skipped) == ((), {})
    assert [name for name, m in model.named_modules() if getattr(m, "disabled", False)] == off


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (lambda: stem(nn.ReLU()), "ONNX Runtime's integer convolution gives what comes out of a ReLU"),
        (lambda: stem(nn.Hardswish(), size=7), "147 products are faster on integers"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), stem(nn.Hardswish(), channels=4)), "four channels"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.Flatten(), nn.Hardswish()),
            "no activation right behind",
        ),
    ],
)
def test_other_convolutions_of_images_are_quantized(first, why: str) -> None:
    model, report = prepared(first)
    assert report.skipped == {}, why
    assert not [m for m in model.modules() if isinstance(m, qp.TensorQuantizer) and m.disabled], why


@pytest.mark.parametrize(("inside", "outside", "slow"), [(1, 32, True), (1, 33, False), (2, 8, False)])
def test_images_of_one_channel_that_become_few_stay_float(inside: int, outside: int, slow: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(inside, outside, 5), nn.ReLU(), nn.Conv2d(outside, 8, 1), nn.ReLU())

    model = built(make)
    report = prepare(model, torch.randn(1, inside, 8, 8))
    assert list(report.skipped) == (["0"] if slow else [])
    assert (
        not slow or f"faster on floats where images of one channel become {outside};" in report.skipped["0"]
    )
    assert (model[0].input_quantizer.disabled, model[0].weight_quantizer.disabled) == (slow, slow)
    assert report.placed == ("3.output_quantizer",)


def test_one_channel_of_integers_goes_on_in_integers() -> None:
    """A convolution of one channel that takes what another gives: its input is integers already."""
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 16, 3), nn.ReLU()))
    assert prepare(model, X).skipped == {}


@pytest.mark.parametrize(
    ("inside", "outside", "groups", "text"),
    [
        (3, 96, 1, "where 3 channels become 96;"),
        (8, 24, 1, "where 8 channels become 24;"),
        (32, 32, 4, "where 8 channels become 8 in each group;"),
        (3, 3, 3, "where 1 channels become 1 in each group;"),
    ],
)
def test_a_convolution_of_volumes_with_few_channels_stays_float(inside, outside, groups, text) -> None:
    model = built(lambda: nn.Sequential(nn.Conv3d(inside, outside, 3, padding=1, groups=groups), nn.ReLU()))
    x = torch.randn(1, inside, 4, 4, 4)
    report = prepare(model, x)
    assert list(report.skipped) == ["0"]
    assert text in report.skipped["0"]
    assert report.placed == ()
    assert model[0].input_quantizer.disabled
    assert model[0].weight_quantizer.disabled


@pytest.mark.parametrize(
    ("inside", "outside", "groups"), [(8, 32, 1), (16, 16, 1), (32, 32, 2), (16, 16, 16)]
)
def test_other_convolutions_of_volumes_are_quantized(inside, outside, groups) -> None:
    model = built(lambda: nn.Sequential(nn.Conv3d(inside, outside, 3, padding=1, groups=groups), nn.ReLU()))
    report = prepare(model, torch.randn(1, inside, 4, 4, 4))
    assert report.skipped == {}
    assert report.placed == ("1.output_quantizer",)
    assert not model[0].input_quantizer.disabled


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize(
    ("inside", "outside", "groups", "slow"),
    [(16, 16, 4, True), (16, 32, 4, True), (8, 16, 8, True), (16, 16, 2, False), (8, 8, 8, False)],
)
def test_groups_of_few_channels_stay_float(kind, inside, outside, groups, slow) -> None:
    """Others, and depthwise convolutions, have integer kernels that are faster."""

    def make() -> nn.Module:
        grouped = kind(inside, outside, 3, padding=1, groups=groups)
        first, last = kind(16, inside, 1), kind(outside, 16, 1)
        return nn.Sequential(first, nn.ReLU(), grouped, nn.ReLU(), last, nn.ReLU())

    model = built(make)
    report = prepare(model, torch.randn(1, 16, *[6] * (1 if kind is nn.Conv1d else 2)))
    assert list(report.skipped) == (["2"] if slow else [])
    # Where the first one's result goes into floats it has a quantizer of its own.
    assert report.placed == (*(["1.output_quantizer"] if slow else []), "5.output_quantizer")
    assert model[2].input_quantizer.disabled == slow
    assert not model[0].input_quantizer.disabled
    assert not model[4].input_quantizer.disabled


def test_tensorrt_has_all_convolutions_of_volumes_on_integers() -> None:
    model = built(lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU()))
    assert prepare(model, torch.randn(1, 3, 4, 4, 4), runtime="tensorrt").skipped == {}
    assert not model[0].input_quantizer.disabled


def test_a_convolution_stays_quantized_where_another_layer_shares_its_quantizer() -> None:
    model = built(lambda: stem(nn.Hardswish()))
    model[3].input_quantizer = model[0].input_quantizer
    assert prepare(model, X).skipped == {}
    assert not model[0].input_quantizer.disabled


def test_tensorrt_wants_the_skip_quantized_and_nothing_unsigned() -> None:
    """ "Working with Quantized Types", Q/DQ placement: quantize the residual input of an addition."""
    _, report = prepared(residual, runtime="tensorrt")
    assert report.placed == ("1.output_quantizer", "2.output_quantizer")
    assert report.unsigned == ()


def test_wrong_arguments() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        prepare(built(residual), X, runtime="onnx")
    model = built(residual).train()
    with pytest.raises(qp.QuantPatchError, match=r"model\.eval"):
        prepare(model, X)
