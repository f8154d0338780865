"""What holds for every calibrator, and the two that average maxima."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

from quantpatch.calibrators import (
    BUILTIN_CALIBRATORS,
    MaxCalibrator,
    MovingAverageCalibrator,
    PercentileCalibrator,
)
from quantpatch.errors import CalibrationError
from quantpatch.numerics.formats import Integer

INT8 = Integer(8)
every_calibrator = pytest.mark.parametrize("kind", BUILTIN_CALIBRATORS.values(), ids=BUILTIN_CALIBRATORS)
# Of the calibrators that share their statistics, the histogram, the cheapest.
every_statistic = pytest.mark.parametrize(
    "kind", [MaxCalibrator, MovingAverageCalibrator, PercentileCalibrator]
)


def batches(count: int = 3, shape: tuple[int, ...] = (4, 6, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * (i + 1) for i in range(count)]


def calibrated(kind, data, axis=None, **options):
    calibrator = kind(INT8, axis, **options)
    for x in data:
        calibrator.collect(x)
    return calibrator


def test_the_builtin_calibrators_have_their_names():
    assert list(BUILTIN_CALIBRATORS) == ["max", "moving_average", "entropy", "mse", "percentile", "sqnr"]


# Shapes.


@every_statistic
@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (None, ()),
        (0, (4, 1, 1)),
        (-1, (1, 1, 5)),
        ((0,), (4, 1, 1)),
        ((0, 2), (4, 1, 5)),
        ((-1, 0), (4, 1, 5)),
        ((0, 1, 2), (4, 6, 5)),
        ((), (1, 1, 1)),
    ],
)
def test_the_range_has_the_kept_axes(kind, axis, shape):
    amax = calibrated(kind, batches(), axis).compute_amax()
    assert amax.shape == shape
    assert amax.dtype == torch.float32
    assert bool((amax > 0).all())


@every_calibrator
def test_each_channel_has_the_range_it_would_have_alone(kind):
    data = batches()
    together = calibrated(kind, data, 1).compute_amax()
    alone = [calibrated(kind, [x[:, c] for x in data]).compute_amax() for c in range(6)]
    assert torch.equal(together.flatten(), torch.stack(alone))


@every_calibrator
def test_a_scalar_tensor_is_data(kind):
    amax = calibrated(kind, [torch.tensor(-2.0)]).compute_amax()
    assert amax.item() == pytest.approx(2.0, rel=0.02)


@every_statistic
def test_kept_axes_of_another_length_are_an_error(kind):
    calibrator = calibrated(kind, [torch.ones(4, 3)], 0)
    before = calibrator.compute_amax()
    with pytest.raises(CalibrationError, match=r"batch 2 .*\(5, 1\).*before gave \(4, 1\)"):
        calibrator.collect(torch.ones(5, 3))
    assert torch.equal(calibrator.compute_amax(), before)


@every_statistic
def test_other_axes_may_change_their_length(kind):
    calibrator = calibrated(kind, [torch.ones(2, 4), torch.ones(5, 4)], 1)
    assert calibrator.compute_amax().shape == (1, 4)


@every_statistic
def test_a_tensor_without_the_kept_axis_is_an_error(kind):
    calibrator = kind(INT8, 2)
    with pytest.raises(CalibrationError, match="no axis 2 to keep"):
        calibrator.collect(torch.ones(3, 3))
    assert not calibrator.saw_data


# Values.


@every_statistic
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [None, 0])
def test_values_that_are_not_finite_are_counted_in_an_error_and_not_collected(kind, bad, axis):
    data = batches()
    calibrator = calibrated(kind, data, axis)
    before = calibrator.compute_amax()
    data[0][1, 2, 3] = data[0][3, 0, 0] = bad
    with pytest.raises(CalibrationError, match="2 of the 120 values of batch 4 are NaN or infinite") as error:
        calibrator.collect(data[0])
    assert (error.value.batch, error.value.count) == (4, 2)
    assert torch.equal(calibrator.compute_amax(), before)


@every_statistic
def test_a_first_batch_that_is_not_finite_leaves_no_data(kind):
    calibrator = kind(INT8)
    with pytest.raises(CalibrationError, match="1 of the 1 values of batch 1"):
        calibrator.collect(torch.tensor([torch.nan]))
    assert not calibrator.saw_data


@every_statistic
def test_a_float64_value_beyond_float32_is_an_error(kind):
    with pytest.raises(CalibrationError, match="infinite in float32"):
        kind(INT8).collect(torch.tensor([1e300], dtype=torch.float64))


@every_calibrator
def test_the_largest_and_the_smallest_floats_are_taken(kind):
    largest = torch.finfo(torch.float32).max
    amax = calibrated(kind, [torch.tensor([1e-45, largest, -largest])]).compute_amax()
    assert amax.isfinite()
    tiny = calibrated(kind, [torch.tensor([1e-45])]).compute_amax()
    assert tiny.item() == torch.tensor(1e-45).item()


@every_statistic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_give_what_their_float32_values_give(kind, dtype):
    data = [(10 * x).to(dtype) for x in batches()]
    amax = calibrated(kind, data).compute_amax()
    assert torch.equal(amax, calibrated(kind, [x.float() for x in data]).compute_amax())


@every_calibrator
def test_zeros_alone_give_zero(kind):
    assert calibrated(kind, [torch.zeros(3, 4)]).compute_amax().item() == 0.0
    assert calibrated(kind, [torch.zeros(3, 4)], 0).compute_amax().tolist() == [[0.0]] * 3


@every_statistic
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, ::2, 1:],
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
        lambda x: x.flip(2)[:1],
    ],
)
@pytest.mark.parametrize("axis", [None, 1])
def test_any_memory_layout_gives_the_same(kind, layout, axis):
    x = layout(batches(1, (3, 4, 5, 6))[0])
    plain = calibrated(kind, [x.clone(memory_format=torch.contiguous_format)], axis)
    assert torch.equal(calibrated(kind, [x], axis).compute_amax(), plain.compute_amax())


# No data.


@every_calibrator
def test_no_data_is_an_error(kind):
    calibrator = kind(INT8)
    assert not calibrator.saw_data
    with pytest.raises(CalibrationError, match="saw no data"):
        calibrator.compute_amax()


@every_calibrator
@pytest.mark.parametrize("axis", [None, 1])
def test_an_empty_tensor_is_not_data(kind, axis):
    calibrator = calibrated(kind, [torch.empty(0, 3)], axis)
    assert not calibrator.saw_data
    with pytest.raises(CalibrationError, match="1 batches, none with a value"):
        calibrator.compute_amax()
    calibrator.collect(torch.ones(2, 3))
    before = calibrator.compute_amax()
    calibrator.collect(torch.empty(0, 3))
    assert torch.equal(calibrator.compute_amax(), before)


@every_calibrator
def test_reset_forgets_everything(kind):
    small, large = torch.linspace(-1, 1, 50), torch.linspace(-9, 9, 50)
    calibrator = calibrated(kind, [large])
    calibrator.reset()
    assert not calibrator.saw_data
    assert calibrator.batches == 0
    calibrator.collect(small.reshape(5, 10))
    assert torch.equal(calibrator.compute_amax(), calibrated(kind, [small]).compute_amax())


# Whose tensors are whose.


@every_calibrator
@pytest.mark.parametrize("axis", [None, 0])
def test_the_range_is_a_tensor_of_its_own_and_computing_it_consumes_nothing(kind, axis):
    calibrator = calibrated(kind, batches(), axis)
    first = calibrator.compute_amax()
    expected = first.clone()
    first.zero_()
    second = calibrator.compute_amax()
    assert torch.equal(second, expected)
    calibrator.collect(100 * batches()[0])
    assert torch.equal(second, expected)


@every_statistic
@pytest.mark.parametrize("axis", [None, 0])
def test_a_collected_tensor_may_change_afterwards(kind, axis):
    x = batches()[0]
    calibrator = calibrated(kind, [x], axis)
    expected = calibrator.compute_amax()
    x.mul_(7)
    assert torch.equal(calibrator.compute_amax(), expected)


@every_statistic
def test_collecting_leaves_the_tensor_alone(kind):
    x = batches()[0]
    expected = x.clone()
    calibrated(kind, [x])
    assert torch.equal(x, expected)


@every_calibrator
def test_gradients_are_neither_kept_nor_made(kind):
    x = batches()[0].requires_grad_()
    calibrator = calibrated(kind, [x * 2, x])
    assert not calibrator.compute_amax().requires_grad
    assert x.grad is None
    assert torch.is_grad_enabled()


@every_statistic
@pytest.mark.parametrize("axis", [None, 0])
def test_inference_mode_may_come_and_go_between_batches(kind, axis):
    calibrator = kind(INT8, axis)
    for i, x in enumerate([*batches(), 10 * batches()[0]]):
        with torch.inference_mode(i % 2 == 0):
            calibrator.collect(x.clone())
    with torch.inference_mode():
        amax = calibrator.compute_amax()
    assert not amax.is_inference()
    (amax * torch.ones(1, requires_grad=True)).sum().backward()
    expected = calibrated(kind, [*batches(), 10 * batches()[0]], axis).compute_amax()
    assert torch.equal(amax, expected)


@every_calibrator
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_their_own_way(kind, clone):
    calibrator = calibrated(kind, batches(), 0)
    expected = calibrator.compute_amax()
    other = clone(calibrator)
    assert torch.equal(other.compute_amax(), expected)
    other.collect(50 * batches()[0])
    assert torch.equal(calibrator.compute_amax(), expected)
    assert not torch.equal(other.compute_amax(), expected)


@every_calibrator
def test_an_unknown_option_is_an_error(kind):
    with pytest.raises(TypeError, match="percentil"):
        kind(INT8, percentil=99.0)


@every_calibrator
def test_without_other_processes_there_is_nothing_to_synchronize(kind):
    calibrator = calibrated(kind, batches())
    expected = calibrator.compute_amax()
    calibrator.synchronize()
    assert torch.equal(calibrator.compute_amax(), expected)
    kind(INT8).synchronize()


@every_statistic
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_gives_what_the_cpu_gives(kind, axis, dtype):
    data = [x.to(dtype) for x in batches()]
    amax = calibrated(kind, [x.cuda() for x in data], axis).compute_amax()
    assert amax.is_cuda
    assert torch.equal(amax.cpu(), calibrated(kind, data, axis).compute_amax())


# Maxima.


@pytest.mark.parametrize("axis", [None, 0])
def test_max_equals_the_observer_of_torch(axis):
    observer = MinMaxObserver() if axis is None else PerChannelMinMaxObserver(ch_axis=0)
    for x in batches():
        observer(x)
    expected = torch.maximum(observer.max_val, -observer.min_val)
    assert torch.equal(
        calibrated(MaxCalibrator, batches(), axis).compute_amax().flatten(), expected.flatten()
    )


def test_max_takes_the_largest_of_all_batches_whatever_their_order():
    data = batches()
    expected = torch.stack(data).abs().max()
    assert torch.equal(calibrated(MaxCalibrator, data).compute_amax(), expected)
    assert torch.equal(calibrated(MaxCalibrator, data[::-1]).compute_amax(), expected)


@pytest.mark.parametrize("constant", [0.01, 0.3, 1.0])
def test_moving_average_equals_the_observer_of_torch(constant):
    observer = MovingAverageMinMaxObserver(averaging_constant=constant)
    data = [x.abs() for x in batches(6)]
    for x in data:
        observer(x)
    calibrator = calibrated(MovingAverageCalibrator, data, averaging_constant=constant)
    torch.testing.assert_close(calibrator.compute_amax(), observer.max_val)


def test_moving_average_starts_again_after_reset():
    calibrator = calibrated(MovingAverageCalibrator, [torch.tensor([8.0])])
    calibrator.reset()
    calibrator.collect(torch.tensor([-2.0]))
    assert calibrator.compute_amax().item() == 2.0


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.5, float("nan")])
def test_an_averaging_constant_out_of_range_is_an_error(constant):
    with pytest.raises(ValueError, match="averaging_constant"):
        MovingAverageCalibrator(INT8, averaging_constant=constant)
