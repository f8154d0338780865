"""What scripts written for the toolkit do, as they do it; parameters by pattern; names."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pytorch_quantization
import quantpatch as qp
from pytorch_quantization import calib, quant_modules
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.optim import helper
from pytorch_quantization.tensor_quant import QuantDescriptor


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding="same", bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.layer1 = Block(8)
        self.layer2 = Block(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.pool(self.layer2(self.layer1(self.stem(x)))).flatten(1))


def batches(count):
    """Images whose class is the half that is brighter."""
    torch.manual_seed(3)
    for _ in range(count):
        labels = torch.randint(2, (32,))
        images = torch.randn(32, 1, 8, 8)
        images[labels == 1, :, :, :4] += 1.5
        images[labels == 0, :, :, 4:] += 1.5
        yield images, labels


def train(model, steps, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for images, labels in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model):
    model.eval()
    return sum((model(x).argmax(1) == y).float().mean().item() for x, y in batches(4)) / 4


def collect_stats(model, data_loader, num_batches):
    for _name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    for i, (image, _) in enumerate(data_loader):
        model(image)
        if i >= num_batches:
            break
    for _name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model, **kwargs):
    for _name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer) and module._calibrator is not None:
            if isinstance(module._calibrator, calib.MaxCalibrator):
                module.load_calib_amax()
            else:
                module.load_calib_amax(**kwargs)


@functools.cache
def trained_state():
    torch.manual_seed(0)
    model = ResNet()
    train(model, 25, 0.05)
    return model.state_dict()


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_calibrate_and_fine_tune(method, tmp_path, monkeypatch):
    float_model = ResNet()
    float_model.load_state_dict(trained_state())
    torch.save(float_model.state_dict(), tmp_path / "float.pth")

    for cls in (quant_nn.QuantConv2d, quant_nn.QuantLinear, quant_nn.QuantAdaptiveAvgPool2d):
        monkeypatch.setattr(cls, "default_quant_desc_input", cls.default_quant_desc_input)
        cls.set_default_quant_desc_input(
            QuantDescriptor(calib_method="max" if method == "max" else "histogram")
        )
    quant_modules.initialize()
    model = ResNet()
    quant_modules.deactivate()
    model.load_state_dict(torch.load(tmp_path / "float.pth"))

    model.eval()
    with torch.no_grad():
        collect_stats(model, batches(4), num_batches=2)
        compute_amax(model, method=method)
    names = {k for k in model.state_dict() if k.endswith("_quantizer._amax")}
    assert "layer1.conv1._weight_quantizer._amax" in names
    assert len(names) == 2 * 6 + 1
    assert accuracy(float_model) > 0.9
    assert accuracy(model) > accuracy(float_model) - 0.05

    train(model, 5, 0.005)
    torch.save(model.state_dict(), tmp_path / "quant.pth")
    quant_modules.initialize()
    again = ResNet()
    quant_modules.deactivate()
    again.load_state_dict(torch.load(tmp_path / "quant.pth"))
    x, _ = next(batches(1))
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert type(ResNet().stem) is nn.Conv2d


def test_quantpatchs_audit_and_revert_know_the_toolkits_quantizers():
    quant_modules.initialize()
    model, recurrent = ResNet(), nn.LSTM(2, 2)
    quant_modules.deactivate()
    images, _ = next(iter(batches(1)))
    assert qp.audit(model, images).share == 1.0
    assert qp.audit(recurrent, torch.randn(3, 1, 2)).share == 1.0

    model.fc.input_quantizer.disable()
    (row,) = (row for row in qp.audit(model, images).rows if not row.quantized)
    assert row.module == "fc"
    assert row.reason == "_input_quantizer of QuantLinear is switched off"

    for made, plain in ((model, ResNet()), (recurrent, nn.LSTM(2, 2))):
        qp.revert(made)
        assert [type(module) for module in made.modules()] == [type(module) for module in plain.modules()]


def test_quantizers_by_name_and_by_hand():
    """As with partial quantization: some layers off, one residual input of one's own."""
    quant_modules.initialize()
    model = ResNet()
    quant_modules.deactivate()
    for name, module in model.named_modules():
        if name.endswith("_quantizer") and name.startswith("layer1"):
            module.disable()
    assert sum(m._disabled for m in model.modules() if isinstance(m, quant_nn.TensorQuantizer)) == 4
    model.layer1.residual_quantizer = quant_nn.TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)
    model(torch.randn(1, 1, 8, 8))
    calib.calibrate_weights(model, method="percentile", perchannel=True, percentile=99.99)
    assert all(
        m._weight_quantizer.amax is not None for m in model.modules() if hasattr(m, "_weight_quantizer")
    )


# --- optim.helper ----------------------------------------------------------------------------------


def test_match_and_freeze():
    model = ResNet()
    matched = list(helper.match_parameters(model, ["conv1", r"^fc\.weight$", "conv1.weight"]))
    assert [id(p) for p in matched] == [
        id(p) for p in (model.layer1.conv1.weight, model.layer2.conv1.weight, model.fc.weight)
    ]
    helper.freeze_parameters(model, ["layer1"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("layer1")}


def test_groups_for_an_optimizer():
    model = ResNet()
    groups = helper.group_parameters(
        model, [["conv"], ["fc", "stem"]], lrs=[0.1, None], weight_decays=[0.0, 1e-4]
    )
    assert [len(g["params"]) for g in groups] == [4, 4]
    assert [(g.get("lr"), g.get("weight_decay"), g.get("momentum")) for g in groups] == [
        (0.1, 0.0, None),
        (None, 1e-4, None),
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    with pytest.raises(TypeError, match=r"len\(momentums\) must match len\(patterns_list\)"):
        helper.group_parameters(model, [["conv"]], momentums=[0.1, 0.2])
    with pytest.raises(TypeError, match="must be list of list of patterns"):
        helper.group_parameters(model, ["conv"])


def test_weights_are_replaced_by_their_quantized_values():
    model = nn.Sequential(quant_nn.QuantLinear(3, 2), quant_nn.QuantLSTM(2, 2), nn.Linear(2, 2))
    linear, lstm = model[0].weight.clone(), torch.cat([model[1].weight_ih_l0, model[1].weight_hh_l0], 1)
    untouched = model[2].weight.clone()
    helper.quant_weight_inplace(model)
    assert torch.equal(model[0].weight, model[0]._weight_quantizer(linear))
    now = torch.cat([model[1].weight_ih_l0, model[1].weight_hh_l0], 1)
    assert torch.equal(now, model[1]._weight_quantizers[0](lstm))
    assert torch.equal(model[2].weight, untouched)
    assert model[0].weight.requires_grad


# --- names -----------------------------------------------------------------------------------------

NAMES = {
    "": ["calib", "nn", "quant_modules", "tensor_quant", "utils", "optim", "enable_onnx_export"],
    ".quant_modules": ["initialize", "deactivate", "enable_onnx_export", "QuantModuleReplacementHelper"],
    ".nn.modules.tensor_quantizer": ["TensorQuantizer"],
    ".nn.modules.quant_conv": ["QuantConv2d", "QuantConvTranspose3d", "Conv2d"],
    ".nn.modules.quant_linear": ["QuantLinear", "Linear"],
    ".nn.modules.quant_rnn": ["QuantLSTM", "QuantLSTMCell", "LSTM", "LSTMCell"],
    ".nn.modules.quant_pooling": ["QuantMaxPool2d", "QuantAdaptiveAvgPool1d", "AvgPool3d"],
    ".nn.modules.quant_instancenorm": ["QuantInstanceNorm2d", "InstanceNorm1d"],
    ".nn.modules.clip": ["Clip"],
    ".nn.modules._utils": ["QuantMixin", "QuantInputMixin", "pop_quant_desc_in_kwargs"],
    ".nn": ["Clip", "functional", "modules", "TensorQuantizer", "QuantLinear", "Linear", "QuantMaxPool3d"],
    ".nn.functional": ["clip"],
    ".calib": ["MaxCalibrator", "HistogramCalibrator", "calibrate_weights"],
    ".optim.helper": ["match_parameters", "group_parameters", "freeze_parameters", "quant_weight_inplace"],
    ".utils": ["reduce_amax"],
    ".cuda_ext": ["fake_tensor_quant", "fake_tensor_quant_", "fake_tensor_quant_with_axis", "fake_e4m3fy"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_scripts_import_them_from(module):
    found = importlib.import_module(f"pytorch_quantization{module}")
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_the_version_is_the_toolkits():
    assert pytorch_quantization.__version__ == "2.2.1"
    assert quant_modules.enable_onnx_export is pytorch_quantization.enable_onnx_export


# --- quantpatch's functions ------------------------------------------------------------------------


@pytest.fixture
def calibrated():
    quant_modules.initialize()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    quant_modules.deactivate()
    quantizers = [m for m in model.modules() if isinstance(m, quant_nn.TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.enable_calib()
        quantizer.disable_quant()
    model(torch.randn(2, 1, 4, 4))
    for quantizer in quantizers:
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return model


def test_a_summary_lists_the_toolkits_quantizers(calibrated):
    calibrated[3]._input_quantizer.disable()
    del calibrated[3]._weight_quantizer._amax
    rows = qp.summary(calibrated).rows
    assert [(row.name, row.layer, row.format, row.bits, row.axis, row.ranges, row.state) for row in rows] == [
        ("0._input_quantizer", "QuantConv2d", "int8", 8, (), 1, "calibrated"),
        ("0._weight_quantizer", "QuantConv2d", "int8", 8, (0,), 4, "calibrated"),
        ("3._input_quantizer", "QuantLinear", "int8", 8, (), 1, "disabled"),
        ("3._weight_quantizer", "QuantLinear", "int8", 8, (0,), 0, "dynamic (not calibrated)"),
    ]
    assert rows[0].amax_max == calibrated[0]._input_quantizer._amax.item()
    assert qp.summary(calibrated).float_layers == ()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("save", lambda m, path: qp.save(m, path)),
        ("load", lambda m, path: qp.load(m, path)),
        ("export_onnx", lambda m, path: qp.export_onnx(m, torch.randn(2, 1, 4, 4), path)),
        ("prepare", lambda m, path: qp.prepare(m, torch.randn(2, 1, 4, 4))),
        ("calibrate", lambda m, path: qp.calibrate(m, [torch.randn(2, 1, 4, 4)])),
        ("fit_zero_points", lambda m, path: qp.fit_zero_points(m, [torch.randn(2, 1, 4, 4)])),
        ("configure", lambda m, path: qp.configure(m, {"*": "int4"})),
        ("sensitivity", lambda m, path: qp.sensitivity(m, lambda model: 0.0)),
        ("folded_weights", lambda m, path: qp.folded_weights(m)),
        ("float_state_dict", lambda m, path: qp.float_state_dict(m)),
    ],
)
def test_functions_for_quantpatchs_own_quantizers_say_what_to_write_instead(name, call, calibrated, tmp_path):
    before = {key: value.clone() for key, value in calibrated.state_dict().items()}
    with pytest.raises(
        qp.errors.ArgumentTypeError, match=f"^{name} does not know the quantizers in Sequential"
    ) as told:
        call(calibrated, tmp_path / "file")
    assert "'0._input_quantizer', a TensorQuantizer of pytorch_quantization. Instead write: " in str(
        told.value
    )
    assert quant_nn.TensorQuantizer.instead[name] in str(told.value)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, before[key]) for key, value in calibrated.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch.nn.modules.rnn")
@pytest.mark.parametrize("layer", ["calibrated", "uncalibrated", "learned", "lstm"])
def test_a_tracer_warns_of_nothing_in_this_code(layer, calibrated):
    x = torch.randn(2, 1, 4, 4)
    if layer == "uncalibrated":
        model = quant_nn.QuantConv2d(1, 4, 3)
    elif layer == "learned":
        model = quant_nn.QuantConv2d(1, 4, 3, quant_desc_input=QuantDescriptor(learn_amax=True))
    elif layer == "lstm":
        model, x = quant_nn.QuantLSTM(4, 3, 2, bidirectional=True), torch.randn(5, 2, 4)
    else:
        model = calibrated
    traced = torch.jit.trace(model.eval(), x, check_trace=False)
    expected, got = model(x), traced(x)
    assert torch.equal(*(out[0] if isinstance(out, tuple) else out for out in (expected, got)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_exporter_that_traces_warns_of_nothing_in_this_code(calibrated, tmp_path):
    with quant_modules.enable_onnx_export():
        torch.onnx.export(
            calibrated, (torch.randn(2, 1, 4, 4),), tmp_path / "a.onnx", opset_version=17, dynamo=False
        )
