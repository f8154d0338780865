"""``TensorQuantizer``: its range, its stages, its state dict, and weights that change under it."""

from __future__ import annotations

import copy
import ctypes
import threading
import warnings

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import MaxCalibrator
from quantpatch.errors import ArgumentTypeError, CalibrationError, RangeError, UnknownNameError
from quantpatch.layers import QuantLinear
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import Integer
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.reports import summary


def quantizer(**kwargs):
    return TensorQuantizer(QuantDescriptor(**kwargs))


# --- the range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "not negative"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (torch.tensor([1.0, -2.0]), "-2"),
    ],
)
def test_impossible_ranges(value, message):
    q = quantizer(amax=3.0)
    with pytest.raises(RangeError, match=message):
        q.amax = value
    assert q.amax.item() == 3.0
    empty = quantizer()
    with pytest.raises(RangeError):
        empty.amax = value
    assert empty.amax is None
    assert empty.state_dict()["_amax"].isnan()


def test_a_range_keeps_its_shape_until_it_is_forgotten():
    q = quantizer(axis=0)
    q.amax = torch.ones(3, 1)
    with pytest.raises(
        RangeError, match=r"shape \(3, 1\) and cannot become one of shape \(4, 1\); set amax to None"
    ):
        q.amax = torch.ones(4, 1)
    q.amax = None
    q.amax = torch.ones(4, 1)
    assert q.amax.shape == (4, 1)


def test_a_range_is_a_copy_in_float32():
    q = quantizer()
    given = torch.tensor([2.0], dtype=torch.float64)
    q.amax = given
    given.fill_(9.0)
    assert q.amax.item() == 2.0
    assert (q.amax.dtype, q.amax.shape) == (torch.float32, ())
    before = q.amax
    q.amax = 4
    assert q.amax is before  # in place: what refers to it goes on doing so
    assert before.item() == 4.0


def test_a_given_range_survives_the_meta_device():
    with torch.device("meta"):
        q = quantizer(amax=2.0)
    assert q.amax.item() == 2.0
    q.to_empty(device="cpu")
    assert q.amax.item() == 2.0


@pytest.mark.parametrize("learned", [False, True])
def test_a_meta_tensor_meets_a_range_for_each_channel_that_stays_where_it_is(learned):
    q = quantizer(axis=0, learn_amax=learned)
    q.amax = torch.tensor([[1.0], [2.0]])
    assert q(torch.ones(2, 3, device="meta")).is_meta
    assert q.amax.flatten().tolist() == [1.0, 2.0]


def test_casts_leave_the_range_exact():
    q = quantizer()
    q.amax = 0.1
    exact = q.amax.clone()
    for cast in (q.half, q.bfloat16, q.double, lambda: q.to(torch.float16), q.float):
        cast()
        assert q.amax.dtype == torch.float32
        assert torch.equal(q.amax, exact)


def test_the_range_goes_where_the_model_goes_but_not_after_a_tensor_to_where_it_would_be_lost():
    q = quantizer()
    q.amax = 1.0
    q.to("meta")
    assert q.amax.is_meta
    q = quantizer()
    q.amax = 1.0
    assert q(torch.ones(2, device="meta")).is_meta
    assert q.amax == 1.0


# --- state dict -----------------------------------------------------------------------------------


def test_the_state_is_there_before_the_range_is_known():
    q = quantizer()
    assert list(q.state_dict()) == ["_amax"]
    assert q.state_dict()["_amax"].isnan()
    q.amax = 1.5
    assert list(q.state_dict()) == ["_amax"]
    fresh = quantizer()
    fresh.load_state_dict(q.state_dict(), strict=True)
    assert fresh.amax.item() == 1.5
    fresh.load_state_dict({}, strict=True)  # a float checkpoint says nothing of ranges
    assert fresh.amax.item() == 1.5


def test_a_checkpoint_of_another_precision_becomes_float32():
    for assign in (False, True):
        q = quantizer()
        q.load_state_dict({"_amax": torch.tensor(1.5, dtype=torch.float16)}, assign=assign)
        assert q.amax.dtype == torch.float32
        assert q.amax.item() == 1.5


def test_bad_checkpoints():
    q = quantizer(axis=0)
    q.amax = torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        q.load_state_dict({"_amax": torch.ones(4, 1)})
    with pytest.raises(RuntimeError, match="finite and not negative"):
        q.load_state_dict({"_amax": -torch.ones(3, 1)})
    assert torch.equal(q.amax, torch.ones(3, 1))


# --- stages ---------------------------------------------------------------------------------------


def test_stages_and_what_they_say():
    q = quantizer()
    x = torch.tensor([0.3, -1.0])
    assert q.state == "dynamic (not calibrated)"
    assert not torch.equal(q(x), x)
    q.enable_calib()
    assert q.state == "calibrating and quantizing"
    q.disable_quant()
    assert q.state == "calibrating"
    assert q(x) is x
    q.disable_calib()
    assert q.state == "not quantizing"
    assert not q.is_active
    q.load_calib_amax()
    q.enable_quant()
    assert q.state == "calibrated"
    assert q.amax.item() == 1.0
    q.disable()
    assert q.state == "disabled"
    assert q(x) is x
    q.enable()
    assert torch.equal(q(x), fake_quantize(x, torch.tensor(1.0), Integer(8)))
    assert quantizer(dynamic=True).state == "dynamic"
    learned = quantizer(learn_amax=True, amax=1.0)
    assert learned.state == "learned"


def test_disabled_collects_nothing():
    q = quantizer()
    q.enable_calib()
    q.disable()
    q(torch.ones(3))
    assert not q.calibrator.saw_data


def test_what_is_printed():
    assert repr(quantizer()) == "TensorQuantizer(int8, dynamic (not calibrated))"
    assert repr(quantizer(num_bits=4, axis=1, amax=1.0)) == "TensorQuantizer(int4, axis=1, calibrated)"
    assert repr(quantizer(format="mxfp4", dynamic=True)) == "TensorQuantizer(mxfp4, dynamic)"


def test_calibration_errors():
    with pytest.raises(CalibrationError, match="nothing to calibrate"):
        quantizer(dynamic=True).enable_calib()
    with pytest.raises(CalibrationError, match="enable_calib"):
        quantizer().load_calib_amax()
    with pytest.raises(UnknownNameError, match="'max'"):
        quantizer(method="maxx").enable_calib()
    with pytest.raises(UnknownNameError, match="format"):
        quantizer(format="int9")
    q = quantizer()
    q.enable_calib()
    with pytest.raises(CalibrationError) as caught:
        q(torch.tensor([1.0, float("nan")]))
    assert caught.value.quantizer is q
    with pytest.raises(CalibrationError):
        q.load_calib_amax()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))
        self.spectrum = nn.Linear(4, 4, dtype=torch.complex64)

    def forward(self, x):
        return self.spectrum(torch.as_tensor(self.body(x)).to(torch.complex64)).real


@pytest.mark.parametrize(
    ("x", "name", "got"),
    [
        (torch.ones(2, 4, dtype=torch.int32), "body.0.input_quantizer", r"torch\.int32"),
        (None, "body.0.input_quantizer", "NoneType"),
        (torch.ones(2, 4).numpy(), "body.0.input_quantizer", "ndarray"),
        (torch.ones(2, 4), "spectrum.input_quantizer", r"torch\.complex64"),
    ],
)
@pytest.mark.parametrize("state", ["dynamic", "static", "calibrating"])
def test_the_error_for_what_cannot_be_quantized_has_the_quantizer_and_its_name(x, name, got, state):
    with qp.quantize_modules():
        model = Nested()
    if state == "static":
        model.body[0].input_quantizer.amax = 1.0
    with pytest.raises(ArgumentTypeError, match=rf"^{name}: only .* got {got}") as caught:
        qp.calibrate(model, lambda model: model(x)) if state == "calibrating" else model(x)
    assert caught.value.quantizer is model.get_submodule(name)
    assert isinstance(caught.value, TypeError)
    assert ("qp.configure(model, {name: None})" in str(caught.value)) is isinstance(x, torch.Tensor)


def masked(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype of torch
        return torch.masked.masked_tensor(x, x > 0)


def of_rows(x, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x[:1], x], layout=layout)


ODD = {
    "sparse_coo": (lambda x: x.to_sparse(), r"x\.to_dense\(\)"),
    "sparse_csr": (lambda x: x.to_sparse_csr(), r"x\.to_dense\(\)"),
    "_mkldnn": (lambda x: x.to_mkldnn(), r"x\.to_dense\(\)"),
    "masked": (masked, r"x\.to_tensor\(0\.0\)"),
    "nested": (lambda x: of_rows(x, torch.strided), "to_padded_tensor"),
    "a nested one": (lambda x: of_rows(x, torch.jagged), "to_padded_tensor"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("state", ["dynamic", "static", "calibrating"])
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*[Mm]asked")
def test_a_tensor_that_is_not_dense_is_refused_with_what_makes_it_so(kind, state):
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 2))
    make, advice = ODD[kind]
    x = make(torch.ones(3, 4))
    if state == "static":
        if kind in ("masked", "a nested one"):
            return  # torch divides and rounds these; whatever comes next is the float layer's affair
        model[0].input_quantizer.amax = 1.0
    with pytest.raises(ArgumentTypeError, match=rf"{kind}.*{advice}") as caught:
        qp.calibrate(model, lambda model: model(x)) if state == "calibrating" else model(x)
    assert str(caught.value).startswith("0.input_quantizer: ")
    assert str(caught.value).count("input_quantizer") == 1
    assert "qp.configure(model, {name: None})" in str(caught.value)
    assert caught.value.quantizer is model[0].input_quantizer


def test_an_error_that_has_nothing_to_do_with_the_tensor_stays_what_it_is():
    class Broken(TensorQuantizer):
        def _quantized(self, *args):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else$"):
        Broken()(torch.ones(2))


def test_the_error_for_a_range_that_does_not_fit_has_the_quantizer_and_its_name():
    with qp.quantize_modules():
        model = Nested()
    model.body[0].weight_quantizer.amax = torch.ones(3, 1)
    message = r"^body\.0\.weight_quantizer: a range of shape \(3, 1\)"
    for run in (lambda x: model(x), lambda x: qp.audit(model, x)):
        with pytest.raises(RangeError, match=message) as caught:
            run(torch.ones(2, 4))
        assert caught.value.quantizer is model.body[0].weight_quantizer


def test_an_error_has_the_name_that_the_quantizer_has_in_what_runs():
    with qp.quantize_modules():
        model = Nested()
    trainer = nn.ModuleDict({"net": model})
    with pytest.raises(ArgumentTypeError, match=r"^net\.body\.0\.input_quantizer: only real floating-point"):
        trainer["net"](torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ArgumentTypeError, match="^only real floating-point"):
        TensorQuantizer()(torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("given", ["int8", 8, qp.Recipe(name="r")])
def test_what_is_not_a_descriptor_is_an_error_that_shows_one(given):
    with pytest.raises(ArgumentTypeError, match=r"takes a QuantDescriptor, such as .*, not"):
        TensorQuantizer(given)


def test_a_calibrator_of_ones_own():
    q = quantizer()
    mine = MaxCalibrator(q.format)
    q.enable_calib(mine)
    q(torch.tensor([1.0, -5.0]))
    q.load_calib_amax()
    assert q.amax.item() == 5.0
    mine.collect(torch.tensor([9.0]))
    assert q.amax.item() == 5.0  # the calibrator's tensor is its own


def test_scale_amax_does_not_compound():
    q = quantizer(scale_amax=0.5)
    q.enable_calib()
    q(torch.tensor([4.0]))
    for _ in range(3):
        q.load_calib_amax()
        assert q.amax.item() == 2.0


def test_formats_in_blocks_calibrate_one_range():
    q = quantizer(format="nvfp4", axis=-1)
    q.enable_calib()
    x = torch.randn(4, 32)
    q(x)
    q.disable_calib()
    q.load_calib_amax()
    assert torch.equal(q.amax, x.abs().max())
    assert torch.equal(q(x), quantizer(format="nvfp4", axis=-1)(x))


def test_a_learned_range_is_trained():
    q = quantizer(num_bits=4, learn_amax=True)
    (parameter,) = q.parameters()
    assert parameter.shape == (1,)
    q.enable_calib()
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    q(x)
    q.disable_calib()
    q.load_calib_amax()
    assert [name for name, _ in q.named_parameters()] == ["_amax"]
    assert q.amax is parameter
    q.amax = 8.0  # much too large for a normal distribution
    optimizer = torch.optim.SGD(q.parameters(), lr=50.0)

    def error():
        return (q(x) - x).square().mean()

    before = error().item()
    for _ in range(200):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.5 * before
    assert 1.0 < q.amax.item() < 6.0
    q.half()
    assert isinstance(q.amax, nn.Parameter)
    assert q.amax.dtype == torch.float32
    twin = copy.deepcopy(q)
    assert isinstance(twin.amax, nn.Parameter)
    fresh = quantizer(num_bits=4, learn_amax=True)
    fresh.load_state_dict(q.state_dict())
    assert isinstance(fresh.amax, nn.Parameter)


@pytest.mark.parametrize("unsigned", [False, True])
def test_of_a_learned_range_the_magnitude_counts(unsigned):
    """An optimizer may carry it past zero, and what it saves then has to load again."""
    q = quantizer(learn_amax=True, unsigned=unsigned)
    q.amax = 1.5
    x = torch.linspace(-2, 2, 50)
    expected = q(x)
    with torch.no_grad():
        q.amax.neg_()
    assert torch.equal(q(x), expected)
    q(x).relu().sum().backward()
    assert q.amax.grad < 0  # a larger range still means a larger sum
    again = quantizer(learn_amax=True, unsigned=unsigned)
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), expected)
    (row,) = summary(nn.Sequential(q)).rows
    assert row.amax_max == 1.5


# --- weights that change ----------------------------------------------------------------------------


def layer_in_use(cls=QuantLinear, *args):
    torch.manual_seed(0)
    layer = cls(*(args or (6, 4))).eval()
    weight = layer.weight
    layer.weight_quantizer.amax = torch.full([weight.shape[0]] + [1] * (weight.dim() - 1), 0.7)
    forward(layer)
    return layer


def forward(layer):
    x = torch.ones(1, 6) if isinstance(layer, nn.Linear) else torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        return layer(x.to(layer.weight.dtype))


def assert_fresh(layer):
    """The output is what a layer gives that never ran before."""
    twin = copy.deepcopy(layer)
    assert torch.equal(forward(layer), forward(twin))


def copy_in(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))


def optimizer_step(layer):
    layer(torch.randn(2, 6)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_step(layer):
    layer(torch.randn(2, 6)).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True).step()


def swap_data(layer):
    layer.weight.data = torch.randn_like(layer.weight.data)


def swap_storage(layer):
    with torch.no_grad():
        layer.weight.set_(torch.randn_like(layer.weight))


def multiply_data(layer):
    layer.weight.data.mul_(0.5)


def set_one_element_of_data(layer):
    layer.weight.data[2, 3] += 0.2


def through_numpy(layer):
    layer.weight.detach().numpy()[1, 4] *= -1.5


def through_memory(layer):
    """As kernels do that are handed an address."""
    number = (ctypes.c_float * 1).from_address(layer.weight.data_ptr() + 4 * 7)
    number[0] += 0.2


def in_another_thread(layer):
    thread = threading.Thread(target=through_numpy, args=(layer,))
    thread.start()
    thread.join()


def load(layer):
    layer.load_state_dict({k: 0.5 * v for k, v in layer.state_dict().items()})


def load_by_assigning(layer):
    layer.load_state_dict({k: 0.5 * v for k, v in layer.state_dict().items()}, assign=True)


def new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def cast(layer):
    layer.double()


def set_range(layer):
    layer.weight_quantizer.amax = torch.full((4, 1), 0.2)


def change_range(layer):
    with torch.no_grad():
        layer.weight_quantizer.amax.mul_(0.5)


def change_data_of_range(layer):
    layer.weight_quantizer.amax.data[2] = 0.1


def forget_range(layer):
    layer.weight_quantizer.amax = None


def other_descriptor(layer):
    q = layer.weight_quantizer
    q.descriptor = QuantDescriptor(num_bits=3, axis=0)
    q._format = Integer(3)


def swapped_tensors(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight)))


CHANGES = [copy_in, optimizer_step, fused_step, swap_data, swap_storage, multiply_data,
           set_one_element_of_data, through_numpy, through_memory, in_another_thread, load,
           load_by_assigning, new_parameter, cast, set_range, change_range, change_data_of_range,
           forget_range, other_descriptor, swapped_tensors]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen_by_the_next_call(change):
    layer = layer_in_use()
    before = forward(layer)
    change(layer)
    assert not torch.equal(forward(layer).to(before.dtype), before)
    assert_fresh(layer)


@pytest.mark.parametrize("shape", [(64, 6), (700, 6)], ids=["by torch", "by a kernel"])
@pytest.mark.parametrize("train", [False, True])
def test_whichever_element_changes_is_seen(shape, train):
    """Large weights go through a kernel, which those of 4096 elements and more do."""
    rows, columns = shape
    layer = QuantLinear(columns, rows, bias=False).train(train)
    layer.weight_quantizer.amax = 2.0
    x = torch.ones(1, columns)
    layer.input_quantizer.disable()
    with torch.no_grad():
        layer(x)
        for row in range(0, rows, 7):
            layer.weight.data[row] = 1.0
            assert (layer(x)[0, row] - columns).abs() < 0.1


def test_ranges_changed_through_data_are_seen_by_a_compiled_layer():
    layer = layer_in_use()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(torch.ones(1, 6))
        layer.weight_quantizer.amax.data.mul_(0.5)
        layer.weight.data[0] = 0.0
        after = compiled(torch.ones(1, 6))
    assert not torch.equal(after, before)
    assert torch.equal(after, forward(layer))


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_moves_to_another_device_and_back_are_seen(device):
    layer = layer_in_use()
    before, state = forward(layer), {k: v.clone() for k, v in layer.state_dict().items()}
    layer.to(device)
    with torch.no_grad():
        moved = layer(torch.ones(1, 6, device=device))
    assert moved.device.type == device
    if device == "meta":
        layer.to_empty(device="cpu").load_state_dict(state)
    else:
        torch.testing.assert_close(moved.cpu(), before)
        layer.cpu()
    assert_fresh(layer)
    assert torch.equal(forward(layer), before)


def test_a_gradient_is_there_after_calls_without():
    layer = layer_in_use()
    layer(torch.ones(1, 6)).sum().backward()
    assert layer.weight.grad is not None


def test_a_tied_weight_is_seen_by_both_of_its_layers():
    first, second = layer_in_use(), layer_in_use()
    second.weight = first.weight
    forward(second)
    copy_in(first)
    assert_fresh(first)
    assert_fresh(second)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for clamp_
def test_functional_call_and_transforms():
    layer = layer_in_use()
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.named_parameters()}
    x = torch.ones(1, 6)
    with torch.no_grad():
        both = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)), randomness="error")(stacked)
        torch.testing.assert_close(both[0], layer(x))
    layer.requires_grad_(False)
    layer.input_quantizer.disable()
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    assert gradient.shape == x.shape
    assert_fresh(layer)


def test_hooks_on_the_quantizer_still_run():
    layer = layer_in_use()
    seen = []
    layer.weight_quantizer.register_forward_hook(lambda *args: seen.append(args))
    forward(layer)
    forward(layer)
    assert len(seen) == 2
