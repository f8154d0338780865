"""Channels of transposed convolutions with groups: a range for each output channel."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import BUILTIN_CALIBRATORS
from quantpatch.errors import ArgumentError, ExportError, RangeError
from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import Integer
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.ranges import reduce_amax

# Input channels, output channels, groups.
SIZES = [(6, 6, 6), (6, 12, 6), (6, 12, 3), (4, 6, 2), (4, 6, 1)]


def layer(n: int, inside: int, outside: int, groups: int, recipe: str | qp.Recipe = "int8") -> nn.Module:
    """Output channels of very different sizes."""
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        made: nn.Module = getattr(nn, f"ConvTranspose{n}d")(inside, outside, 3, groups=groups)
    with torch.no_grad():
        for channel in range(outside):
            of_channel(made, made.weight, channel).mul_(10.0 ** (-channel % 4))
    return made.eval()


def of_channel(made: nn.Module, weight: torch.Tensor, channel: int) -> torch.Tensor:
    """The part of a weight that makes an output channel, as torch's documentation has it."""
    group, index = divmod(channel, made.out_channels // made.groups)
    each = made.in_channels // made.groups
    return weight[group * each : (group + 1) * each, index]


def calibrated(made: nn.Module, **options: str) -> nn.Module:
    n = made.weight.dim() - 2
    qp.calibrate(made, [torch.randn(1, made.in_channels, *[4] * n)], progress=False, **options)
    return made


def by_channel(made: nn.Module, method: str = "max") -> torch.Tensor:
    """Each output channel's weights quantized by themselves, put together again."""
    expected = torch.zeros_like(made.weight)
    for channel in range(made.out_channels):
        part = of_channel(made, made.weight.detach(), channel)
        quantizer = qp.TensorQuantizer(qp.QuantDescriptor(narrow_range=True))
        qp.calibrate(quantizer, [part], method=method, progress=False)
        of_channel(made, expected, channel).copy_(quantizer(part))
    return expected


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_output_channel_has_a_range_of_its_own(n: int, size: tuple[int, int, int]) -> None:
    made = calibrated(layer(n, *size))
    assert made.weight_quantizer.amax.numel() == made.out_channels
    assert torch.equal(made.weight_quantizer(made.weight), by_channel(made))


@pytest.mark.parametrize("method", sorted(BUILTIN_CALIBRATORS))
def test_whatever_finds_the_ranges(method: str) -> None:
    made = calibrated(layer(2, 4, 6, 2), weight_method=method)
    assert torch.equal(made.weight_quantizer(made.weight), by_channel(made, method))


def test_so_has_it_before_it_is_calibrated_and_by_convert() -> None:
    made = layer(2, 4, 6, 2)
    assert torch.equal(made.weight_quantizer(made.weight), by_channel(made))
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    model[0].load_state_dict(qp.float_state_dict(made))
    qp.convert(model)
    assert torch.equal(calibrated(model[0]).weight_quantizer(made.weight), by_channel(made))
    qp.configure(model, {"0": "int4"})
    assert model[0].weight_quantizer.descriptor.groups == 2
    with qp.quantize_modules():
        lazy = nn.LazyConvTranspose2d(6, 3, groups=2)
    lazy(torch.randn(1, 4, 5, 5))
    assert calibrated(lazy).weight_quantizer.amax.numel() == 6


def test_codes_and_scales_go_with_the_weight() -> None:
    made = calibrated(layer(2, 4, 6, 2))
    axis, amax, format = made.weight_quantizer.descriptor.kept_axes, made.weight_quantizer.amax, Integer(8)
    codes, scale = quantize(made.weight, amax, format, axis=axis)
    expected = fake_quantize(made.weight, amax, format, axis=axis)
    assert torch.equal(codes * scale, expected)
    assert torch.equal(dequantize(codes, scale, format, axis=axis), expected)
    assert torch.equal(reduce_amax(made.weight, axis=axis), amax)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ranges_load_into_a_layer_that_has_none_yet(size: tuple[int, int, int]) -> None:
    found = layer(2, *size)
    qp.calibrate(found, [torch.randn(1, size[0], 5, 5)], progress=False)
    fresh = layer(2, *size)
    assert fresh.weight_quantizer.held.shape == found.weight_quantizer.amax.shape
    fresh.load_state_dict(found.state_dict())
    assert torch.equal(fresh.weight_quantizer.amax, found.weight_quantizer.amax)


def test_learned_ranges_get_the_gradient_of_their_channel() -> None:
    recipe = qp.Recipe(
        name="learned", input=None, weight=qp.QuantDescriptor(num_bits=4, axis="channel", learn_amax=True)
    )
    made = calibrated(layer(2, 4, 6, 2, recipe))
    upstream = torch.randn_like(made.weight)
    made.weight_quantizer(made.weight, batch_axis=None).backward(upstream)
    for channel in range(6):
        alone = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4, learn_amax=True))
        alone.amax = made.weight_quantizer.amax.flatten()[channel].detach()
        alone(of_channel(made, made.weight.detach(), channel), batch_axis=None).backward(
            of_channel(made, upstream, channel)
        )
        torch.testing.assert_close(
            made.weight_quantizer.amax.grad.flatten()[channel : channel + 1], alone.amax.grad
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [(4, 6, 2), (6, 12, 6)], ids=str)
def test_files_have_the_groups(size: tuple[int, int, int], packed: bool, tmp_path: Path) -> None:
    model, x = nn.Sequential(calibrated(layer(2, *size))), torch.randn(1, size[0], 5, 5)
    qp.save(model, tmp_path / "m.safetensors", packed=packed)
    again = qp.load(
        nn.Sequential(nn.ConvTranspose2d(*size[:2], 3, groups=size[2])), tmp_path / "m.safetensors"
    ).eval()
    assert torch.equal(again(x), model(x))
    assert again[0].weight_quantizer.descriptor == model[0].weight_quantizer.descriptor
    qp.calibrate(again, [x], existing="overwrite", progress=False)
    assert torch.equal(again[0].weight_quantizer.amax, model[0].weight_quantizer.amax)


def test_folded_copied_and_pickled_it_computes_the_same() -> None:
    made, x = calibrated(layer(2, 4, 6, 2)), torch.randn(2, 4, 5, 5)
    expected = made(x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), expected)
    with qp.folded_weights(made) as folded:
        assert folded.folded == ("weight",)
        assert torch.equal(made(x), expected)
    assert "weight_quantizer" not in str(qp.audit(made, x))  # as one whose range the weight outgrew


@pytest.mark.parametrize("size", [(4, 6, 2), (6, 12, 6), (6, 6, 6)], ids=str)
def test_onnx_files_have_the_same_weights(size: tuple[int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made = calibrated(layer(2, *size))
    report = qp.export_onnx(made, (torch.randn(1, size[0], 4, 4),), tmp_path / "m.onnx")
    assert report.comparison.mismatching == 0
    assert report.comparison.differing_share == 0.0


def test_tensorrt_takes_the_depthwise_one_and_refuses_the_other_by_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(1, 6, 4, 4)
    qp.export_onnx(calibrated(layer(2, 6, 6, 6)), (x,), tmp_path / "m.onnx", runtime="tensorrt")
    with pytest.raises(ExportError, match=r"weight_quantizer: its scales are those of .* within groups"):
        qp.export_onnx(calibrated(layer(2, 6, 12, 3)), (x,), tmp_path / "m.onnx", runtime="tensorrt")


def test_axes_of_other_groups_are_others() -> None:
    assert GroupedAxes(2) != GroupedAxes(3) != (0, 1)
    assert len({GroupedAxes(2), GroupedAxes(2), GroupedAxes(3), (0, 1)}) == 3
    with pytest.raises(RangeError, match=r"shape \(4, 3\) cannot be split into 3 groups"):
        fake_quantize(torch.randn(4, 3), None, Integer(8), axis=GroupedAxes(3))


@pytest.mark.parametrize(("axis", "groups"), [(0, 2), (None, 2), ((0, 1), 0), ((0, 1), 2.0), ((1, 0), 2)])
def test_groups_are_of_the_first_of_two_axes(axis: object, groups: object) -> None:
    with pytest.raises(ArgumentError, match=r"groups=.*axis=\(0, 1\)"):
        qp.QuantDescriptor(axis=axis, groups=groups)
