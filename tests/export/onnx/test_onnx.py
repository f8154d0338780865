"""export_onnx: the file computes what the model computes, and what it cannot say is refused."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import (
    ExportError,
    FileError,
    MissingExtraError,
    QuantPatchWarning,
    UnknownNameError,
)
from quantpatch.export.onnx.export import export_onnx
from quantpatch.export.onnx.sessions import session_options

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
import onnxruntime as ort
from exported_files import assert_same, calibrated, fingerprint, initializers, linear, refused, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# --- Exactness ----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "int8": {},
    "int8 narrow": {"narrow_range": True},
    "uint8": {"unsigned": True},
    "uint8_z37": {"unsigned": True, "zero_point": 37},
    "uint4_z9": {"num_bits": 4, "unsigned": True, "zero_point": 9},
    "int4": {"num_bits": 4},
    "uint3": {"num_bits": 3, "unsigned": True},
    "fp8_e4m3": {"num_bits": (4, 3)},
    "fp8_e5m2": {"num_bits": (5, 2)},
}


class Quantizers(nn.Module):
    """One quantizer of each kind on the same input; the last two have a range for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(
            qp.TensorQuantizer(qp.QuantDescriptor(amax=2.7182817, **options))
            for options in ACTIVATIONS.values()
        )
        for narrow in (False, True):
            rows = qp.TensorQuantizer(qp.QuantDescriptor(axis=0, narrow_range=narrow))
            rows.amax = torch.tensor([[0.3], [0.0], [2.7182817]])
            self.all.append(rows)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(quantizer(x) for quantizer in self.all)


def adversarial(amax: float, top: float, count: int) -> torch.Tensor:
    """Halfway points between integers and their neighbours, zeros, what is outside, and random values."""
    scale = torch.tensor(amax) / top
    ties = (torch.arange(-140, 140) + 0.5) * scale
    up, down = torch.full_like(ties, torch.inf), torch.full_like(ties, -torch.inf)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, torch.inf, -torch.inf, amax, -amax])
    values = [special, ties, torch.nextafter(ties, up), torch.nextafter(ties, down)]
    missing = count - sum(v.numel() for v in values)
    return torch.cat([*values, torch.randn(missing) * amax])


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_every_pair_is_exact_bit_for_bit(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Quantizers()
    if runtime == "tensorrt":  # what that runtime takes
        model.all = nn.ModuleList([model.all[0], model.all[1], model.all[5], model.all[7]])
    tops = (127.0, 255.0, 7.0, 448.0)
    x = torch.stack([torch.cat([adversarial(2.7182817, top, 4000) for top in tops])] * 3)
    report = export_onnx(model, x, tmp_path / "q.onnx", runtime=runtime)
    assert report.comparison is not None
    assert report.comparison.differing == report.comparison.mismatching == 0
    assert report.comparison.integers > 3 * x.numel()
    for name, expected, got in zip(
        [*ACTIVATIONS, "rows", "narrow rows"], model(x), run(tmp_path / "q.onnx", x), strict=False
    ):
        different = expected.view(torch.int32) != got.view(torch.int32)
        # -0 and 0 are one number; FP8 has both.
        different &= ~((expected == 0) & (got == 0))
        assert int(different.sum()) == 0, (name, expected[different][:5], got[different][:5])


class Small(nn.Module):
    """Layers of every kind that has an integer kernel, a residual connection and a dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.pool = nn.AvgPool2d(2)
        self.inner = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.conv.weight[3] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        y = self.up(torch.relu(self.depthwise(y)) + y)
        y = self.pool(y).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.inner(y)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("recipe", ["int8", "w4a8", "int8 everywhere"])
def test_a_model_agrees_with_optimizations_off_and_on(recipe: str, tmp_path: Path) -> None:
    chosen: Any = recipe
    if recipe == "int8 everywhere":
        chosen = qp.Recipe(name="everywhere", output=qp.QuantDescriptor())
    model = calibrated(Small, X, recipe=chosen)
    before = fingerprint(model)
    path = tmp_path / "m.onnx"
    report = export_onnx(model, X, path, dynamic_shapes=({0: "batch"},))
    assert_same(before, fingerprint(model))
    comparison = report.comparison
    assert comparison is not None
    # Sums of products in another order: rounding of float32, and seldom an integer that was on the edge.
    assert comparison.differing <= 1e-4 * comparison.integers
    assert comparison.mismatching == 0
    assert comparison.integers > 1000
    step = model(X).abs().max().item() / 127
    for batch in (X, torch.randn(5, 3, 8, 8)):
        expected = model(batch)
        difference = (run(path, batch)[0] - expected).abs()
        assert difference.max() <= 1e-5 * expected.abs().max() or comparison.differing
        difference = (run(path, batch, optimized=True)[0] - expected).abs()
        assert (difference <= step * 1.001).float().mean() >= 0.999
    # Weights; of as many dimensions is only the scale of the transposed convolution, for each channel.
    weights = [t for t in initializers(path).values() if sum(size > 1 for size in t.dims) > 1]
    stored = {t.data_type for t in weights if math.prod(t.dims) >= 256 or recipe != "w4a8"}
    assert stored == {onnx.TensorProto.INT4 if recipe == "w4a8" else onnx.TensorProto.INT8}
    assert "m.onnx" in str(report)
    assert "integers differ" in str(report)
    assert comparison.within_step is not None
    assert comparison.within_step >= 0.999
    assert re.search(r"in the runtime +100.00% within a step", str(report))
    assert list(tmp_path.iterdir()) == [path]


def test_integer_kernels_run(tmp_path: Path) -> None:
    model = calibrated(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)),
        X,
        recipe=qp.Recipe(name="everywhere", output=qp.QuantDescriptor()),
    )
    export_onnx(model, X, tmp_path / "m.onnx", check=False)
    options = session_options(optimized=True)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert kinds.count("QLinearConv") == 2
    assert not {"Conv", "MatMul", "Gemm"} & set(kinds)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "fp8"])
def test_weight_formats(recipe: str, tmp_path: Path) -> None:
    """Blocks with a shorter last one, and FP8."""
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(200, 32), nn.ReLU(), nn.Linear(32, 3))  # noqa: E731
    x = torch.randn(4, 200)
    if recipe == "fp8":
        model = calibrated(build, x, recipe=recipe)
    else:
        with qp.quantize_modules(recipe=recipe):
            model = build().eval()
    export_onnx(model, x, tmp_path / "m.onnx")
    assert torch.allclose(run(tmp_path / "m.onnx", x)[0], model(x), rtol=1e-5, atol=1e-5)
    kinds = {
        tensor.data_type for tensor in initializers(tmp_path / "m.onnx").values() if len(tensor.dims) > 1
    }
    assert (onnx.TensorProto.FLOAT8E4M3FN if recipe == "fp8" else onnx.TensorProto.INT4) in kinds


def test_weights_of_four_bits_before_there_was_such_a_type(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    model = calibrated(lambda: nn.Sequential(nn.Linear(8, 4)), x, recipe="w4a8")
    report = export_onnx(model, x, tmp_path / "m.onnx", opset=20)
    assert report.comparison is not None
    assert report.comparison.differing == 0
    stored = {t.data_type for t in initializers(tmp_path / "m.onnx").values() if len(t.dims) > 1}
    assert stored == {onnx.TensorProto.INT8}


def test_half_precision_keeps_scales_in_float32(tmp_path: Path) -> None:
    model = calibrated(lambda: nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)).half()
    x = torch.randn(3, 8).half()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.comparison is not None
    assert report.comparison.differing == 0
    assert report.comparison.relative_difference < 2e-3


def test_metadata(tmp_path: Path, plugin: Any) -> None:
    name = plugin("some-plugin")
    model = calibrated(lambda: nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4))
    export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx", input_names=["x"], output_names=["y"])
    proto = onnx.load(str(tmp_path / "m.onnx"))
    found = {prop.key: prop.value for prop in proto.metadata_props}
    assert found["quantpatch.version"]
    assert found["quantpatch.runtime"] == "onnxruntime"
    assert json.loads(found["quantpatch.recipe"])["0.weight_quantizer"] == {"axis": 0, "narrow_range": True}
    assert name in [entry["name"] for entry in json.loads(found["quantpatch.plugins"])]
    assert [proto.graph.input[0].name, proto.graph.output[0].name] == ["x", "y"]
    # Paths of whoever exported it are nobody's business.
    assert b"site-packages" not in (tmp_path / "m.onnx").read_bytes()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_large_models_have_their_data_beside_them(
    runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpatch.export.onnx.export._LARGE", 1000)
    model = calibrated(lambda: nn.Sequential(nn.Linear(64, 64)), torch.randn(3, 64))
    x = torch.randn(3, 64)
    report = export_onnx(model, x, tmp_path / "m.onnx", runtime=runtime)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert torch.allclose(run(tmp_path / "m.onnx", x)[0], model(x), atol=1e-5)
    assert report.comparison is not None
    assert report.comparison.kernels == (1 if runtime == "onnxruntime" else 0)
    assert report.comparison.kernels_within_step == (1.0 if runtime == "onnxruntime" else None)


def test_training_mode_and_disabled_quantizers_are_respected(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = calibrated(lambda: nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9), nn.Linear(2, 2)), x)
    model[0].input_quantizer.disable()
    model[2].weight_quantizer.disable()
    model.train()
    report = export_onnx(model, x, tmp_path / "m.onnx", opset=20)
    assert report.quantizers == ("0.weight_quantizer", "2.input_quantizer")
    assert all(module.training for module in model.modules())
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == 20
    assert torch.allclose(run(tmp_path / "m.onnx", x)[0], model.eval()(x), atol=1e-5)


# --- Refusals -----------------------------------------------------------------------------------------------


def test_uncalibrated_and_calibrating_quantizers(tmp_path: Path) -> None:
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    error = refused(model, tmp_path / "m.onnx")
    assert error.quantizers == ("0.input_quantizer", "0.weight_quantizer")
    assert "qp.calibrate(model, batches)" in str(error)
    model = linear()
    model[1].input_quantizer.enable_calib()
    assert refused(model, tmp_path / "m.onnx").quantizers == ("1.input_quantizer",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": qp.QuantDescriptor(dynamic=True)}, "range from each tensor"),
        ({"weight": qp.QuantDescriptor(format="mxfp8_e4m3", dynamic=True)}, "no operator in ONNX"),
        ({"weight": qp.QuantDescriptor(format="fp6_e2m3")}, "no operator in ONNX"),
        ({"weight": qp.QuantDescriptor(format="int4_g32", dynamic=True), "opset": 20}, "opset 21"),
    ],
)
def test_what_onnx_cannot_say(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    opset = options.pop("opset", 21)
    error = refused(linear(**options), tmp_path / "m.onnx", opset=opset)
    options["opset"] = opset
    assert message in str(error)
    assert error.runtime == "onnxruntime"


def test_a_model_that_cannot_be_traced(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    model = calibrated(Branching, torch.randn(3, 4))
    message = str(refused(model, tmp_path / "m.onnx"))
    assert "cannot be traced" in message
    assert "Could not guard on data-dependent expression" in message


def test_a_failed_export_keeps_the_old_file_and_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def broken(*args: Any, **options: Any) -> None:
        raise ExportError("does not run")

    monkeypatch.setattr("quantpatch.export.onnx.check.compare_with_torch", broken)
    model = linear()
    before = fingerprint(model)
    with pytest.raises(ExportError, match="does not run"):
        export_onnx(model, torch.randn(3, 4), path)
    assert_same(before, fingerprint(model))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """No file may be longer than 500 bytes here, as the system says to whoever writes."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            export_onnx(linear(), torch.randn(3, 4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_export_at_once(tmp_path: Path) -> None:
    models = [linear(), linear()]
    x = torch.randn(3, 4)
    jobs = [(models[0], "onnxruntime"), (models[0], "tensorrt"), (models[1], "onnxruntime")]

    def job(index: int) -> int:
        model, runtime = jobs[index]
        report = export_onnx(model, x, tmp_path / f"{index}.onnx", runtime=runtime)
        assert report.comparison is not None
        return report.comparison.mismatching + report.comparison.differing

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(job, range(3))) == [0, 0, 0]
    zeros = {t.data_type for t in initializers(tmp_path / "1.onnx").values() if not t.dims}
    assert onnx.TensorProto.INT8 in zeros  # each its own runtime's


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_tied_weights_and_names_beyond_ascii(tmp_path: Path) -> None:
    ids = torch.arange(10)[None]
    model = calibrated(Tied, ids)
    path = tmp_path / "modèle ☃.onnx"
    report = export_onnx(model, ids, path, dynamic_shapes=({1: "länge"},))
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)
    more = torch.arange(25)[None]
    assert torch.allclose(run(path, more)[0], model(more), atol=1e-5)
    assert model.head.weight is model.table.weight


def test_a_model_in_bfloat16_is_written_and_said_to_be_unchecked(tmp_path: Path) -> None:
    ids = torch.arange(10)[None]
    comparison = export_onnx(calibrated(Tied, ids).bfloat16(), ids, tmp_path / "m.onnx").comparison
    assert comparison is not None
    assert "no kernels of bfloat16" in str(comparison)
    kinds = {t.data_type for t in initializers(tmp_path / "m.onnx").values()}
    assert onnx.TensorProto.INT8 in kinds  # and the scale is in float32
    assert onnx.TensorProto.FLOAT in kinds


def test_outputs_that_kernels_compute_otherwise_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file does whose integers saturate on a processor, say."""

    class Saturating(ort.InferenceSession):
        def run(self, names: Any, feed: Any) -> Any:
            if self.get_session_options().graph_optimization_level == 0:
                return super().run(names, feed)
            (output,) = super().run(names, feed)
            output[0] *= 1.1
            return [output]

    monkeypatch.setattr("onnxruntime.InferenceSession", Saturating)
    comparison = export_onnx(linear(), torch.randn(3, 4), tmp_path / "m.onnx").comparison
    assert comparison is not None
    assert comparison.within_step is not None
    assert 0.5 < comparison.within_step < 0.9
    assert comparison.relative_difference < 1e-5


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    with pytest.raises(UnknownNameError, match="tensorrt"):
        export_onnx(model, X, tmp_path / "m.onnx", runtime="tensortr")
    for opset in (17, 99, "21", True):
        assert "opset is a number from 19 to" in str(refused(model, tmp_path / "m.onnx", opset=opset))
    with pytest.raises(FileError, match="is a folder"):
        export_onnx(model, torch.randn(3, 4), tmp_path)
    with pytest.raises(FileError, match="there is no folder"):
        export_onnx(model, torch.randn(3, 4), tmp_path / "missing" / "m.onnx")
    assert "export the module inside" in str(refused(nn.DataParallel(model), tmp_path / "m.onnx"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"quantpatch\[onnx\]"):
        export_onnx(model, X, tmp_path / "m.onnx")


def test_a_float_model_is_reported(tmp_path: Path) -> None:
    with pytest.warns(QuantPatchWarning, match="the file will be float"):
        export_onnx(nn.Linear(4, 4), torch.randn(3, 4), tmp_path / "m.onnx")


def test_blocks_are_no_longer_than_a_row(tmp_path: Path) -> None:
    x = torch.randn(3, 24)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 8)).eval()
    qp.convert(model, recipe="int4-weight-only")
    export_onnx(model, x, tmp_path / "m.onnx", runtime="tensorrt")
    (node,) = (n for n in onnx.load(str(tmp_path / "m.onnx")).graph.node if n.op_type == "DequantizeLinear")
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": 24}
    (result,) = run(tmp_path / "m.onnx", x)
    torch.testing.assert_close(result, model(x).detach())


def test_an_export_that_fails_while_it_traces_leaves_the_model_alone(tmp_path: Path) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                raise RuntimeError("not to be traced")
            result: torch.Tensor = self.layer(x)
            return result

    model = calibrated(Failing, torch.randn(3, 4))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    refused(model, tmp_path / "m.onnx")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_what_torch_compile_makes_of_a_model_is_not_a_file_without_quantizers(tmp_path: Path) -> None:
    class OnlyCompiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layer(x)
            if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
                raise RuntimeError("not to be run")
            return result

    model = calibrated(OnlyCompiled, torch.randn(3, 4))
    assert "not to be run" in str(refused(model, tmp_path / "m.onnx"))
