"""Runtimes as values: what they say of themselves decides in ``prepare`` and ``export_onnx``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, ExportError, PluginError, UnknownNameError
from quantpatch.export.prepare.placement_rules import RULES
from quantpatch.plugins import Kernels, OpenedFile, WrittenFile
from quantpatch.plugins.runtime import PLACEMENT

X = torch.randn(4, 3, 8, 8)


def calibrated(runtime: str) -> tuple[nn.Module, qp.export.Preparation]:
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
        ).eval()
    report = qp.prepare(model, X, runtime=runtime)
    qp.calibrate(model, [X], progress=False)
    return model, report


def test_its_rules_are_those_that_prepare_has() -> None:
    assert set(RULES) == set(PLACEMENT)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_those_that_come_along_are_found_by_name(name: str) -> None:
    assert qp.registry.runtime(name).name == name


def test_a_name_that_is_nearly_one_is_an_error_that_says_so() -> None:
    with pytest.raises(UnknownNameError, match="unknown runtime 'onxruntime'.*'onnxruntime'"):
        qp.registry.runtime("onxruntime")
    with pytest.raises(UnknownNameError, match="runtime"):
        qp.registry.runtime(["tensorrt"])  # type: ignore[arg-type]


def test_a_plugins_runtime_decides_what_is_folded_placed_and_unsigned(plugin: Callable[..., str]) -> None:
    plugin(runtimes={"plain": qp.Runtime(fold_batchnorm=False, placement=(), unsigned=False)})
    _, report = calibrated("plain")
    assert (report.batchnorm.folded, report.placed, report.unsigned) == ({}, (), ())
    assert report.runtime == "plain"
    plugin(runtimes={"thorough": qp.Runtime(placement="convolutions")})
    _, report = calibrated("thorough")
    assert report.batchnorm.folded == {"1": "0"}
    assert report.placed == ("3.output_quantizer",)
    assert report.unsigned == ("3.input_quantizer",)


def test_a_plugins_runtime_refuses_and_rewrites(plugin: Callable[..., str], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    seen = []
    like = qp.Runtime(passes=lambda model: seen.append({node.op_type for node in model.graph}))
    refuses = attrs.evolve(like, refuses=lambda operand: "the sun shines" if operand.weight is None else None)
    plugin(runtimes={"npu": like, "moody": refuses, "signed": attrs.evolve(like, unsigned=False)})
    model, _ = calibrated("onnxruntime")
    report = qp.export_onnx(model, X, tmp_path / "m.onnx", runtime="npu")
    assert report.runtime == "npu"
    assert report.comparison is not None
    assert (report.comparison.mismatching, report.comparison.within_step) == (0, None)
    assert len(seen) == 1
    assert {"Conv", "QuantizeLinear"} <= seen[0]
    with pytest.raises(ExportError, match=r"for moody:\n.*: the sun shines") as error:
        qp.export_onnx(model, X, tmp_path / "n.onnx", runtime="moody")
    assert error.value.runtime == "moody"
    with pytest.raises(ExportError, match="uint8 is unsigned, and signed has signed integers only"):
        qp.export_onnx(model, X, tmp_path / "n.onnx", runtime="signed")
    assert not (tmp_path / "n.onnx").exists()


def test_a_plugins_runtime_opens_the_file_and_says_what_it_made_of_it(
    plugin: Callable[..., str], tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from quantpatch.export.onnx.sessions import open_file

    def kernels(file: WrittenFile) -> Kernels:
        assert file.path.exists()
        assert [x.shape for feed in file.feeds for x in feed.values()] == [tuple(X.shape)] * 2
        return Kernels(on_integers={operand.name: "npu" for operand in file.found if operand.weight is None})

    def broken(path: Path, threads: int | None) -> OpenedFile:
        raise OSError("no power")

    npu = qp.Runtime(signed_as_uint8=True, opens=open_file, kernels=kernels)
    plugin(runtimes={"npu": npu, "off": attrs.evolve(npu, opens=broken)})
    model, _ = calibrated("onnxruntime")
    compared = qp.export_onnx(model, X, tmp_path / "m.onnx", runtime="npu").comparison
    assert compared is not None
    assert compared.within_step is not None
    assert compared.latency is not None
    assert compared.on_integers["0.input_quantizer"] == "npu"
    with pytest.raises(ExportError, match="off cannot run the exported file: OSError: no power"):
        qp.export_onnx(model, X, tmp_path / "n.onnx", runtime="off")
    assert not (tmp_path / "n.onnx").exists()


def test_a_function_that_cannot_be_imported_is_named() -> None:
    runtime = qp.Runtime(refuses="quantpatch.nowhere:function")
    with pytest.raises(PluginError, match=r"refuses='quantpatch\.nowhere:function' of a runtime cannot"):
        runtime.call("refuses", None)
    assert qp.Runtime().call("passes", None) is None


@pytest.mark.parametrize("given", [3, "no_colon", ":function", "module:"])
def test_what_is_not_a_function_is_an_error(given: object) -> None:
    with pytest.raises(ArgumentTypeError, match="passes of a runtime is .*'package.module:function'"):
        qp.Runtime(passes=given)  # type: ignore[arg-type]


def test_an_unknown_rule_is_an_error_and_a_plugins_is_named(plugin: Callable[..., str]) -> None:
    with pytest.raises(UnknownNameError, match="unknown placement rule 'skip'.*'skips'"):
        qp.Runtime(placement=("joins", "skip"))
    name = plugin(runtimes=lambda: {"npu": qp.Runtime(placement="skip")})
    with pytest.raises(PluginError, match=f"{name}' failed in its hook quantpatch_runtimes"):
        qp.prepare(nn.Linear(1, 1), torch.ones(1), runtime="onnxruntime")


def test_anything_else_than_a_runtime_is_the_plugins_error(plugin: Callable[..., str]) -> None:
    plugin(runtimes={"npu": "onnxruntime"})
    with pytest.raises(PluginError, match="expected a name and a Runtime"):
        qp.registry.runtime("tensorrt")
