"""Export: what is in the graph, and that onnxruntime computes the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pytorch_quantization
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Both exporters warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TORCHSCRIPT = {"dynamo": False, "opset_version": 13}
DYNAMO = {"dynamo": True, "opset_version": 20, "verbose": False}
EXPORTERS = pytest.mark.parametrize("settings", [TORCHSCRIPT, DYNAMO], ids=["script", "dynamo"])


def calibrated(model, x):
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for q in quantizers:
        q.disable_quant()
        q.enable_calib()
    model(x)
    for q in quantizers:
        q.load_calib_amax()
        q.enable_quant()
        q.disable_calib()
    return model.eval()


def network():
    torch.manual_seed(0)
    quant_modules.initialize()
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(54, 5))
    quant_modules.deactivate()
    return model


def export(model, x, path, settings):
    with pytorch_quantization.enable_onnx_export():
        torch.onnx.export(model, (x,), str(path), **settings)
    return onnx.load(str(path)).graph


def initializers(graph):
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def run(path, x):
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@EXPORTERS
def test_a_network(settings, tmp_path):
    model, x = network(), torch.randn(2, 3, 5, 5)
    calibrated(model, x)
    with torch.no_grad():
        model[0]._weight_quantizer._amax[0] = 0
        model[2]._input_quantizer.unsigned = True  # after a ReLU
        model[5]._weight_quantizer.narrow_range = True
        model[5]._weight_quantizer._amax *= 0.5  # so that it shows
        expected = model(x)
    graph = export(model, x, tmp_path / "m.onnx", settings)
    types = [node.op_type for node in graph.node]
    assert types.count("QuantizeLinear") == types.count("DequantizeLinear") == 7
    constants = initializers(graph)
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    per_channel = [node for node in quantize if constants[node.input[1]].ndim]
    assert sorted(node.attribute[0].i for node in per_channel) == [0, 0, 1]
    for node in quantize:
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        assert not zero.any()
        assert (scale > 0).all()
    amax = model[0]._input_quantizer._amax.item()
    assert constants[quantize[0].input[1]].item() == pytest.approx(amax / 127)
    assert any(s.ndim == 1 and s[0] == 1 for s in (constants[n.input[1]] for n in quantize))  # the range of 0
    assert sorted(str(constants[n.input[2]].dtype) for n in quantize) == ["int8"] * 6 + ["uint8"]
    assert np.abs(run(tmp_path / "m.onnx", x) - expected.numpy()).max() < 0.02
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("keywords", [{}, {"narrow_range": True}, {"unsigned": True}], ids=str)
def test_one_quantizer(keywords, tmp_path):
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, **keywords)).eval()
    # Away from ties, where multiplying and dividing may round to different sides.
    x = (torch.arange(-300, 300) + 0.25) / (255 if keywords.get("unsigned") else 127)
    x = x.abs() if keywords.get("unsigned") else x
    export(nn.Sequential(quantizer), x, tmp_path / "q.onnx", TORCHSCRIPT)
    assert np.allclose(run(tmp_path / "q.onnx", x), quantizer(x).numpy(), rtol=0, atol=1e-6)


@EXPORTERS
def test_half_precision_is_cast_around(settings, tmp_path):
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0)).eval()
    x = torch.randn(10).half()
    graph = export(nn.Sequential(quantizer), x, tmp_path / "q.onnx", settings)
    types = [n.op_type for n in graph.node if n.op_type != "Constant"]
    assert types == ["Cast", "QuantizeLinear", "DequantizeLinear", "Cast"]
    given = run(tmp_path / "q.onnx", x)
    assert given.dtype == np.float16
    assert np.abs(given - quantizer(x).numpy()).max() < 0.01


@EXPORTERS
def test_fp8_for_tensorrt(settings, tmp_path):
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=(4, 3), amax=2.0)).eval()
    graph = export(nn.Sequential(quantizer), torch.randn(10), tmp_path / "q.onnx", settings)
    nodes = [n for n in graph.node if n.op_type != "Constant"]
    assert [(n.domain, n.op_type) for n in nodes] == [
        ("trt", "TRT_FP8QuantizeLinear"),
        ("trt", "TRT_FP8DequantizeLinear"),
    ]
    assert initializers(graph)[nodes[0].input[1]].item() == pytest.approx(2 / 448)


@EXPORTERS
def test_not_calibrated_names_the_quantizer_and_leaves_no_flag(settings, tmp_path):
    model, x = nn.Sequential(nn.ReLU(), quant_nn.QuantLinear(3, 2)), torch.randn(4, 3)
    calibrated(model, x)
    del model[1]._weight_quantizer._amax
    with pytest.raises(RuntimeError) as caught:  # the dynamo exporter wraps the cause
        export(model, x, tmp_path / "m.onnx", settings)
    messages = [str(e) for e in (caught.value, caught.value.__cause__)]
    assert any("'1._weight_quantizer'" in m and "no amax" in m for m in messages), messages
    assert TensorQuantizer._enable_onnx_export is False
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_disabled_quantizer_needs_no_range(tmp_path):
    model, x = nn.Sequential(quant_nn.QuantLinear(3, 2)), torch.randn(4, 3)
    model[0]._input_quantizer.amax = 1.0
    model[0]._weight_quantizer.disable()
    graph = export(model, x, tmp_path / "m.onnx", TORCHSCRIPT)
    assert [n.op_type for n in graph.node].count("QuantizeLinear") == 1


@pytest.mark.parametrize(
    ("descriptor", "why"),
    [
        (QuantDescriptor(num_bits=4, amax=1.0), "4 bits"),
        (QuantDescriptor(num_bits=(4, 3), axis=0, amax=[1.0, 2.0]), "one range per tensor"),
        (QuantDescriptor(axis=(0, 1), amax=[[1.0, 2.0], [1.0, 2.0]]), "one axis"),
    ],
)
def test_what_onnx_has_no_operators_for(descriptor, why):
    layer = quant_nn.QuantLinear(
        2, 2, quant_desc_input=QuantDescriptor(amax=1.0), quant_desc_weight=descriptor
    )
    with pytorch_quantization.enable_onnx_export(), pytest.raises(RuntimeError, match=why) as caught:
        layer(torch.ones(2, 2))
    assert "_weight_quantizer" in str(caught.value)


def test_without_an_exporter_the_numbers_are_the_usual_ones():
    layer = calibrated(quant_nn.QuantLinear(3, 2), torch.randn(4, 3))
    x = torch.randn(4, 3)
    with quant_modules.enable_onnx_export():
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@EXPORTERS
def test_the_flag_of_older_scripts(settings, tmp_path, monkeypatch):
    layer, x = quant_nn.QuantLinear(3, 2), torch.randn(4, 3)
    calibrated(layer, x)
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)
    torch.onnx.export(layer, (x,), str(tmp_path / "m.onnx"), **settings)
    types = [node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert types.count("QuantizeLinear") == 2
