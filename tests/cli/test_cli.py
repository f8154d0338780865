"""The command line: thin, and never a traceback for what a user can mend."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import quantpatch
from quantpatch import hookimpl
from quantpatch.cli.lists import Layers
from quantpatch.cli.main import app, main
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose
from quantpatch.reports.render import as_text


def run(*arguments):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def model_module(tmp_path, monkeypatch):
    (tmp_path / "cli_model.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(4, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "cli_model:build"
    sys.modules.pop("cli_model", None)


def test_the_version_is_the_packages():
    assert run("--version").strip() == f"quantpatch {quantpatch.__version__}"


def test_plugins_lists_the_built_in_one_with_its_distribution_and_hooks():
    (row,) = [row for row in json.loads(run("plugins", "--json")) if row["name"] == BUILTIN]
    assert row["distribution"] == "quantpatch"
    assert row["version"] == quantpatch.__version__
    assert row["state"] == "active"
    assert "quantpatch_entries" in row["hooks"]
    assert any("torch.nn.Linear" in entry for entry in row["entries"])


def test_plugins_shows_a_blocked_plugin_and_why(monkeypatch):
    monkeypatch.setenv("QUANTPATCH_BLOCK", BUILTIN)
    assert "blocked: QUANTPATCH_BLOCK names it" in " ".join(run("plugins").split())


def test_plugins_shows_a_failed_plugin_and_why():
    class Broken:
        @hookimpl
        def quantpatch_entries(self):
            raise KeyError("boom")

    registry.register(Broken(), "cli_broken")
    try:
        (row,) = [row for row in json.loads(run("plugins", "--json")) if row["name"] == "cli_broken"]
    finally:
        registry.unregister("cli_broken")
    assert row["state"] == "failed"
    assert "boom" in row["reason"]


def test_what_plugins_say_does_not_reach_the_terminal_as_commands(plugin):
    name = plugin(name="shy\x1b[2J", entries=[("far.away", "Layer", "far.quant:Layer\x1b[31m[red]")])
    for command in ("plugins", "layers"):
        shown = run(command)
        assert "\x1b" not in shown
        assert "shy" in shown
    assert name


def test_layers_says_what_is_replaced_by_what_and_what_is_not():
    rows = {row["target"]: row for row in json.loads(run("layers", "--json"))}
    assert rows["torch.nn.Linear"] == {
        "target": "torch.nn.Linear",
        "replacement": "quantpatch.layers.linear:QuantLinear",
        "plugin": BUILTIN,
        "state": "replaced",
    }
    assert "include=['Embedding']" in rows["torch.nn.Embedding"]["state"]
    assert "torch.nn.Linear" in run("layers")


def test_layers_lists_targets_that_two_plugins_replace(plugin):
    for name in ("one", "two"):
        plugin(name, entries=[("far.away", "Layer", f"{name}.quant:QuantLayer")])
    rows = {row["target"]: row for row in json.loads(run("layers", "--json"))}
    assert rows["far.away.Layer"]["state"].startswith("'one' and 'two' both replace it")


def test_targets_in_one_row_have_one_include_to_paste():
    rows = Layers(list(compose(registry.entries([]), plugins=[]).values())).folded()
    assert "include=['MaxPool1d', 'MaxPool2d'" in " ".join(as_text(rows).split())


def test_recipes_lists_each_with_its_formats_and_plugin(plugin):
    mine = quantpatch.recipe("int4").replace(name="mine", output=quantpatch.QuantDescriptor(unsigned=True))
    plugin("mylib", recipes={"mine": mine})
    rows = {row["name"]: row for row in json.loads(run("recipes", "--json"))}
    assert rows["int4-weight-only"]["input"] is None
    assert rows["int4-weight-only"]["weight"]["format"] == "int4_g128"
    assert (rows["mine"]["plugin"], rows["mine"]["output"]["unsigned"]) == ("mylib", True)
    text = run("recipes")
    assert all(word in text for word in ("mine", "uint8", "int8_narrow", "per channel", "nvfp4", "mylib"))


def test_layers_takes_entries_and_what_is_float_by_default(model_module, tmp_path):
    (tmp_path / "cli_layers.py").write_text(
        "from quantpatch.layers import QuantizedLayer\nfrom torch import nn\n"
        "class QuantFold(QuantizedLayer, nn.Fold):\n    pass\n"
    )
    options = ("--custom", "torch.nn.Fold=cli_layers:QuantFold", "--include", "Embedding")
    rows = {row["target"]: row for row in json.loads(run("layers", *options, "--json"))}
    assert rows["torch.nn.Fold"]["replacement"] == "cli_layers:QuantFold"
    assert rows["torch.nn.Embedding"]["state"] == "replaced"
    result = CliRunner().invoke(app, ["layers", "--custom", "torch.nn.Fold"])
    assert result.exit_code == 2
    assert "mylib.layers:QuantLinear" in result.output


def test_audit_builds_in_a_block_and_reports(model_module):
    data = json.loads(run("audit", model_module, "--input", "2,4", "--json"))
    assert data["share"] == 1.0
    assert "100.0% of 32" in run("audit", model_module, "--input", "2,4")


SEVERAL = """
from torch import nn
class Mine(nn.Linear):
    pass
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.mine = Mine(4, 4)
    def forward(self, ids, x):
        return {"out": self.mine(self.table(ids) + x)}
"""


def test_audit_takes_several_inputs_and_indices_and_subclasses(model_module, tmp_path):
    (tmp_path / "cli_model.py").write_text(SEVERAL)
    arguments = ("audit", "cli_model:Net", "--input", "2,3:int", "--input", "2,3,4", "--json")
    without, with_ = json.loads(run(*arguments)), json.loads(run(*arguments, "--subclasses"))
    assert (without["share"], with_["share"]) == (0.0, 1.0)
    assert without["macs"] == with_["macs"] == 2 * 3 * 4 * 4
    assert "write subclasses=True" in without["rows"][0]["reason"]


def test_audit_leaves_float_what_is_skipped(model_module):
    assert (
        json.loads(run("audit", model_module, "--input", "2,4", "--skip", "Linear", "--json"))["share"] == 0.0
    )


def test_audit_below_the_minimum_prints_its_report_and_exits_with_1(model_module):
    mixes = "mix_stderr" in inspect.signature(CliRunner).parameters  # click before 8.2
    separate = CliRunner(**({"mix_stderr": False} if mixes else {}))
    arguments = ["audit", model_module, "--input", "2,4", "--skip", "Linear", "--minimum", "0.9"]
    result = separate.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "Sequential: 0.0% of 32 multiply-accumulates quantized" in result.stdout
    assert "Linear was left float" in result.stdout
    assert result.stderr.startswith("error: 0.0% of the multiply-accumulates of Sequential ran on quantized")
    as_json = separate.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert (as_json.exit_code, json.loads(as_json.stdout)["share"]) == (1, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "cli_model", "--input", "2,4"], "package.module:build"),
        (["audit", "cli_model:nothing", "--input", "2,4"], "cannot find 'cli_model:nothing'"),
        (["audit", "cli_model:build", "--input", "2x4"], "is not a shape"),
        (["audit", "cli_model:build", "--input", "2,4:half"], "1,128:int for indices"),
        (["audit", "cli_model:build", "--input", "2,-4"], "is not a shape"),
        (["audit", "cli_model:build", "--input", "2,5"], "the model failed on inputs of shape 2,5"),
        (["audit", "os:getcwd", "--input", "2,5"], "expected a model"),
        (["layers", "--skip", "Linaer"], "Did you mean 'Linear'"),
        (["layers", "--plugin", "nobody"], "unknown plugin 'nobody'"),
        (["run", "--zero-points", "cli_model.py"], "it is for calibration: add --calibrate N"),
        (["run", "--method", "mse", "cli_model.py"], "it is for calibration: add --calibrate N"),
        (["run", "--calibrate", "1", "--existing", "all", "x.py"], "'all' is not one of"),
        (["audit", "cli_model:build", "--input", "2,4", "--recipe", "int9"], "unknown recipe 'int9'"),
    ],
)
def test_an_error_of_the_library_is_one_message_and_exit_code_2(
    model_module, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["quantpatch", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_the_module_runs_as_a_program():
    arguments = [sys.executable, "-m", "quantpatch", "layers", "--json"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(result.stdout)


def test_search_finds_the_cheapest_recipes_and_prints_or_is_json(tmp_path, monkeypatch):
    (tmp_path / "cli_search.py").write_text(
        "import torch\n"
        "def build():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "def data():\n    return [torch.ones(2, 4)]\n"
        "def accuracy(model):\n    return 1.0 - 0.5 * ('4' in repr(model))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = ("search", "cli_search:build", "--evaluate", "cli_search:accuracy", "--data", "cli_search:data")
    assert "Frontier: cost against metric" in run(*given, "--candidate", "int8", "--candidate", "float")
    found = json.loads(run(*given, "--budget", "9", "--resume", "search.json", "--max-drop", "1", "--json"))
    assert found["evaluations"] <= 9
    assert (tmp_path / "search.json").is_file()
    sys.modules.pop("cli_search", None)


def test_report_writes_a_page(model_module, tmp_path):
    for package in ("jinja2", "itables", "vl_convert"):
        pytest.importorskip(package)
    assert run("report", model_module, "--input", "2,4", "-o", "page.html").strip() == "wrote page.html"
    assert "of the multiplications quantized" in (tmp_path / "page.html").read_text()


# What a command line cannot say: objects of Python's.
OBJECTS = {"kwargs", "results", "float_model", "groups"}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("explain", quantpatch.explain),
        ("audit", quantpatch.audit),
        ("audit", quantpatch.quantize_modules),
        ("report", quantpatch.report),
        ("report", quantpatch.quantize_modules),
        ("run", quantpatch.quantize_modules),
        ("search", quantpatch.search),
    ],
)
def test_a_command_has_every_option_of_the_function_that_it_calls(command, function):
    takes = {parameter.name for parameter in typer.main.get_command(app).commands[command].params}
    called = {"plugin": "plugins", "inputs": "args", "output": "path", "candidate": "candidates"}
    takes |= {called[name] for name in takes & called.keys()}
    options = inspect.signature(function).parameters.values()
    assert {p.name for p in options if p.kind is p.KEYWORD_ONLY} - OBJECTS <= takes


def test_audit_is_strict_if_asked(model_module, tmp_path, monkeypatch, capsys):
    (tmp_path / "cli_hidden.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return torch.sparse.mm(x.to_sparse(), x)\n"
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["quantpatch", "audit", "cli_hidden:Net", "--input", "4,4", "--operations", "products", "--strict"],
    )
    with pytest.raises(SystemExit):
        main()
    assert "strict=True: 1 layers may multiply where it cannot be seen" in capsys.readouterr().err
