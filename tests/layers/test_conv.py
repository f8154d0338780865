"""Convolutions: which axis is the channels', for weights and for formats in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
import quantpatch.layers as layers
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS
from quantpatch.recipes.builtin import BUILTIN_RECIPES


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_the_range_of_a_channel_is_its_own(kind, n):
    layer = getattr(layers, f"Quant{kind}{n}d")(4, 6, 3, bias=False)
    axis = 1 if "Transpose" in kind else 0
    assert layer.weight_quantizer.descriptor.axis == axis
    with torch.no_grad():
        layer.weight.select(axis, 2).mul_(1000)  # spoils no other channel
    x = torch.randn(2, 4, *(6,) * n)
    twin = getattr(nn, f"{kind}{n}d")(4, 6, 3, bias=False)
    twin.load_state_dict(qp.float_state_dict(layer))
    layer.input_quantizer.disable()
    for channel in range(6):
        ours, theirs = layer(x).select(1, channel), twin(x).select(1, channel)
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_blocks_run_along_the_input_channels(n):
    format = BUILTIN_FORMATS["mxfp4"]
    x = torch.randn(2, 64, *(5,) * n)
    for kind, axis in (("Conv", 1), ("ConvTranspose", 0)):
        layer = getattr(layers, f"Quant{kind}{n}d")(64, 3, 3)
        layer.add_quantizers(BUILTIN_RECIPES["mxfp4"])
        assert torch.equal(
            layer.weight_quantizer(layer.weight), fake_quantize(layer.weight, None, format, axis=axis)
        )
        assert torch.equal(layer.input_quantizer(x), fake_quantize(x, None, format, axis=1))
        batched, alone = layer(x), layer(x[0])  # without a batch axis as well
        torch.testing.assert_close(batched[0], alone, atol=1e-4, rtol=1e-4)


def test_channels_last_stays():
    layer = layers.QuantConv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.weight_quantizer(layer.weight).is_contiguous(memory_format=torch.channels_last)


def test_output_size_is_checked_by_torch():
    layer = layers.QuantConvTranspose2d(3, 4, 3, stride=2)
    assert layer(torch.randn(1, 3, 5, 5), output_size=(12, 12)).shape == (1, 4, 12, 12)
    with pytest.raises(ValueError, match="output size"):
        layer(torch.randn(1, 3, 5, 5), output_size=(20, 20))


def test_fusing_with_batch_norm():
    conv, norm = layers.QuantConv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    norm.running_mean.uniform_(-1, 1)
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    assert isinstance(fused, layers.QuantConv2d)
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(fused(x), norm(conv(x)), atol=0.05, rtol=0.05)
