"""One model in each runtime, side by side."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from quantpatch.cli.main import app
from quantpatch.errors import ArgumentError, ExportError, MissingExtraError, QuantPatchError, UnknownNameError
from quantpatch.export import BenchReport, bench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ExportError("found no C++ compiler: apt-get install g++")

    for name in ("benchmark", "program.lower"):
        monkeypatch.setattr(sys.modules[f"quantpatch.export.{name}"], "demand_compiler", none)


def test_each_way_to_run_a_model_is_timed_beside_the_compiled_float_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    where = sys.modules["quantpatch.export.benchmark"]
    # Compiling is what the tests of ``lower`` do.
    floats = [(build(), (X,), {}), (build().bfloat16(), (X.bfloat16(),), {})]
    monkeypatch.setattr(where, "compiled_floats", lambda model, args, kwargs: floats)
    monkeypatch.setattr(where, "demand_compiler", lambda: None)
    model = build()
    before = copy.deepcopy(model.state_dict())
    measured = bench(model, X, data=[X, X[:2]], runtimes=["onnxruntime"], threads=1)
    assert type(model[0]) is nn.Linear  # type: ignore[index]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = {row.name: row for row in measured.rows}
    assert list(rows) == ["float", "float, compiled", "bfloat16, compiled", "onnxruntime"]
    assert rows["float, compiled"].ratio == 1.0
    assert rows["float"].error == 0.0
    row = rows["onnxruntime"]
    assert row.ratio == row.ms / rows["float, compiled"].ms  # type: ignore[operator]
    assert row.error is not None
    assert 0 < row.error < 0.05
    assert (row.integers, row.floats) == (2, 0)
    assert measured.threads == 1
    assert [row["name"] for row in measured.to_dicts()] == list(rows)
    assert "2 of 2" in str(measured)


def test_the_number_of_threads_is_from_1_on_and_torchs_is_afterwards_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ArgumentError, match="threads is 0, expected a number from 1 on"):
        bench(build(), X, threads=0)
    without_compiler(monkeypatch)
    assert bench(build(), X, threads=before + 1, runtimes=()).threads == before + 1
    assert torch.get_num_threads() == before


def test_without_a_compiler_its_rows_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    report = bench(build(), X, runtimes="inductor")
    rows = {row.name: row for row in report.rows}
    assert rows["float"].ms is not None
    assert rows["float"].ratio is None
    for name in ("float, compiled", "inductor"):
        assert rows[name].ms is None
        assert "apt-get install g++" in rows[name].why
    assert "apt-get" in str(report)


def test_a_runtime_that_is_not_installed_is_a_row_and_an_error_if_it_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_compiler(monkeypatch)
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sessions", "openvino_file"):
        monkeypatch.delitem(sys.modules, f"quantpatch.export.onnx.{name}", raising=False)
    rows = {row.name: row for row in bench(build(), X).rows}
    assert "pip install 'quantpatch[onnx]'" in rows["onnxruntime"].why
    assert "pip install 'quantpatch[openvino]'" in rows["openvino"].why
    with pytest.raises(MissingExtraError):
        bench(build(), X, runtimes=["openvino"])
    with pytest.raises(UnknownNameError, match="unknown runtime to measure 'tensorrt'"):
        bench(build(), X, runtimes="tensorrt")


def test_the_command_measures_what_a_function_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measure(model: nn.Module, args: Any, **given: Any) -> BenchReport:
        seen.update(given, shape=tuple(args[0].shape))
        return BenchReport(type(model).__name__, given["recipe"], "VNNI", 1, ())

    monkeypatch.setattr("quantpatch.cli.benchmark.bench", measure)
    (tmp_path / "cli_bench.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 4)\n"
        "def data():\n    return [torch.ones(2, 4)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = (
        "bench",
        "cli_bench:build",
        "--input",
        "2,4",
        "--data",
        "cli_bench:data",
        "--runtime",
        "inductor",
    )
    result = CliRunner().invoke(app, [*given, "--threads", "2", "--recipe", "w4a8", "--json"])
    sys.modules.pop("cli_bench", None)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["recipe"] == "w4a8"
    assert (seen["runtimes"], seen["threads"], seen["shape"]) == (["inductor"], 2, (2, 4))
    assert len(seen["data"]) == 1


def test_a_model_on_another_device_is_an_error_that_names_the_function() -> None:
    with pytest.raises(QuantPatchError, match="bench measures on CPUs, and the model"):
        bench(build().to("meta"), X)
