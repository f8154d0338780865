"""``TensorQuantizer`` and ``Clip``."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from pytorch_quantization import calib
from pytorch_quantization.nn import Clip, TensorQuantizer, functional
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant, scaled_e4m3, tensor_quant


def made(**keywords):
    return TensorQuantizer(QuantDescriptor(**keywords))


def test_a_new_quantizer_has_no_state_and_all_the_names():
    q = TensorQuantizer()
    assert q.state_dict() == {}
    assert not hasattr(q, "_amax")
    assert not hasattr(q, "_pre_quant_scale")
    assert isinstance(q._calibrator, calib.MaxCalibrator)
    assert isinstance(made(calib_method="histogram")._calibrator, calib.HistogramCalibrator)
    assert (q._num_bits, q._axis, q._unsigned, q._narrow_range) == (8, None, False, False)
    assert (q._fake_quant, q._learn_amax) == (True, False)
    assert (q._disabled, q._if_quant, q._if_clip, q._if_calib) == (False, True, False, False)
    assert TensorQuantizer._enable_onnx_export is False


def test_the_switches():
    q = TensorQuantizer(QuantDescriptor(learn_amax=True), True, False, True, True)
    assert (q._disabled, q._if_quant, q._if_clip, q._if_calib) == (True, False, True, True)
    for name in ("quant", "clip", "calib"):
        getattr(q, f"disable_{name}")()
        assert getattr(q, f"_if_{name}") is False
        getattr(q, f"enable_{name}")()
        assert getattr(q, f"_if_{name}") is True
    q.enable()
    assert not q._disabled
    q.disable()
    assert q._disabled


def test_without_amax_the_range_is_that_of_the_tensor():
    x = torch.randn(3, 4)
    assert torch.equal(TensorQuantizer()(x), fake_tensor_quant(x, x.abs().max(), 8, False, False))
    rows = x.abs().amax(1, keepdim=True)
    assert torch.equal(made(axis=0)(x), fake_tensor_quant(x, rows, 8, False, False))
    assert torch.equal(made(axis=-2)(x), made(axis=0)(x))
    assert torch.equal(made(axis=(0, 1))._get_amax(x), x.abs())


def test_a_quantizer_has_no_narrow_range_by_default():
    assert made(amax=127.0)(torch.tensor([-200.0])).item() == -128
    assert made(amax=127.0, narrow_range=True)(torch.tensor([-200.0])).item() == -127


def test_a_list_of_ranges_lies_along_the_axis():
    x = torch.randn(3, 3)
    q = made(axis=0, amax=[0.5, 1.0, 2.0])
    assert torch.equal(q(x), fake_tensor_quant(x, torch.tensor([[0.5], [1.0], [2.0]]), 8, False, False))


def test_fp8_and_real_quantization():
    x = torch.randn(20)
    assert torch.equal(made(num_bits=(4, 3), amax=2.0)(x), scaled_e4m3(x, torch.tensor(2.0)))
    q = made(fake_quant=False, amax=2.0)
    expected, scale = tensor_quant(x, torch.tensor(2.0), 8, False, False)
    assert torch.equal(q(x), expected)
    assert torch.equal(q.scale, scale)
    assert not q.fake_quant


def test_properties():
    q = made(amax=2.0)
    assert q.maxbound == 127
    assert q.step_size.item() == pytest.approx(2 / 127)
    assert q.scale.item() == pytest.approx(127 / 2)
    assert made(num_bits=(4, 3)).maxbound == 448
    assert made(unsigned=True).maxbound == 255
    assert TensorQuantizer().step_size is None
    assert TensorQuantizer().amax is None
    q.num_bits, q.unsigned, q.narrow_range = 4, True, True
    assert (q._num_bits, q._unsigned, q._narrow_range) == (4, True, True)
    assert (q._calibrator._num_bits, q._calibrator._unsigned) == (4, True)
    with pytest.raises(TypeError):
        q.num_bits = (5, 2)


@pytest.mark.parametrize("name", ["amax", "pre_quant_scale"])
def test_setting_a_range(name):
    q = TensorQuantizer()
    setattr(q, name, 2.0)
    assert getattr(q, f"_{name}").item() == 2.0
    setattr(q, name, torch.tensor(3.0))
    assert getattr(q, name).item() == 3.0
    with pytest.raises(RuntimeError, match="shape"):
        setattr(q, name, [1.0, 2.0])
    with pytest.raises(ValueError, match="None"):
        setattr(q, name, None)


def test_scale_amax_does_not_compound():
    x = torch.randn(20)
    q = made(amax=1.0, scale_amax=1.5)
    first, second = q(x), q(x)
    assert torch.equal(first, second)
    assert torch.equal(first, fake_tensor_quant(x, torch.tensor(1.5), 8, False, False))
    assert q.amax.item() == 1.0


def test_pre_quant_scale_comes_first_and_also_when_disabled():
    x = torch.randn(4)
    q = made(amax=2.0)
    q.pre_quant_scale = 0.5
    q.enable_calib()
    assert torch.equal(q(x), fake_tensor_quant(x * 0.5, torch.tensor(2.0), 8, False, False))
    assert q._calibrator.compute_amax() == (x * 0.5).abs().max()
    q.disable()
    assert torch.equal(q(x), x * 0.5)


def test_a_disabled_quantizer_hands_on_the_tensor_itself():
    x = torch.randn(4)
    q = TensorQuantizer(disabled=True, if_calib=True)
    assert q(x) is x
    assert q._calibrator.compute_amax() is None


def test_calibrating():
    q = TensorQuantizer(if_quant=False, if_calib=True)
    x = torch.tensor([-3.0, 2.0])
    assert torch.equal(q(x), x)
    q.load_calib_amax()
    assert q._amax.item() == 3.0
    q(torch.tensor([5.0]))
    q.load_calib_amax()  # reading does not consume, and a known range is overwritten
    assert q.amax.item() == 5.0
    q._amax.fill_(1.0)
    assert q._calibrator.compute_amax().item() == 5.0


def test_arguments_of_load_calib_amax_go_to_the_calibrator():
    q = TensorQuantizer(QuantDescriptor(calib_method="histogram"), if_quant=False, if_calib=True)
    q(torch.linspace(0, 1, 1001))
    for given, keywords in (
        (("percentile",), {"percentile": 50}),
        ((), {"method": "percentile", "percentile": 50}),
    ):
        q.load_calib_amax(*given, **keywords)
        assert q.amax.item() == pytest.approx(0.5, abs=1e-3)


def test_no_data_to_calibrate_with():
    q = TensorQuantizer(if_calib=True)
    with pytest.raises(RuntimeError, match="no data"):
        q.load_calib_amax()
    with pytest.warns(UserWarning, match="no data"):
        q.load_calib_amax(strict=False)
    assert q._amax.isnan()


def test_no_calibrator():
    q = TensorQuantizer()
    q._calibrator = None
    for call in (q.load_calib_amax, q.enable_calib):
        with pytest.raises(RuntimeError, match="no calibrator"):
            call()


def test_learned_range():
    q = made(learn_amax=True, amax=2.0)
    assert {name for name, _ in q.named_parameters()} == {"clip.clip_value_min", "clip.clip_value_max"}
    assert (q.clip.clip_value_min.item(), q.clip.clip_value_max.item()) == (-2.0, 2.0)
    x = torch.tensor([-3.0, -2.5, 0.7, 2.5, 4.0, 5.0], requires_grad=True)
    y = q(x)
    y.backward(torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 100.0]))
    assert torch.equal(y, fake_tensor_quant(x.clamp(-2, 2), torch.tensor(2.0), 8, False, False))
    assert x.grad.tolist() == [0, 0, 1, 0, 0, 0]
    assert (q.clip.clip_value_min.grad.item(), q.clip.clip_value_max.grad.item()) == (2.0, 111.0)


def test_learning_starts_from_calibration():
    q = made(learn_amax=True)
    assert (q.clip.clip_value_min.item(), q.clip.clip_value_max.item()) == (-1.0, 1.0)
    with pytest.raises(RuntimeError, match="calibrate"):
        q.init_learn_amax()
    q.amax = 5.0
    q.init_learn_amax()
    assert (q.clip.clip_value_min.item(), q.clip.clip_value_max.item()) == (-5.0, 5.0)
    with pytest.raises(RuntimeError, match="learn_amax"):
        TensorQuantizer().init_learn_amax()
    with pytest.raises(RuntimeError, match="learn_amax"):
        TensorQuantizer(if_clip=True)(torch.ones(1))


def test_clip_function_and_module():
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x = torch.tensor([-5.0, -1.5, 0.0, 1.0, 3.0], requires_grad=True)
    y = functional.clip(x, low, high)
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert y.tolist() == [-1, -1, 0, 1, 2]
    assert (x.grad.tolist(), low.grad.item(), high.grad.item()) == ([0, 0, 4, 8, 0], 3.0, 16.0)
    assert len(list(Clip(-1.0, 1.0).parameters())) == 0
    assert len(list(Clip(-1.0, 1.0, learn_min=True).parameters())) == 1
    assert Clip(-1.0, 1.0)(torch.tensor([3.0], dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("bound", [torch.tensor(0.5), torch.ones(3), np.ones(2)])
def test_what_learns_a_bound_begins_with_a_number(bound):
    assert Clip(0.0, bound)(torch.full((2, len(bound) if bound.ndim else 1), 7.0)).shape[0] == 2
    with pytest.raises(ValueError, match="clip_value_max must be scalar to be learned, a number"):
        Clip(0.0, bound, learn_max=True)


def test_bounds_of_several_numbers_clip_and_cannot_be_learned():
    low, high = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    x = torch.full((2, 3), 2.5, requires_grad=True)
    functional.clip(x, low, high.detach()).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1]] * 2
    y = functional.clip(x, low, high)
    assert y.tolist() == [[1.0, 2.0, 2.5]] * 2
    with pytest.raises(ValueError, match=r"can only be scalar: .* has the shape \(3,\)"):
        y.sum().backward()


# --- state -----------------------------------------------------------------------------------------


def test_checkpoints_make_the_buffers_they_have():
    source = made(axis=0)
    source.amax, source.pre_quant_scale = [[1.0], [2.0]], 0.5
    assert set(source.state_dict()) == {"_amax", "_pre_quant_scale"}
    target = made(axis=0)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target._amax, source._amax)
    assert target._pre_quant_scale.item() == 0.5
    target._amax.zero_()
    assert source._amax.sum() == 3


def test_a_range_of_one_number_loads_whatever_its_axes():
    q = made(axis=0)
    q.amax = [[1.0]]
    q.load_state_dict({"_amax": torch.tensor(4.0)})
    assert q.amax.item() == 4.0
    with pytest.raises(RuntimeError, match="size mismatch"):
        q.load_state_dict({"_amax": torch.ones(3, 1)})


def test_half_models_keep_exact_ranges():
    q = made(amax=0.1)
    q.half()
    assert q._amax.dtype == torch.float32
    assert q._amax.item() == torch.tensor(0.1).item()
    assert q(torch.ones(2, dtype=torch.float16)).dtype == torch.float16
    assert q(torch.ones(2, device="meta")).is_meta
    assert q._amax.device.type == "cpu"


def test_copies_and_files():
    q = made(amax=1.5, calib_method="histogram", axis=None)
    x = torch.randn(10)
    q._calibrator.collect(x)
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), q(x))
        assert other._calibrator._calib_hist.sum() == 10


def test_what_is_printed():
    assert str(TensorQuantizer(disabled=True)) == "TensorQuantizer(disabled)"
    for word in ("4bit", "unsigned", "axis=0", "[1.0000, 2.0000](2)", "MaxCalibrator", "quant"):
        assert word in str(made(num_bits=4, unsigned=True, axis=0, amax=[1.0, 2.0]))
    assert "dynamic" in str(TensorQuantizer())


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it imports its compiler
def test_compiles_to_one_graph():
    q = made(amax=1.0)
    x = torch.randn(8)
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), q(x))


@pytest.mark.parametrize("disabled", [False, True])
def test_torchs_fast_path_for_transformers_passes_no_quantizer_by(disabled):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    reached = []
    quantizer = TensorQuantizer(disabled=disabled)

    class Quantized(torch.nn.Linear):
        def forward(self, x):
            reached.append(x)
            return super().forward(quantizer(x))

    layer.linear1 = Quantized(8, 16)
    layer.linear1.quantizer = quantizer
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    assert reached
