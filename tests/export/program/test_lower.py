"""``lower``: integer kernels by PyTorch's compiler, that compute the model's integers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, ExportError, InputError, MissingExtraError, QuantPatchWarning
from quantpatch.export.prepare.exported import operands
from quantpatch.export.program import needs
from quantpatch.export.program.capture import captured
from quantpatch.export.program.export import checked_operands
from quantpatch.export.program.kernels import layers_on_integers
from quantpatch.export.program.needs import instructions
from quantpatch.export.program.passes import before_compiling
from quantpatch.numerics.fake_quant import quantize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A bit of all: fused activations and additions, pooling, and a layer without an integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish(), nn.Conv2d(16, 16, 1)
        )
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8 * 100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        result: Tensor = self.head(self.up(x).flatten(1))
        return result


def built(
    build: Callable[[], nn.Module], x: Tensor, *, prepare: bool = True, recipe: Any = "int8", **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe, **options):
        model = build().eval()
    if prepare:
        qp.prepare(model, x, runtime="inductor")
    qp.calibrate(model, [x], progress=False)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))


def lower(model: nn.Module, x: Tensor, **options: Any) -> qp.export.LoweredModel:
    return qp.lower(model, x, **{"latency": False, "progress": False, **options})


# --- what is compiled -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, qp.export.LoweredModel]:
    model = built(Net, X)
    return model, lower(model, X)


def test_it_gives_what_the_model_gives(net: tuple[nn.Module, qp.export.LoweredModel]) -> None:
    model, lowered = net
    with torch.no_grad():
        expected = model(X)
    step = expected.abs().max().item() / 127
    assert (lowered(X) - expected).abs().max().item() < step
    compared = lowered.report.comparison
    assert compared is not None
    assert compared.within_step > 0.95
    assert compared.not_random == ""


def test_the_integers_of_each_kernel_are_the_models(net: tuple[nn.Module, qp.export.LoweredModel]) -> None:
    compared = net[1].report.comparison
    assert compared is not None
    assert compared.integers >= 800
    assert compared.differing <= compared.integers * 1e-4
    assert compared.furthest <= 1


def test_the_report_names_what_runs_on_integers_and_what_does_not(
    net: tuple[nn.Module, qp.export.LoweredModel],
) -> None:
    model, lowered = net
    report = lowered.report
    assert set(report.integers) == {"stem.0", "body.0", "body.2", "head"}
    assert report.integers["body.0"] == "convolution, hardswish, gives uint8"
    assert report.integers["head"] == "linear, gives float32"
    assert "sum, relu" in report.integers["body.2"]
    assert report.skipped == {}  # prepare has switched off the quantizers of the transposed convolution
    assert "4 of 4 layers run on integers" in str(report)
    up: Any = model.get_submodule("up")
    assert all(quantizer.disabled for quantizer in up.quantizers().values())


def test_other_inputs_than_those_it_was_lowered_for_are_refused(
    net: tuple[nn.Module, qp.export.LoweredModel],
) -> None:
    _, lowered = net
    with pytest.raises(InputError, match=r"lowered for inputs of torch\.float32, got torch\.float64"):
        lowered(X.double())
    with pytest.raises(
        InputError, match=r"of the shape \(2, 3, 12, 12\), got \(1, 3, 12, 12\): give dynamic"
    ):
        lowered(X[:1])
    with pytest.raises(InputError, match="nested as"):
        lowered(X, X)


def test_it_is_neither_trained_nor_copied_nor_pickled(net: tuple[nn.Module, qp.export.LoweredModel]) -> None:
    _, lowered = net
    assert not lowered.train().training
    assert not lowered(X).requires_grad
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"path='model\.pt2'"):
            attempt(lowered)


def test_what_looks_at_layers_is_sent_to_the_report(net: tuple[nn.Module, qp.export.LoweredModel]) -> None:
    _, lowered = net
    with pytest.raises(ArgumentTypeError, match=r"audit does not take a LoweredModel.*model\.report"):
        qp.audit(lowered, (X,))
    with pytest.raises(ArgumentTypeError, match=r"calibrate.*with the model that was lowered"):
        qp.calibrate(lowered, [X])


def test_integers_that_are_off_by_more_than_a_step_are_said() -> None:
    compared = qp.export.LoweringComparison(0.1, 0.4, 0.0, integers=4000, differing=170, furthest=71)
    text = qp.export.LoweringReport({}, {}, "AVX512", compared).why_wrong()
    assert "170 of 4000 integers of kernels differ from the model's, by up to 71" in text
    assert "num_bits=7" in text


def test_the_batch_may_be_dynamic() -> None:
    model = built(mlp, ROWS)
    lowered = lower(model, ROWS, dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert set(lowered.report.integers) == {"0", "2"}
    for count in (16, 3, 40):
        x = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            assert (lowered(x) - model(x)).abs().max() < model(x).abs().max() / 127
    with pytest.raises(InputError, match=r"\(any, 32\), got \(3, 31\)"):
        lowered(torch.randn(3, 31))


def test_each_weight_of_a_layer_of_several_is_named() -> None:
    class Kernel:
        weight = "b.out_proj_weight_quantizer"

        def __str__(self) -> str:
            return "linear"

    with qp.quantize_modules():
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.MultiheadAttention(8, 2)})
    recorder: Any = SimpleNamespace(kernels=[Kernel()])
    integers, skipped = layers_on_integers(operands(model), recorder, {"a.weight_quantizer": "why"})
    assert integers == {"b.out_proj_weight": "linear"}
    assert set(skipped) == {"a", "b.in_proj_weight"}
    assert skipped["a"] == "why"


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0, other: Tensor | None = None) -> dict[str, Tensor]:
        y = self.linear(x) * scale
        return {"y": y, "sum": y if other is None else y + other}


def test_arguments_and_results_may_be_named_and_nested() -> None:
    model = built(Named, ROWS, prepare=False)
    keywords: dict[str, Any] = {"scale": 2.0, "other": torch.ones(16, 8)}
    lowered = lower(model, ROWS, kwargs=keywords)
    with torch.no_grad():
        expected = model(ROWS, **keywords)
    result = lowered(ROWS, **keywords)
    assert set(result) == {"y", "sum"}
    assert all(torch.allclose(result[key], expected[key], atol=1e-5) for key in result)
    swapped = lowered(ROWS, **dict(reversed(keywords.items())))
    assert torch.equal(swapped["sum"], result["sum"])
    with pytest.raises(InputError, match=r"lowered for the value 2\.0 of an argument.*got 3\.0"):
        lowered(ROWS, scale=3.0, other=keywords["other"])


def test_two_may_be_lowered_at_once_and_the_model_is_unchanged() -> None:
    model = built(mlp, ROWS).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(lower(model, ROWS, check=False)(ROWS)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert torch.equal(*results)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_package_runs_where_quantpatch_is_not(tmp_path: Path) -> None:
    model = built(lambda: nn.Linear(32, 8), ROWS)
    lowered = lower(model, ROWS, path=tmp_path / "m.pt2", check=False)
    assert set(lowered.report.integers) == {"weight"}
    assert lowered.report.path == tmp_path / "m.pt2"
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    torch.save((ROWS, lowered(ROWS)), tmp_path / "xy.pt")
    code = f"""
import sys, torch
sys.modules["quantpatch"] = None
x, y = torch.load({str(tmp_path / "xy.pt")!r}, weights_only=True)
assert torch.equal(torch._inductor.aoti_load_package({str(tmp_path / "m.pt2")!r})(x), y)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_latency_is_measured_beside_float_and_bfloat16_and_slower_is_said() -> None:
    model = built(lambda: nn.Linear(32, 8), ROWS)
    lowered = lower(model, ROWS, latency=True)
    latency = lowered.report.latency
    assert latency is not None
    assert latency.ms > 0
    assert latency.float_ms > 0
    assert latency.bfloat16_ms is not None
    slow = qp.export.CompiledLatency(3.0, 2.0)
    assert slow.is_slower
    report = qp.export.LoweringReport({}, {"0": "why"}, "VNNI", latency=slow)
    assert "1.50 times as long as in float" in report.advice()
    assert "on float kernels: 0" in report.advice()


# --- what the compiler must not get ---------------------------------------------------------------------


def rewritten(model: nn.Module, x: Tensor) -> Any:
    program = captured(model, (x,), {}, checked_operands(model, (x,), {}), as_uint8=True).run_decompositions(
        {}
    )
    module = program.module()
    before_compiling(module, {})  # type: ignore[arg-type]
    with torch.no_grad():
        assert (module(x) - model(x)).abs().max() < 2e-2 * model(x).abs().max()
    return module


def targets(module: Any) -> list[str]:
    return [str(node.target) for node in module.graph.nodes]


def test_weights_without_a_kernel_are_constants_of_floats() -> None:
    """Of a transposed convolution the compiler would make one that is not."""
    model = built(lambda: nn.ConvTranspose2d(3, 3, 3), X, prepare=False)
    assert not any("dequantize_per_channel" in name for name in targets(rewritten(model, X)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


def test_parts_of_a_weight_are_weights_with_kernels_of_their_own() -> None:
    module = rewritten(built(Attention, ROWS, prepare=False), ROWS)
    linear = [node for node in module.graph.nodes if "linear" in str(node.target)]
    assert len(linear) == 4
    assert all("dequantize_per_channel" in str(node.args[1].target) for node in linear)


def test_integers_are_not_pooled_into_another_scale() -> None:
    """The compiler would take the integers as they are."""
    model: Any = built(
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)), X, prepare=False, include=["MaxPool2d"]
    )
    same = targets(rewritten(model, X))
    assert sum("quantize_per_tensor" in name for name in same) == 4
    model[1].input_quantizer.amax = 2 * model[1].input_quantizer.amax
    assert sum("quantize_per_tensor" in name for name in targets(rewritten(model, X))) == 3


class Joined(nn.Module):
    """Convolutions whose results are pooled, put together and flattened before they are quantized again."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.cat, self.conv = qp.layers.Cat(1), nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cat([torch.max_pool2d(self.left(x).relu(), 2), torch.max_pool2d(self.right(x), 2)])
        result: Tensor = self.head(self.conv(y).flatten(1))
        return result


def test_what_moves_values_stands_behind_the_quantizer_and_takes_integers() -> None:
    model = built(Joined, X)
    module = rewritten(model, X)
    names = {node: str(node.target) for node in module.graph.nodes}
    ends = {
        next(use for use in node.users).target if "relu" in names[next(iter(node.users))] else node.target
        for node in module.graph.nodes
        if names[node] == "aten.conv2d.default"
    }
    assert len(ends) == 2  # a convolution, or the ReLU behind it
    for node in module.graph.nodes:
        if node.target in ends and "relu" not in names[next(iter(node.users))]:
            assert [names[use] for use in node.users] == ["quantized_decomposed.quantize_per_tensor.default"]
    assert "aten.split_with_sizes.default" not in names.values()
    with torch.no_grad():
        assert torch.equal(module(X), model(X))


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.attention = nn.Linear(32, 32), qp.layers.ScaledDotProductAttention()
        self.product = qp.layers.MatMul()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        result: Tensor = self.product(self.attention(y, y, y), y.transpose(-1, -2))
        return result


def test_products_of_activations_are_left_float_and_named() -> None:
    x = ROWS[None]
    with qp.quantize_modules():
        model: Any = Products().eval()
    report = qp.prepare(model, x, runtime="inductor")
    assert set(report.skipped) == {"attention", "product"}
    assert "no integer kernel for products of activations; enable()" in report.skipped["product"]
    attention: Any = model.attention
    assert all(q.disabled for layer in (attention, model.product) for q in layer.quantizers().values())
    assert not model.linear.input_quantizer.disabled
    assert qp.prepare(model, x, runtime="inductor").skipped == {}


def test_products_that_are_rounded_all_the_same_are_named_by_the_report() -> None:
    model = built(Products, ROWS[None], prepare=False)
    reasons: dict[str, str] = {}
    program = captured(model, (ROWS[None],), {}, checked_operands(model, (ROWS[None],), {}), as_uint8=True)
    before_compiling(program.run_decompositions({}).module(), reasons)  # type: ignore[arg-type]
    assert "product.matmul" in reasons
    _, skipped = layers_on_integers(operands(model), SimpleNamespace(kernels=[]), reasons)  # type: ignore[arg-type]
    assert "computed with in float" in skipped["product.matmul"]


def test_few_bits_do_not_saturate_at_eight() -> None:
    recipe = qp.Recipe(name="few", input=qp.QuantDescriptor(num_bits=4))
    module = rewritten(built(mlp, ROWS, prepare=False, recipe=recipe), ROWS)
    assert not any("quantized_decomposed.quantize_per_tensor" in name for name in targets(module))


def test_what_is_quantized_twice_by_one_scale_is_quantized_once() -> None:
    model: Any = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), X, prepare=False)
    qp.layers.placed.quantize_output_of(model[0], model[1].input_quantizer)
    assert sum("decomposed.quantize_per_tensor" in name for name in targets(rewritten(model, X))) == 1


def test_what_is_not_fused_is_divided_as_in_the_model() -> None:
    model: Any = built(
        lambda: nn.Linear(32, 8), ROWS, recipe=qp.Recipe(name="7", input=qp.QuantDescriptor(num_bits=7))
    )
    quantizer = model.input_quantizer
    ties = (torch.arange(-64, 64) + 0.5) * (quantizer.amax / quantizer.qparams.max())
    x = torch.cat([ties, torch.randn(10**6 - 128)]).reshape(-1, 32)
    module = rewritten(model, x)
    node = next(n for n in module.graph.nodes if "convert_element_type" in str(n.target))
    module.graph.output((node,))
    module.graph.eliminate_dead_code()
    for other in [n for n in module.graph.nodes if n.op == "output"][:1]:
        module.graph.erase_node(other)
    codes = torch.fx.Interpreter(module).run(x)
    codes = codes[0] if isinstance(codes, tuple) else codes
    expected, _ = quantize(x, quantizer.amax, quantizer.format)
    assert torch.equal(codes.int() - 128, expected.int())


# --- what it needs --------------------------------------------------------------------------------------


def test_without_a_compiler_the_error_says_what_to_install() -> None:
    from torch._inductor import config

    model = built(mlp, ROWS)
    with (
        config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(ExportError, match="needs a C.. compiler.*apt-get install"),
    ):
        lower(model, ROWS)


def test_a_cache_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = built(mlp, ROWS)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ExportError, match=r"cannot write to .*file/cache.*TORCHINDUCTOR_CACHE_DIR"):
        lower(model, ROWS)


@pytest.fixture
def later_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch whose compiler has no patterns of integer kernels, as from 2.14 on."""
    from torch._inductor.fx_passes import quantization

    monkeypatch.delattr(quantization, "_register_quantization_weight_pack_pass", raising=False)


@pytest.mark.usefixtures("later_torch")
def test_with_a_later_torch_the_error_says_that_torchao_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(mlp, ROWS)
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        MissingExtraError, match=r"with PyTorch 2\.\d+.* needs torchao.*quantpatch\[lower\]"
    ) as info:
        lower(model, ROWS)
    assert (info.value.extra, info.value.package) == ("lower", "torchao")


@pytest.mark.usefixtures("later_torch")
def test_with_a_later_torch_the_patterns_of_torchao_are_registered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "patterns_elsewhere.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(needs, "_PATTERNS", "patterns_elsewhere")
    needs.demand_patterns()
    assert "patterns_elsewhere" in sys.modules
    monkeypatch.delitem(sys.modules, "patterns_elsewhere")


def test_a_processor_without_integer_instructions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_vnni_supported", "_is_avx512_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    with pytest.warns(QuantPatchWarning, match=r"no instructions for products of 8-bit integers.*num_bits=7"):
        instructions()


def test_a_model_elsewhere_or_not_calibrated_is_refused() -> None:
    with qp.quantize_modules():
        model = mlp()
    with pytest.raises(ExportError, match=r"range is not known; write qp\.calibrate"):
        lower(model, ROWS)
    with pytest.raises(ExportError, match=r"compiles for CPUs.*meta: write model\.cpu\(\)"):
        lower(mlp().to("meta"), ROWS)


def test_an_onnx_file_for_the_compiler_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match=r"inductor runs no ONNX files: write qp\.lower") as error:
        qp.export_onnx(built(mlp, ROWS), ROWS, tmp_path / "m.onnx", runtime="inductor", check=False)
    assert error.value.runtime == "inductor"


def test_preparing_for_it_names_what_stays_float() -> None:
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 2)).eval()
    report = qp.prepare(model, X, runtime="inductor")
    assert report.batchnorm.folded == {"1": "0"}
    assert "no integer kernel for transposed convolutions; enable() them" in report.skipped["2"]
    assert qp.prepare(model, X, runtime="inductor").placed == ()
