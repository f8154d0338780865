"""``explain`` says what a block does: held against real blocks."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from quantpatch import QuantizedLayer, explain, quantize_modules
from quantpatch.cli.main import app
from quantpatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    EntryConflictError,
    PluginError,
    UnknownNameError,
)
from quantpatch.plugins.plugin import BUILTIN

HERE = sys.modules[__name__]


class QuantMyLinear(QuantizedLayer, nn.Linear):
    inputs = ("input",)
    weights = {"weight": 0}


class Plain(nn.Linear):
    """A subclass that computes as its base does."""


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Own(nn.Module): ...


ENTRY = ("torch.nn", "Linear", QuantMyLinear)


def built(cls=nn.Linear, **settings):
    with quantize_modules(**settings):
        return type(cls(2, 2))


def verdicts(found):
    return {claim.plugin: (claim.verdict, claim.reason) for claim in found.claims}


@pytest.mark.parametrize("target", ["torch.nn.Linear", "Linear", nn.Linear, "torch.nn.modules.linear.Linear"])
def test_every_name_of_a_class_is_explained_alike(target):
    found = explain(target)
    assert (found.state, found.replacement) == ("replaced", "quantpatch.layers.linear.QuantLinear")
    assert found.because == f"by plugin {BUILTIN!r}"
    assert verdicts(found)[BUILTIN] == ("wins", "")
    assert found.ways == ("skip=['Linear'] leaves it float",)


def test_a_plugin_overrides_the_built_in_entry_and_custom_both(plugin):
    name = plugin(entries=[ENTRY])
    found = explain("Linear")
    assert found.replacement == f"{__name__}.QuantMyLinear"
    assert built() is QuantMyLinear
    assert verdicts(found)[BUILTIN] == ("loses", f"to plugin {name!r}: plugins come before built-ins")
    found = explain("Linear", custom=[(nn, "Linear", "quantpatch.layers.linear:QuantLinear")])
    assert [claim.verdict for claim in found.claims] == ["wins", "loses", "loses"]
    assert verdicts(found)[name] == ("loses", "to custom: custom comes before plugins")
    assert (found.claims[0].plugin, found.because, found.ways) == (None, "by custom", ())


def test_a_conflict_names_the_rivals_and_three_ways_out_which_work(plugin, monkeypatch):
    first, second = plugin(entries=[ENTRY]), plugin(entries=[ENTRY])
    plugin("elsewhere-1", entries=[("torch.nn", "Conv2d", QuantMyLinear)])
    plugin("elsewhere-2", entries=[("torch.nn.modules.conv", "Conv2d", QuantMyLinear)])
    found = explain("Linear")
    assert (found.state, found.replacement) == ("conflict", None)
    assert found.because.startswith(f"{first!r} and {second!r} both replace it")
    assert [verdicts(found)[name][0] for name in (first, second)] == ["in conflict"] * 2
    assert verdicts(found)[BUILTIN] == ("loses", "plugins come before built-ins")
    assert found.ways == (
        "skip=['torch.nn.Linear'] leaves it float",
        "custom=[(module, name, replacement)] decides for it",
        f"QUANTPATCH_BLOCK={second} switches one plugin off",
    )
    with pytest.raises(EntryConflictError):
        built(skip=["Conv2d"])
    assert explain("Linear", skip=["torch.nn.Linear"]).state == "float"
    assert explain("Linear", custom=[ENTRY]).state == "replaced"
    monkeypatch.setenv("QUANTPATCH_BLOCK", second)
    found = explain("Linear")  # the conflict about another target is no concern here
    assert found.because == f"by plugin {first!r}"
    assert verdicts(found)[second] == ("blocked", "QUANTPATCH_BLOCK names it")
    assert built(skip=["Conv2d"]) is QuantMyLinear


def test_what_is_left_float_and_how_to_have_it_replaced():
    found = explain("Embedding")
    assert found.because == "not replaced by default; write include=['Embedding']"
    assert (found.state, verdicts(found)[BUILTIN][0]) == ("float", "left float")
    assert explain("Embedding", include=["Embedding"]).state == "replaced"
    assert explain("Linear", skip=["Lin*"]).because == "skip='Lin*'"
    assert built(skip=["Lin*"]) is nn.Linear


def test_plugins_that_a_block_does_not_name_are_out(plugin):
    name = plugin(entries=[ENTRY])
    found = explain("Linear", plugins=[])
    assert found.because == f"by plugin {BUILTIN!r}"
    assert verdicts(found)[name] == ("blocked", "plugins=[...] does not name it")


def test_an_entry_waits_for_its_module_and_is_not_imported_for_this(package):
    name = package(layers="from torch import nn\nclass Thing(nn.Linear): ...\n")
    custom = [(f"{name}.layers", "Thing", QuantMyLinear)]
    found = explain(f"{name}.layers.Thing", custom=custom)
    assert (found.state, found.replacement) == ("waiting", None)
    assert found.because.startswith(f"{name}.layers is not imported; a block takes the entry up once it is")
    assert f"{name}.layers" not in sys.modules


@pytest.mark.parametrize("order", [("", ".layers"), (".layers", "")])
def test_a_class_is_explained_alike_by_the_name_that_is_exported_and_by_its_own(package, order):
    name = package(
        __init__="from .layers import Thing", layers="from torch import nn\nclass Thing(nn.Linear): ...\n"
    )
    custom = [(name, "Thing", f"{__name__}:QuantMyLinear")]
    assert [explain(f"{name}{module}.Thing", custom=custom).state for module in order] == ["waiting"] * 2
    __import__(name)
    assert [explain(f"{name}{module}.Thing", custom=custom).state for module in order] == ["replaced"] * 2


@pytest.mark.parametrize("subclasses", [None, True])
@pytest.mark.parametrize("cls", [Plain, Doubled])
def test_subclasses_are_explained_as_a_block_treats_them(cls, subclasses):
    found = explain(f"{__name__}.{cls.__name__}", subclasses=subclasses)
    with quantize_modules(subclasses=subclasses) as scope:
        layer = cls(2, 2)
    if isinstance(layer, QuantizedLayer):
        assert (cls, subclasses, found.state) == (Plain, True, "replaced")
    else:
        assert (found.state, found.because) == ("float", scope.skipped[0].reason)
        assert found.ways == ("custom=[(module, name, replacement)] gives an entry for it",)
    assert verdicts(found)[BUILTIN] == ("-", "is for torch.nn.Linear")


@pytest.mark.parametrize(
    ("target", "because"),
    [
        (Own, "there is no entry for it"),
        (dict, "there is no entry for it, and it is not a class of layers"),
        ("torch.nn.functional.linear", "there is no entry for it, and it is not a class of layers"),
        ("quantpatch.layers.linear.QuantLinear", "it is quantized itself: it replaces torch.nn.Linear"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear, "it is a part of another layer"),
        (type("Sub", (nn.Embedding,), {}), "a subclass of torch.nn.Embedding, which stays float: not"),
    ],
)
def test_what_has_no_entry_says_so(target, because):
    found = explain(target)
    assert found.state == "float"
    assert found.because.startswith(because)


def test_names_that_mean_nothing_or_too_much(plugin):
    with pytest.raises(ArgumentTypeError, match="takes a class, a function or its dotted name, not 3"):
        explain(3)
    with pytest.raises(UnknownNameError, match=r"unknown layer 'torch.nn.Linaer'. Did you mean 'torch.nn.L"):
        explain("torch.nn.Linaer")
    with pytest.raises(UnknownNameError, match="unknown layer 'no_such_package.Layer'"):
        explain("no_such_package.Layer")
    with pytest.raises(UnknownNameError, match="unknown plugin 'nobody'"):
        explain("Linear", plugins=["nobody"])
    with pytest.raises(UnknownNameError, match="in skip 'Linaer'"):
        explain("Conv2d", skip=["Linaer"])
    plugin(entries=[("far.away", "Linear", "far:QuantLinear")])
    with pytest.raises(
        ArgumentError, match="'Linear' means several targets: far.away.Linear, torch.nn.Linear"
    ):
        explain("Linear")


def test_a_module_that_fails_to_import_is_named(package):
    name = package(layers="import no_such_module_at_all")
    with pytest.raises(
        ArgumentError, match=f"{name}.layers.Thing cannot be imported: No module named 'no_such"
    ):
        explain(f"{name}.layers.Thing")


def test_a_plugin_that_fails_keeps_every_block_from_opening(install, take_part):
    install("broken", "raise OSError('no disk')", "broken-dist", "0.3")
    take_part("broken")
    with pytest.raises(PluginError):
        built()
    found = explain("Linear")
    assert (found.state, found.ways) == ("error", ("QUANTPATCH_BLOCK=broken switches it off",))
    assert found.because == "no block opens as long as plugin 'broken' fails"
    assert found.claims[0].distribution == "broken-dist 0.3"
    assert "no disk" in found.claims[0].reason


def test_a_replacement_that_cannot_be_used_is_an_error_here_too(plugin):
    name = plugin(entries=[("torch.nn", "Linear", "no_such_module:Thing")])
    found = explain("Linear")
    assert found.state == "error"
    assert f"plugin {name!r}: entry torch.nn.Linear" in found.because
    assert found.ways == ("skip=['torch.nn.Linear'] leaves it float",)


def test_functions_are_explained_as_well(monkeypatch):
    module = ModuleType("with_function")
    module.act = lambda x: x
    monkeypatch.setitem(sys.modules, "with_function", module)
    found = explain("with_function.act", custom=[("with_function", "act", torch.relu)])
    assert (found.state, found.because) == ("replaced", "by custom")


def test_it_prints_a_table_and_json_on_the_command_line(plugin):
    plugin("mine", entries=[ENTRY])

    def run(*arguments):
        result = CliRunner().invoke(app, ["explain", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    printed = run("torch.nn.Linear")
    assert f"torch.nn.Linear: replaced by {__name__}.QuantMyLinear" in printed
    assert "plugins come before built-ins" in printed
    assert json.loads(run("Linear", "--json")) == json.loads(explain("Linear").to_json())
    assert json.loads(run("Linear", "--skip", "Linear", "--json"))["state"] == "float"
