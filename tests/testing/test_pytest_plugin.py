"""The pytest plugin in runs of its own: what it collects, what it costs, what its fixture catches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = """
import torch
from torch import nn

import quantpatch


class Transposed(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))

    def forward(self, x):
        return x @ self.weight


class QuantTransposed(quantpatch.QuantizedLayer, Transposed):
    inputs = ("x",)
    weights = {"weight": 1}
"""
PLUGIN = """
import quantpatch


@quantpatch.hookimpl
def quantpatch_entries():
    return [("mylib_layers", "Transposed", "mylib_layers:QuantTransposed")]
"""
EXAMPLES = """

@quantpatch.hookimpl
def quantpatch_examples():
    import torch
    from mylib_layers import Transposed

    return [
        quantpatch.Example(
            "mylib_layers.Transposed", lambda: Transposed(6, 4), lambda: (torch.randn(3, 6),)
        )
    ]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to run pytest in, with a distribution ``mylib`` that is a plugin; ``project(*options)``."""
    site = tmp_path / "site"
    info = site / "mylib-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylib\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quantpatch]\nmylib = mylib_plugin\n")
    (site / "mylib_layers.py").write_text(LAYERS)
    (site / "mylib_plugin.py").write_text(PLUGIN + EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.delenv("CI", raising=False)  # there pytest says everything twice
    folder = tmp_path / "project"
    folder.mkdir()

    # Hypothesis takes a second to import.
    settings = ("-p", "pytest_quantpatch", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")

    def run(*options, **files):
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return subprocess.run(
            [sys.executable, "-m", "pytest", *settings, *options],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    run.site = site
    return run


CONFORMANCE = ("--quantpatch-conformance", "--quantpatch-plugin", "mylib")
CHEAP = ("-k", "mylib and (signature or copied) or test_ordinary")
ORDINARY = {"test_ordinary": "def test_ordinary():\n    assert False\n"}


def test_a_run_that_asks_for_nothing_imports_neither_torch_nor_quantpatch(project):
    test = "import sys\n\ndef test_nothing():\n    assert not {'torch', 'quantpatch'} & set(sys.modules)\n"
    done = project(test_nothing=test)
    assert done.returncode == 0, done.stdout


def test_every_check_of_an_installed_plugin_is_a_test_and_nothing_else_is_run(project):
    done = project(*CONFORMANCE, *CHEAP, "-v", **ORDINARY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mylib::mylib_layers.Transposed::signature PASSED" in done.stdout
    assert "2 passed" in done.stdout
    assert "test_ordinary" not in done.stdout


def test_with_a_path_both_are_run_and_xdist_spreads_them(project):
    done = project(*CONFORMANCE, *CHEAP, "test_ordinary.py", "-n", "2", **ORDINARY)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout


def test_an_entry_without_an_example_and_a_broken_layer_fail_in_the_words_of_the_kit(project):
    (project.site / "mylib_plugin.py").write_text(PLUGIN)
    done = project(*CONFORMANCE)
    assert done.returncode == 1
    assert "mylib_layers.Transposed -> mylib_layers:QuantTransposed has no example" in done.stdout
    assert "Traceback" not in done.stdout
    (project.site / "mylib_plugin.py").write_text(PLUGIN + EXAMPLES)
    wrong = LAYERS + "\n    def forward(self, x):\n        return super().forward(x) + 1\n"
    (project.site / "mylib_layers.py").write_text(wrong)
    done = project(*CONFORMANCE, "-k", "disabled or copied")
    assert "1 failed, 1 passed" in done.stdout
    assert "seen:   disabled, its output in training mode is not the float layer's" in done.stdout
    assert "change: Compute with the float class's own forward" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantpatch-conformance", "--quantpatch-plugin", "mylob"), "Did you mean 'mylib'"),
        (("--quantpatch-plugin", "mylib"), "give both"),
    ],
)
def test_a_wrong_option_is_an_error_of_usage(project, options, message):
    done = project(*options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


UNTIDY = """
import pytest
import torch
from torch import nn

import quantpatch

pytestmark = pytest.mark.usefixtures("torch_untouched")
scope = quantpatch.quantize_modules()


def test_entered():
    scope.__enter__()


def test_after_it():
    assert type(nn.Linear(1, 1)) is nn.Linear


def test_started():
    scope.start()


def test_patched():
    nn.Linear.shiny = 1


def test_tidy():
    with scope:
        assert type(nn.Linear(1, 1)) is not nn.Linear
    torch.compile(nn.Linear(1, 1), backend="aot_eager")(torch.zeros(1))
"""


def test_the_fixture_fails_tests_that_leave_a_block_open_or_torch_changed(project):
    done = project("-p", "no:randomly", "-rA", test_untidy=UNTIDY)
    report = done.stdout
    assert "5 passed" in report
    assert "3 errors" in report, report + done.stderr
    for name in ("entered", "started", "patched"):
        assert f"ERROR test_untidy.py::test_{name}" in report
    assert report.count("a block was left open: quantize_modules(") == 2
    assert "torch.nn.modules.linear.Linear.shiny: nothing became 1" in report


CARELESS = """
import pytest
from torch import nn

import quantpatch

scope = quantpatch.quantize_modules()


@pytest.fixture(scope="module")
def block():
    with quantpatch.quantize_modules():
        yield


def test_careless():
    scope.start()


@pytest.mark.usefixtures("torch_untouched")
def test_innocent():
    assert type(nn.Linear(1, 1)) is nn.Linear


@pytest.mark.usefixtures("block", "torch_untouched")
@pytest.mark.parametrize("number", [1, 2])
def test_in_the_block_of_a_fixture(number):
    assert type(nn.Linear(1, 1)) is not nn.Linear
"""


def test_a_block_left_open_is_laid_to_the_test_that_opened_it(project):
    report = project("-p", "no:randomly", "-rA", test_careless=CARELESS).stdout
    assert "4 passed" in report, report
    assert "error" not in report, report
    assert "test_careless.py::test_careless left a block open: quantize_modules()" in report


def test_the_plugin_is_named_in_the_distribution_as_the_module_is():
    # Under another name `-p pytest_quantpatch` and the entry point would register it twice.
    project_file = Path(__file__).parents[2] / "pyproject.toml"
    assert '\npytest_quantpatch = "pytest_quantpatch"\n' in project_file.read_text()
