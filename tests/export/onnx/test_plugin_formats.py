"""ONNX files of number formats that a plugin brings: written if ONNX's operators round so, else refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PLUGIN = """
import attrs
import quantpatch
from quantpatch.numerics.formats import NumberFormat, OnnxCodes


@attrs.frozen
class Fifty(NumberFormat):
    "Integers from -50 to 50."
    name = "fifty"
    bits = 7
    max = 50.0
    onnx = OnnxCodes("INT8")

    def round_(self, y):
        return y.round_().clamp_(-50, 50)


@attrs.frozen
class Ternary(NumberFormat):
    "-1, 0 and 1, with thresholds of its own."
    name = "ternary"
    bits = 2
    max = 1.0
    onnx = OnnxCodes("INT4", rounds=False)

    def round_(self, y):
        return y.copy_(y.sign() * (y.abs() > 0.3))


@attrs.frozen
class Thirds(NumberFormat):
    name = "thirds"
    bits = 8
    max = 10.0

    def round_(self, y):
        return y.mul_(3).round_().div_(3).clamp_(-10, 10)


@quantpatch.hookimpl
def quantpatch_formats():
    return {"fifty": Fifty(), "ternary": Ternary(), "thirds": Thirds()}
"""

SCRIPT = """
import json, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import onnx, torch
from torch import nn

import quantpatch as qp

D = qp.QuantDescriptor
results = {}
for runtime in ("onnxruntime", "tensorrt"):
    for input, weight in (("fifty", "ternary"), ("ternary", "thirds")):
        recipe = qp.Recipe(name="r", input=D(format=input), weight=D(format=weight, axis="channel"))
        with qp.quantize_modules(recipe=recipe):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
        x = torch.randn(9, 8)
        qp.calibrate(model, [x], progress=False)
        folder = Path(sys.argv[1]) / f"{runtime}.{input}"
        folder.mkdir()
        try:
            compared = qp.export_onnx(model, x, folder / "m.onnx", runtime=runtime).comparison
        except qp.QuantPatchError as error:
            found = {"error": str(error), "quantizers": error.quantizers}
        else:
            proto = onnx.load(str(folder / "m.onnx"))
            found = {
                "compared": [compared.integers, compared.differing, compared.mismatching],
                "relative": compared.relative_difference,
                "types": [t.data_type for t in proto.graph.initializer if min([*t.dims, 0][:2]) > 1],
                "metadata": {prop.key: prop.value for prop in proto.metadata_props},
            }
        results[folder.name] = {**found, "files": [file.name for file in folder.iterdir()]}
print(json.dumps(results))
"""


def test_an_installed_plugins_formats(install: Callable[..., str], tmp_path: Path) -> None:
    install("number-formats", PLUGIN, "own-formats", "2.0")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    for runtime, stored in (("onnxruntime", 3), ("tensorrt", 1)):  # INT8 (packing so few is no gain), FLOAT
        written = found[f"{runtime}.fifty"]
        assert written["compared"] == [2 * 9 * (8 + 6), 0, 0]
        assert written["relative"] < 1e-5
        assert set(written["types"]) == {stored}
        recipe = json.loads(written["metadata"]["quantpatch.recipe"])
        assert recipe["0.input_quantizer"]["format"] == "fifty"
        assert "own-formats" in written["metadata"]["quantpatch.plugins"]

        refused = found[f"{runtime}.ternary"]
        assert refused["files"] == []
        assert len(refused["quantizers"]) == 4
        assert "format ternary, of the plugin 'number-formats': it does not round as" in refused["error"]
        assert (
            "format thirds, of the plugin 'number-formats': it does not name an ONNX type" in refused["error"]
        )
        assert "Use int8 or FP8" in refused["error"]
