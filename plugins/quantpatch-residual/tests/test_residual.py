"""Residual additions of transformers' blocks, of a user's, and of a stand-in for torchvision's."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import residual_blocks
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import quantpatch as qp
import quantpatch_residual
from quantpatch.errors import EntryError, LayerError
from quantpatch.testing import CHECKS, NotApplicable, trials
from quantpatch_residual import residual_entry

ROOT = Path(__file__).resolve().parents[3]
FAST = [name for name, check in CHECKS.items() if not check.traces]
INSTALLED = [t for t in trials(["residual"]) if not t.target.startswith("torchvision")]


def images(batch=2):
    return torch.randn(batch, 3, 32, 32)


def resnet(kind="basic"):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64], depths=[1, 2], layer_type=kind, num_labels=4
    )
    return ResNetForImageClassification(config).eval()


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    "trial", [t for t in INSTALLED if t.check in FAST], ids=lambda t: f"{t.target.split('.')[-1]}-{t.check}"
)
def test_every_block_that_is_installed_passes_the_kit(trial):
    try:
        trial.run()
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_resnet_built_in_a_block_or_converted_is_quantized_and_loads_its_float_checkpoint(kind):
    model = resnet(kind)
    with qp.quantize_modules() as scope:
        built = resnet(kind)
    assert {row.plugin: row.count for row in scope.replaced if "Layer" in row.target} == {"residual": 3}
    built.load_state_dict(model.state_dict(), strict=True)
    x = images()
    qp.calibrate(built, [x])
    skips = {
        n: m.amax for n, m in built.named_modules() if n.endswith(("skip_quantizer", "branch_quantizer"))
    }
    assert len(skips) == 6
    assert None not in skips.values()
    converted = copy.deepcopy(model)
    qp.convert(converted)
    qp.calibrate(converted, [x])
    expected = built(x).logits
    assert torch.equal(converted(x).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(built))(x).logits, expected)
    assert 0 < (expected - model(x).logits).abs().max() < 0.2 * expected.abs().max()
    qp.revert(converted)
    assert torch.equal(converted(x).logits, model(x).logits)


def test_both_operands_of_every_addition_come_out_of_a_pair_in_the_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    with qp.quantize_modules():
        model = resnet()
    x = images()
    qp.calibrate(model, [x])
    assert qp.audit(model, x).share == 1.0
    qp.export_onnx(model, x, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    sums = [node for node in graph.node if node.op_type == "Add"]
    of_activations = [
        [made_by[name] for name in node.input] for node in sums if set(node.input) <= set(made_by)
    ]
    assert of_activations == [["DequantizeLinear"] * 2] * 3


def test_for_tensorrt_the_skip_connection_alone_is_quantized(tmp_path):
    onnx = pytest.importorskip("onnx")
    with qp.quantize_modules():
        model = resnet()
    qp.configure(model, {"*.branch_quantizer": None})
    qp.calibrate(model, [images()])
    qp.export_onnx(model, images(), tmp_path / "model.onnx", runtime="tensorrt", check=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    sums = [[made_by.get(name) for name in node.input] for node in graph.node if node.op_type == "Add"]
    assert sums.count(["BatchNormalization", "DequantizeLinear"]) == 3


def test_blocks_that_do_not_add_get_no_quantizers_so_calibration_misses_none():
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=4)
    with qp.quantize_modules():
        model = MobileNetV2ForImageClassification(config)
    qp.calibrate(model, [images()])  # strict
    # The block goes by its float name, as a device map would look for it.
    blocks = [m for m in model.modules() if type(m).__name__ == "MobileNetV2InvertedResidual"]
    assert blocks
    assert all(isinstance(block, qp.QuantizedLayer) for block in blocks)
    assert {len(block.quantizers()) for block in blocks if block.use_residual} == {2}
    assert {len(block.quantizers()) for block in blocks if not block.use_residual} == {0}


# --- A user's blocks ------------------------------------------------------------------------------


def test_a_users_block_is_quantized_where_it_adds():
    entry = residual_entry(residual_blocks, "Block", operands=(None, "skip"), only_if="use_skip")
    model = nn.Sequential(residual_blocks.Block(3), residual_blocks.Block(3, use_skip=False))
    qp.convert(model, custom=[entry])
    qp.calibrate(model, images())
    names = [
        name for name, _ in model.named_modules() if name.endswith("_quantizer") and name.count(".") == 1
    ]
    assert names == ["0.skip_quantizer"]
    block, x = model[0], images()
    assert torch.equal(block(x), block.conv(x) + block.skip_quantizer(x))


def test_one_class_for_each_block_and_it_is_found_by_another_process(tmp_path):
    with qp.quantize_modules(custom=[residual_entry("residual_blocks", "Block")]):
        block = residual_blocks.Block(3)
    again = residual_entry("residual_blocks", "Block").load_replacement()
    assert type(block) is again
    assert type(block).__name__ == "Block"
    assert block._get_name() == "QuantBlock"
    (tmp_path / "block.pickle").write_bytes(pickle.dumps(block))
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[2]); "
        "print(list(pickle.load(open(sys.argv[1], 'rb')).quantizers()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "block.pickle"), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "['left_quantizer', 'right_quantizer']", done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"operands": (None, None)},
        {"operands": ("a b", "c")},
        {"operands": ("a",)},
        {"only_if": "not a name"},
    ],
)
def test_names_that_are_none_are_refused(options):
    with pytest.raises(EntryError, match="such as operands=\\('branch', 'skip'\\)"):
        residual_entry(residual_blocks, "Block", **options)


def test_a_block_that_does_not_add_is_an_error_that_names_it():
    with pytest.raises(LayerError, match=r"Plain.forward, with the methods it calls, has no add"):
        residual_entry(residual_blocks, "Plain").load_replacement()


def test_a_name_that_is_none_of_its_classes_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'QuantBlock'"):
        quantpatch_residual.blocks.QuantBlock  # noqa: B018


# --- torchvision ----------------------------------------------------------------------------------

# What torchvision's own blocks look like to this plugin: where they are and how they add.
STAND_IN = {
    "resnet": """
class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(BasicBlock):
    def __init__(self, inplanes, planes):
        super().__init__(inplanes, planes * 4)

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)
""",
    "mobilenetv2": """
class InvertedResidual(nn.Module):
    def __init__(self, inp, oup, stride, expand_ratio):
        super().__init__()
        hidden = inp * expand_ratio
        self.use_res_connect = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1), nn.ReLU6(), nn.Conv2d(hidden, oup, 3, stride, 1), nn.BatchNorm2d(oup)
        )

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)
""",
}


def test_torchvisions_blocks_are_known_by_name_and_lost_ones_are_named(tmp_path):
    models = tmp_path / "torchvision" / "models"
    models.mkdir(parents=True)
    for folder in (models.parent, models):
        (folder / "__init__.py").touch()
    for name, source in STAND_IN.items():
        (models / f"{name}.py").write_text(f"from torch import nn\n{source}")
    wanted = ("disabled", "operands", "pickled", "converted")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_quantpatch", "-p", "no:hypothesispytest", "-rs",
         "--quantpatch-conformance",
         "--quantpatch-plugin", "residual", "-k", f"torchvision and ({' or '.join(wanted)} or examples)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{3 * len(wanted)} passed, 4 skipped" in done.stdout
    assert "the torchvision that is installed has no torchvision.models.efficientnet.MBConv" in done.stdout


def test_the_readme_is_true(monkeypatch, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("docs_tests", ROOT / "tests" / "test_docs.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    page = Path(__file__).resolve().parent.parent / "README.md"
    docs.test_every_python_block_runs_and_prints_what_the_page_shows(page, monkeypatch, capsys, tmp_path)


def test_listing_the_plugin_imports_none_of_its_targets():
    code = (
        "import sys, quantpatch; quantpatch.registry.entries(['residual']); "
        "print([m for m in ('torchvision', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
