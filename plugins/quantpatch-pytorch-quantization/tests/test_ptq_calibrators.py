"""Calibrators, against readable references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant
from pytorch_quantization.utils import reduce_amax


def histogram(**keywords):
    return calib.HistogramCalibrator(8, None, False, **keywords)


# --- max -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "reduced"), [(None, None), (0, (1, 2)), (-1, (0, 1)), ((0, 2), (1,)), ((-3,), (1, 2))]
)
def test_running_maximum_over_the_kept_axes(axis, reduced):
    calibrator = calib.MaxCalibrator(8, axis, False)
    assert calibrator.compute_amax() is None
    batches = torch.randn(4, 2, 3, 5)
    for batch in batches:
        calibrator.collect(batch)
    magnitude = batches.abs().amax(0)
    expected = magnitude.max() if reduced is None else magnitude.amax(reduced, keepdim=True)
    assert torch.equal(calibrator.compute_amax(), expected)
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_the_maximum_of_each_batch_as_copies():
    calibrator = calib.MaxCalibrator(8, None, False, track_amax=True)
    for value in (1.0, 3.0, 2.0):
        calibrator.collect(torch.tensor([-value]))
    calibrator.amaxs[0][...] = 7.0
    calibrator.compute_amax().zero_()
    assert [float(a) for a in calibrator.amaxs] == [1.0, 3.0, 2.0]
    assert calibrator.compute_amax().item() == 3.0
    assert calib.MaxCalibrator(8, None, False).amaxs == []


def test_another_shape_later():
    calibrator = calib.MaxCalibrator(8, 0, False)
    calibrator.collect(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="shape"):
        calibrator.collect(torch.ones(4, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite(bad):
    for calibrator in (calib.MaxCalibrator(8, None, False), histogram()):
        with pytest.raises(ValueError, match="NaN or infinity"):
            calibrator.collect(torch.tensor([1.0, bad]))


def test_reduce_amax():
    x = torch.randn(2, 3, 4)
    assert torch.equal(reduce_amax(x), x.abs().max())
    assert torch.equal(reduce_amax(x, axis=(0, 2)), x.abs().amax((0, 2), keepdim=True))
    assert torch.equal(reduce_amax(x, axis=-1, keepdims=False), x.abs().amax(-1))
    assert torch.equal(reduce_amax(x, axis=()), x.abs())
    assert reduce_amax(torch.tensor([-7, 3])).item() == 7


# --- histograms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_hist", [False, True])
def test_counts_are_those_of_numpy_for_the_same_edges(torch_hist):
    calibrator = histogram(num_bins=64, torch_hist=torch_hist)
    batches = [torch.randn(300), torch.randn(20, 20) * 3, torch.randint(-5, 5, (100,))]
    expected = np.zeros(0, dtype=np.int64)
    for batch in batches:
        calibrator.collect(batch)
        counts, edges = calibrator._calib_hist, calibrator._calib_bin_edges
        now, _ = np.histogram(batch.flatten().float().abs().numpy(), bins=np.asarray(edges))
        expected = now + np.pad(expected, (0, len(now) - len(expected)))
    assert isinstance(counts, torch.Tensor if torch_hist else np.ndarray)
    assert isinstance(edges, torch.Tensor if torch_hist else np.ndarray)
    assert len(edges) == len(counts) + 1 > 65  # it has grown
    assert np.array_equal(np.asarray(counts), expected)
    assert edges[64].item() == pytest.approx(batches[0].abs().max().item())
    assert edges[-1] >= max(b.abs().max() for b in batches) > edges[-2]


def test_the_first_batch_fixes_the_range():
    calibrator = histogram(num_bins=10)
    calibrator.collect(torch.tensor([-10.0, 5.0]))
    calibrator.collect(torch.tensor([1.0]))
    assert calibrator._calib_bin_edges.tolist() == list(range(11))
    assert calibrator._calib_hist.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_zeros_first_and_zeros_skipped():
    calibrator = histogram(num_bins=4)
    calibrator.collect(torch.zeros(3))
    assert calibrator.compute_amax("percentile").item() == 0
    calibrator.collect(torch.tensor([0.0, 4.0]))
    assert calibrator._calib_hist.tolist() == [4, 0, 0, 1]
    skipping = histogram(num_bins=4, skip_zeros=True)
    skipping.collect(torch.zeros(3))
    assert skipping.compute_amax("percentile") is None
    skipping.collect(torch.tensor([0.0, 4.0]))
    assert skipping._calib_hist.tolist() == [0, 0, 0, 1]


def test_a_much_larger_value_later_does_not_take_all_memory():
    calibrator = histogram()
    calibrator.collect(torch.rand(100) * 1e-6)
    calibrator.collect(torch.tensor([1e3]))
    assert len(calibrator._calib_hist) <= 64 * 2048
    assert calibrator._calib_hist.sum() == 101
    assert calibrator.compute_amax("percentile", percentile=100).item() == pytest.approx(1e3, rel=1e-4)


def test_what_a_histogram_refuses():
    with pytest.raises(NotImplementedError, match="axis=0"):
        calib.HistogramCalibrator(8, 0, False)
    with pytest.warns(DeprecationWarning, match="grow_method"):
        histogram(grow_method="append")
    calibrator = histogram()
    for percentile in (-1, 101):
        with pytest.raises(ValueError, match="percentile"):
            calibrator.compute_amax("percentile", percentile=percentile)
    with pytest.raises(TypeError, match="guess"):
        calibrator.compute_amax("guess")
    assert calibrator.compute_amax("mse") is None


@pytest.mark.parametrize("torch_hist", [False, True])
@pytest.mark.parametrize("method", ["entropy", "mse", "percentile"])
def test_a_range_is_one_number_and_reading_consumes_nothing(method, torch_hist):
    torch.manual_seed(1)
    calibrator = histogram(torch_hist=torch_hist)
    calibrator.collect(torch.randn(5000))
    before = np.asarray(calibrator._calib_hist).copy()
    amax = calibrator.compute_amax(method)
    assert (amax.dim(), amax.dtype) == (0, torch.float32)
    assert amax == calibrator.compute_amax(method)
    assert np.array_equal(np.asarray(calibrator._calib_hist), before)
    calibrator.reset()
    assert calibrator.compute_amax(method) is None


def test_percentile():
    calibrator = histogram(num_bins=100)
    calibrator.collect(torch.arange(1, 101))
    for percentile in (10, 50, 99, 100):
        assert calibrator.compute_amax("percentile", percentile=percentile).item() == pytest.approx(
            percentile, abs=1.01
        )
    assert calibrator.compute_amax("percentile", percentile=100).item() == 100


def test_mse_is_the_least_over_the_centres():
    calibrator = calib.HistogramCalibrator(4, None, False, num_bins=256)
    calibrator.collect(torch.randn(20000))
    counts, edges = calibrator._calib_hist.double(), calibrator._calib_bin_edges.double()
    centres = (edges[1:] + edges[:-1]) / 2
    errors = [
        (((fake_tensor_quant(centres, centres[i], 4) - centres) ** 2) * counts).sum()
        for i in range(128, 256, 3)
    ]
    best = 128 + 3 * int(torch.stack(errors).argmin())
    assert calibrator.compute_amax("mse", stride=3).item() == pytest.approx(centres[best].item())


def reference_entropy(counts, edges, levels, start, stride):
    """TensorRT's calibration, a step at a time."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    divergences = {}
    for n in range(start, len(counts) + 1, stride):
        p = counts[:n].copy()
        p[-1] += counts[n:].sum()
        q = np.zeros(n)
        level = np.arange(n) * levels // n
        for k in range(levels):
            members = (level == k) & (counts[:n] > 0)
            if members.any():
                q[members] = counts[:n][members].sum() / members.sum()
        p, q = p / p.sum(), q / q.sum()
        some = p > 0
        with np.errstate(divide="ignore"):
            divergences[n] = np.sum(p[some] * np.log(p[some] / q[some]))
    least = min(divergences.values())
    return edges[max(n for n, d in divergences.items() if d <= least + 1e-12)]


@pytest.mark.parametrize(
    ("num_bits", "unsigned", "stride"), [(8, False, 1), (8, True, 5), (4, False, 1), (3, True, 2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_entropy(num_bits, unsigned, stride, seed):
    torch.manual_seed(seed)
    calibrator = calib.HistogramCalibrator(num_bits, None, unsigned, num_bins=300)
    x = torch.cat([torch.randn(4000), torch.randn(20) * 4, torch.zeros(500)])
    calibrator.collect(x.abs() if unsigned else x)
    counts, edges = calibrator._calib_hist.numpy(), calibrator._calib_bin_edges.numpy()
    expected = reference_entropy(counts, edges, 2 ** (num_bits - 1 + unsigned), 64, stride)
    amax = calibrator.compute_amax("entropy", start_bin=64, stride=stride)
    assert amax.item() == pytest.approx(float(expected))


def test_entropy_of_few_bins_is_the_upper_end():
    calibrator = histogram(num_bins=16)
    calibrator.collect(torch.linspace(0, 2, 100))
    assert calibrator.compute_amax("entropy").item() == pytest.approx(2.0)


# --- weights ---------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": quant_nn.QuantConv2d(3, 4, 3),
            "transposed": quant_nn.QuantConvTranspose2d(3, 4, 3),
            "linear": quant_nn.QuantLinear(5, 6),
            "lstm": quant_nn.QuantLSTM(4, 3),
            "cell": quant_nn.QuantLSTMCell(4, 3),
        }
    )


def test_ranges_of_weights_per_channel():
    m = model()
    calib.calibrate_weights(m, method="max")
    assert torch.equal(
        m["conv"]._weight_quantizer._amax, m["conv"].weight.abs().amax((1, 2, 3), keepdim=True)
    )
    expected = m["transposed"].weight.abs().amax((0, 2, 3), keepdim=True)
    assert torch.equal(m["transposed"]._weight_quantizer._amax, expected)
    assert torch.equal(m["linear"]._weight_quantizer._amax, m["linear"].weight.abs().amax(1, keepdim=True))
    both = torch.cat([m["lstm"].weight_ih_l0, m["lstm"].weight_hh_l0], 1)
    assert torch.equal(m["lstm"]._weight_quantizers[0]._amax, both.abs().amax(1, keepdim=True))
    assert m["cell"]._weight_quantizer._amax.shape == (12, 1)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("perchannel", [False, True])
def test_ranges_of_weights_have_the_shape_that_the_quantizer_keeps(method, perchannel):
    m = nn.Sequential(quant_nn.QuantLinear(40, 6), quant_nn.QuantConv2d(1, 1, 3))
    m[1]._weight_quantizer = quant_nn.TensorQuantizer()
    calib.calibrate_weights(m, method=method, perchannel=perchannel, num_bins=256)
    amax = m[0]._weight_quantizer._amax
    assert amax.shape == ((6, 1) if perchannel else ())
    assert m[0](torch.ones(2, 40)).shape == (2, 6)
    assert (amax <= m[0].weight.abs().max()).all()
    assert m[1]._weight_quantizer._amax.shape == ()


def test_an_unknown_method_for_weights():
    with pytest.raises(TypeError, match="guess"):
        calib.calibrate_weights(nn.Linear(1, 1), method="guess")


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_ranges_of_weights_are_those_of_a_calibrator_for_each_channel(method):
    layer = quant_nn.QuantConvTranspose2d(6, 3, 5)
    with torch.no_grad():
        layer.weight[:, 1] = 0  # a dead channel
    calib.calibrate_weights(layer, method=method, percentile=99, num_bins=256)
    for channel in (0, 2):
        calibrator = histogram(num_bins=256)
        calibrator.collect(layer.weight[:, channel])
        expected = calibrator.compute_amax(method, percentile=99)
        assert layer._weight_quantizer._amax[0, channel].item() == pytest.approx(expected.item())
    assert layer._weight_quantizer._amax.shape == (1, 3, 1, 1)
    assert layer._weight_quantizer._amax[0, 1].item() == 0


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_without_channels_the_range_is_that_of_a_calibrator_for_the_whole_weight(method):
    layer = quant_nn.QuantConv2d(3, 5, 3)
    calib.calibrate_weights(layer, method=method, perchannel=False, percentile=99, num_bins=256)
    calibrator = histogram(num_bins=256)
    calibrator.collect(layer.weight)
    assert layer._weight_quantizer._amax.item() == calibrator.compute_amax(method, percentile=99).item()


def test_messages_hold_the_toolkits_words():
    calibrator = calib.MaxCalibrator(8, 0, False)
    calibrator.collect(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"amax shape changed from \(2, 1\) to \(3, 1\)"):
        calibrator.collect(torch.ones(3, 3))
    with pytest.raises(ValueError, match="range from 0 to 100"):
        histogram().compute_amax("percentile", percentile=-1)
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        quant_nn.TensorQuantizer().load_calib_amax()
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        quant_nn.QuantLinear(1, 1, quant_desc_weight=QuantDescriptor(fake_quant=False))
    with pytest.raises(TypeError, match="axis is ignored and must be None when learn_amax is true"):
        QuantDescriptor(learn_amax=True, axis=0)


@pytest.mark.parametrize("axis", [(0, 1, 2), (0, 0, 1, -1)])
def test_more_axes_than_there_are_cannot_be_reduced(axis):
    with pytest.raises(
        ValueError, match=r"Cannot reduce more axes than the tensor has: .* of shape \(2, 3\)"
    ):
        reduce_amax(torch.ones(2, 3), axis)
