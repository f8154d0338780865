"""``tensor_quant`` and ``cuda_ext``: the numbers, against formulas written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytorch_quantization import cuda_ext
from pytorch_quantization import tensor_quant as tq


def reference(x, amax, num_bits=8, unsigned=False, narrow_range=True):
    bound = 2.0 ** (num_bits - 1 + unsigned) - 1
    low = 0 if unsigned else -bound if narrow_range else -bound - 1
    scale = torch.full_like(amax, bound) / amax  # rounded once
    return torch.clamp(torch.round(x * scale), low, bound), scale


@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize(("num_bits", "unsigned"), [(8, False), (8, True), (4, False), (5, True), (2, False)])
def test_integers_are_rounded_products(num_bits, unsigned, narrow_range):
    x = torch.randn(1000) * 2
    x = x.abs() if unsigned else x
    amax = torch.tensor(1.7)
    q, scale = reference(x, amax, num_bits, unsigned, narrow_range)
    outputs, given = tq.tensor_quant(x, amax, num_bits, unsigned, narrow_range)
    assert torch.equal(outputs, q)
    assert torch.equal(given, scale)
    assert torch.equal(tq.fake_tensor_quant(x, amax, num_bits, unsigned, narrow_range), q / scale)
    assert torch.equal(tq.legacy_fake_tensor_quant(x, amax, num_bits, unsigned, narrow_range), q / scale)


def test_functions_have_a_narrow_range_by_default():
    q, _ = tq.tensor_quant(torch.tensor([-9.0, 9.0]), torch.tensor(1.0))
    assert q.tolist() == [-127, 127]
    q, _ = tq.tensor_quant(torch.tensor([-9.0, 9.0]), torch.tensor(1.0), 8, False, False)
    assert q.tolist() == [-128, 127]


def test_ties_go_to_the_even_neighbour():
    q, _ = tq.tensor_quant(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(127.0))
    assert q.tolist() == [0, 2, 2, 0, -2]


def test_unsigned_8_bits_are_the_upper_half_of_9():
    x = torch.rand(500) * 3
    amax = torch.tensor(2.5)
    assert torch.equal(tq.fake_tensor_quant(x, amax, 8, True), tq.fake_tensor_quant(x, amax, 9, False))


def test_unsigned_takes_no_negative_values():
    with pytest.raises(TypeError, match="Negative values encountered"):
        tq.fake_tensor_quant(torch.tensor([-1.0, 1.0]), torch.tensor(1.0), 8, True)


def test_a_range_is_not_negative():
    with pytest.raises(ValueError, match="Negative values in amax"):
        tq.fake_tensor_quant(torch.ones(2), torch.tensor(-1.0))


def test_a_range_for_each_row():
    x = torch.randn(3, 5)
    amax = torch.tensor([[0.5], [1.0], [2.0]])
    q, scale = reference(x, amax)
    assert torch.equal(tq.fake_tensor_quant(x, amax), q / scale)
    assert torch.equal(cuda_ext.fake_tensor_quant_with_axis(x, amax.flatten(), 0), q / scale)
    assert torch.equal(cuda_ext.fake_tensor_quant_with_axis(x.T, amax.flatten(), -1), (q / scale).T)


@pytest.mark.parametrize("tiny", [0.0, 2.0**-30, 2.0**-24])
def test_tiny_ranges_give_zero_and_scale_one(tiny):
    x = torch.tensor([[1.0, -2.0], [1.0, -2.0]])
    amax = torch.tensor([[tiny], [2.0]])
    outputs, scale = tq.tensor_quant(x, amax)
    assert outputs[0].abs().tolist() == [0, 0]
    assert scale.flatten().tolist() == [1.0, 63.5]
    assert tq.fake_tensor_quant(x, amax)[0].abs().tolist() == [0, 0]
    assert cuda_ext.fake_tensor_quant(x, amax)[0].abs().tolist() == [0, 0]


def test_just_above_tiny_is_quantized():
    amax = torch.tensor(2.0**-23)
    assert tq.fake_tensor_quant(amax, amax).item() == pytest.approx(2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    x = (torch.randn(2000) * 3).to(dtype)
    amax = torch.tensor(2.7)
    q, scale = reference(x.float(), amax)
    expected = (q / scale).to(dtype)
    assert torch.equal(tq.fake_tensor_quant(x, amax), expected)
    assert torch.equal(cuda_ext.fake_tensor_quant(x, amax), expected)


def test_float64_keeps_its_dtype():
    assert tq.fake_tensor_quant(torch.randn(5, dtype=torch.float64), torch.tensor(1.0)).dtype == torch.float64


def test_a_scale_too_large_for_float16_is_an_error_of_tensor_quant_alone():
    x, amax = torch.tensor([1e-3, 0.0], dtype=torch.float16), torch.tensor(1e-3)
    with pytest.raises(ValueError, match="scale is too large for FP16"):
        tq.tensor_quant(x, amax)
    assert tq.fake_tensor_quant(x, amax).isfinite().all()
    assert tq.tensor_quant(x, torch.tensor(1.0))[1].dtype == torch.float16


def test_integer_gradient_passes_within_the_range():
    x = torch.tensor([-1.5, -1.0, 0.3, 1.0, 1.001], requires_grad=True)
    for function in (
        tq.fake_tensor_quant,
        tq.legacy_fake_tensor_quant,
        lambda *given: tq.tensor_quant(*given)[0],
    ):
        (grad,) = torch.autograd.grad(function(x, torch.tensor(1.0)).sum(), x)
        assert grad.tolist() == [0, 1, 1, 1, 0]


def test_gradients_of_float16_see_the_exact_range():
    x = torch.tensor([1.0], dtype=torch.float16, requires_grad=True)
    amax = torch.tensor(0.9999)  # 1.0 in float16
    (grad,) = torch.autograd.grad(tq.fake_tensor_quant(x, amax).sum(), x)
    assert grad.item() == 0


def test_a_range_may_be_a_number():
    x = torch.randn(10)
    assert torch.equal(tq.fake_tensor_quant(x, 1.5), tq.fake_tensor_quant(x, torch.tensor(1.5)))


# --- FP8 -------------------------------------------------------------------------------------------


def test_e4m3_without_a_range():
    x = torch.tensor([0.0, 2.0**-9, 3 * 2.0**-10, 1.0625, 17.0, 448.0, 1e6, -1e6])
    # 2^-9 is the smallest subnormal; 1.5 of it is a tie, to the even 2; 1.0625 is a tie, to 1; 17 to 16.
    assert tq.scaled_e4m3(x).tolist() == [0.0, 2.0**-9, 2.0**-8, 1.0, 16.0, 448.0, 448.0, -448.0]
    assert cuda_ext.fake_e4m3fy(x).tolist() == tq.scaled_e4m3(x).tolist()


def test_e4m3_scales_by_448_over_the_range():
    x, amax = torch.randn(100) * 3, torch.tensor(2.0)
    expected = (x * 224).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 224
    assert torch.equal(tq.scaled_e4m3(x, amax, 4, 3), expected)
    assert tq.scaled_e4m3(x, torch.tensor(0.0)).abs().max() == 0
    assert tq.scaled_e4m3(x.half(), amax).dtype == torch.float16


def test_e4m3_gradient_and_other_formats():
    x = torch.tensor([-449.0, -448.0, 3.0, 448.0, 449.0], requires_grad=True)
    (grad,) = torch.autograd.grad(tq.scaled_e4m3(x).sum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 0]
    with pytest.raises(NotImplementedError, match="E5M2"):
        tq.scaled_e4m3(x, None, 5, 2)


# --- affine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, -10, -255])
def test_affine_is_exact_on_integers_of_the_range(low):
    x = torch.arange(low, low + 256, dtype=torch.float32)
    assert torch.equal(tq.fake_affine_tensor_quant(x, float(low), float(low + 255)), x)


def test_affine_rounds_to_evenly_spaced_values():
    x = torch.linspace(-1, 2, 500)
    y = tq.fake_affine_tensor_quant(x, torch.tensor(-0.5), torch.tensor(1.0), 4)
    assert len(y.unique()) == 16
    inside = (x >= -0.5) & (x <= 1.0)
    assert (y - x)[inside].abs().max() <= 0.05 + 1e-6
    assert (y.min().item(), y.max().item()) == (pytest.approx(-0.5), pytest.approx(1.0))


def test_affine_gradient_and_empty_range():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(tq.fake_affine_tensor_quant(x, 0.0, 1.0).sum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="empty"):
        tq.fake_affine_tensor_quant(x, 1.0, 1.0)


# --- cuda_ext --------------------------------------------------------------------------------------


def test_kernels_on_any_device():
    x = torch.randn(50)
    expected = tq.fake_tensor_quant(x, torch.tensor(1.0))
    assert torch.equal(cuda_ext.fake_tensor_quant(x, torch.tensor(1.0)), expected)
    assert torch.equal(
        cuda_ext.fake_tensor_quant(x.abs(), torch.tensor(1.0), 8, True),
        tq.fake_tensor_quant(x.abs(), torch.tensor(1.0), 8, True),
    )
    y = x.clone()
    assert cuda_ext.fake_tensor_quant_(y, torch.tensor(1.0)) is y
    assert torch.equal(y, expected)
    assert not torch.equal(x, expected)


def test_in_place_is_what_numpy_makes_of_it():
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        x = rng.random(1023, dtype=np.float32)
        scale = np.float32(2 ** (bits - 1) - 1) / x.max()
        expected = np.round(x * scale) / scale
        given = torch.from_numpy(x.copy())
        assert cuda_ext.fake_tensor_quant_(given, given.max(), bits) is given
        assert given.numpy().tolist() == expected.tolist()
        assert (
            tq.fake_tensor_quant(torch.from_numpy(x), torch.tensor(x.max()), bits).tolist()
            == expected.tolist()
        )
