"""Plugins: found, loaded, named, blocked."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import quantpatch as qp
from quantpatch import hookspecs
from quantpatch.errors import EntryError, PluginError, QuantPatchWarning, UnknownNameError
from quantpatch.plugins import BUILTIN, discover
from quantpatch.recipes import DEFAULT_RECIPE
from quantpatch.registry import Registry
from quantpatch.registry import registry as shared

GOOD = """
import quantpatch
@quantpatch.hookimpl
def quantpatch_entries():
    return [("far.away", "Layer", "far.quant:QuantLayer")]
"""


def test_an_installed_plugin_is_found_with_its_distribution(install) -> None:
    install("zeta", GOOD, "zeta-dist", "3.1")
    install("alpha", GOOD)
    registry = Registry()
    infos = registry.plugins()
    names = [info.name for info in infos]
    assert names == [BUILTIN, *sorted(names[1:])]
    (zeta,) = [info for info in infos if info.name == "zeta"]
    assert (zeta.distribution, zeta.version, zeta.state, zeta.reason) == ("zeta-dist", "3.1", "active", "")
    assert zeta.hooks == ("quantpatch_entries",)
    assert zeta.entries == (qp.Entry("far.away", "Layer", "far.quant:QuantLayer"),)
    assert [o.plugin for o in registry.offers(["zeta", "alpha"]) if o.plugin != BUILTIN] == ["alpha", "zeta"]
    assert "far" not in sys.modules


BROKEN = {
    "raises on import": ("raise OSError('no disk')", "cannot be imported: OSError: no disk"),
    "exits on import": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "raises in its hook": (
        GOOD.replace("return", "raise KeyError or"),
        "failed in its hook quantpatch_entries: KeyError",
    ),
    "exits in its hook": (
        GOOD.replace("return", "raise SystemExit or"),
        "failed in its hook quantpatch_entries: SystemExit",
    ),
    "raises half way": (
        GOOD.replace("return", "yield 1/0 or"),
        "failed in its hook quantpatch_entries: ZeroDivision",
    ),
    "returns nothing": (GOOD.replace("return", ""), "returned None from quantpatch_entries, expected a list"),
    "returns text": (
        GOOD.replace("return", "return 'x' or"),
        "returned 'x' from quantpatch_entries, expected a list",
    ),
    "returns other things": (
        GOOD.replace("return", "return [3] or"),
        "returned something else than entries.*3 is no entry",
    ),
    "returns one target twice": (
        GOOD.replace("return", "return 2 *"),
        "returned more than one entry for far.away.Layer",
    ),
    "misspells a hook": (
        GOOD.replace("_entries", "_entrys"),
        "does not fit the hooks: .*quantpatch_entrys.*there are .*quantpatch_entries",
    ),
    "needs a module that is missing": (
        "import far_away_module",
        "cannot be imported: ModuleNotFoundError: .*far_away_module'. Install what brings the module "
        "'far_away_module'",
    ),
    "changes a class's method": (
        f"import torch\ntorch.nn.Linear.forward = lambda self, x: x\n{GOOD}",
        "changes PyTorch when it is imported: torch.nn.modules.linear.Linear.forward: <function .* became "
        "<function <lambda>.*was taken back",
    ),
    "changes a name": (
        f"import torch\ntorch.nn.Linear = torch.nn.Identity\n{GOOD}",
        "changes PyTorch when it is imported: torch.nn.Linear: <class .*Linear'> became <class .*Identity'>",
    ),
    "changes torch behind a decorator": (
        "import functools, torch\n@functools.wraps(torch.relu)\ndef relu(x): ...\n"
        f"torch.relu, torch.shiny = relu, property(relu)\n{GOOD}",
        "changes PyTorch when it is imported: torch.relu.*, torch.shiny: nothing became",
    ),
    "changes torch and then fails": (
        "import torch\ntorch.nn.ReLU.forward = None\nraise OSError('no disk')",
        "cannot be imported: OSError: no disk",
    ),
    "is built for a future API": (
        f"quantpatch_api = (7, 9)\n{GOOD}",
        "is written for versions 7 to 9 of the plugin API, and this quantpatch .* has version 1. "
        "Update quantpatch: pip install --upgrade quantpatch",
    ),
    "is built for a quantpatch with more in it": (
        "from quantpatch import FutureThing",
        "cannot be imported: ImportError: .*FutureThing.*It is written for another quantpatch "
        "\\(broken-dist requires quantpatch>=7\\); this is .*, with version 1 of the plugin API",
    ),
    "states its API in another way": (
        f"quantpatch_api = '>=1'\n{GOOD}",
        "states quantpatch_api = '>=1'; expected .*: quantpatch_api = \\(1, 1\\)",
    ),
    "takes arguments": (GOOD.replace("entries()", "entries(torch)"), "does not fit the hooks: .*torch"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_with_its_distribution_and_can_be_blocked(
    case, install, monkeypatch
) -> None:
    source, message = BROKEN[case]
    requires = "Requires-Dist: quantpatch-other\nRequires-Dist: quantpatch>=7\n"
    module = install("broken", source, "broken-dist", "0.3", more=requires)
    registry = Registry()
    for _ in range(2):  # the same each time
        with pytest.raises(
            PluginError, match=rf"plugin 'broken' \(from broken-dist 0.3\) {message}"
        ) as caught:
            registry.offers(["broken"])
        assert "set QUANTPATCH_BLOCK=broken" in str(caught.value)
        assert (caught.value.plugin, caught.value.distribution) == ("broken", "broken-dist 0.3")
    (info,) = [info for info in registry.plugins() if info.name == "broken"]
    assert info.state == "failed"
    assert "broken-dist 0.3" in info.reason
    assert registry.offers([])  # those not asked for do not matter
    monkeypatch.setenv("QUANTPATCH_BLOCK", " broken ,")
    sys.modules.pop(module, None)
    registry = Registry()
    assert {offer.plugin for offer in registry.offers(["broken"])} == {BUILTIN}
    assert module not in sys.modules, "a blocked plugin is not imported"
    (info,) = [info for info in registry.plugins() if info.name == "broken"]
    assert (info.state, info.reason, info.entries) == ("blocked", "QUANTPATCH_BLOCK names it", ())


def test_the_environment_allows_and_blocks(install, monkeypatch) -> None:
    install("one", GOOD)
    install("two", GOOD.replace("Layer", "Other"))

    def active() -> set[str]:
        return {str(offer.plugin) for offer in Registry().offers()} & {"one", "two", BUILTIN}

    assert active() == {"one", "two", BUILTIN}
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "one, ")
    assert active() == {"one", BUILTIN}
    monkeypatch.setenv("QUANTPATCH_BLOCK", "one")
    assert active() == {BUILTIN}
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "")
    monkeypatch.delenv("QUANTPATCH_BLOCK")
    assert active() == {BUILTIN}
    monkeypatch.setenv("QUANTPATCH_BLOCK", BUILTIN)
    assert active() == set()


def test_two_distributions_with_one_plugin_name(install) -> None:
    install("same", GOOD, "first-dist")
    install("same", GOOD, "second-dist")
    with pytest.raises(
        PluginError, match=r"from first-dist 1.2\) has the same name as one from second-dist 1.2. Uninstall"
    ):
        Registry().offers(["same"])


def test_a_distribution_may_bring_two_plugins_but_not_under_one_name_or_from_one_module(install) -> None:
    install("one", GOOD, points="two = throwaway_second", dist="both")
    assert {"one", "two"} <= {info.name for info in Registry().plugins()}
    install("twice", GOOD, points="twice = MODULE:Other", dist="doubled")
    with pytest.raises(
        PluginError, match=r"'twice' \(from doubled 1.2\) is declared twice, as plugin_module"
    ):
        Registry().offers(["twice"])
    module = install("alpha", GOOD, points="omega = MODULE", dist="echo")
    registry = Registry()
    assert registry.offers(["alpha"])
    with pytest.raises(
        PluginError,
        match=rf"'omega' \(from echo 1.2\) is the same module as plugin 'alpha': two .* {module}. Remove one",
    ):
        registry.offers(["alpha", "omega"])
    assert registry.offers(["alpha"])


def test_what_torch_changes_by_itself_while_a_plugin_is_imported_is_not_the_plugins_doing(
    install, monkeypatch
) -> None:
    # As importing torch._dynamo does: a function of torch's own, which was not there before.
    source = "import torch\nexec('def manual_seed(seed): ...', vars(torch.random))\n"
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(torch.random, "manual_seed", torch.random.manual_seed)
    install("innocent", f"{source}torch.manual_seed = torch.random.manual_seed\n{GOOD}")
    assert "innocent" in {offer.plugin for offer in Registry().offers(["innocent"])}
    assert torch.manual_seed is torch.random.manual_seed


def test_blocks_that_other_threads_open_during_an_import_are_not_the_plugins_doing(install) -> None:
    shared.plugins()  # the registry of blocks, which would find the plugin and keep it for other tests
    source = "import quantpatch\nscope = quantpatch.quantize_modules(plugins=[]).start()\n"
    module = install("busy", source + GOOD)
    assert "busy" in {offer.plugin for offer in Registry().offers(["busy"])}
    sys.modules[module].scope.stop()


def test_a_plugin_written_for_an_older_api_is_to_be_updated(install, monkeypatch) -> None:
    install("old", f"quantpatch_api = (1, 2)\n{GOOD}", "old-dist")
    install("silent", GOOD.replace("Layer", "Other"), "silent-dist")
    for version in (1, 2):
        monkeypatch.setattr(hookspecs, "API_VERSION", version)
        monkeypatch.setattr("quantpatch.builtin.quantpatch_api", (version, version))
        assert "old" in {offer.plugin for offer in Registry().offers(["old"])}
    monkeypatch.setattr(hookspecs, "API_VERSION", 3)
    monkeypatch.setattr("quantpatch.builtin.quantpatch_api", (3, 3))
    with pytest.raises(
        PluginError,
        match="for versions 1 to 2 .* has version 3. Update old-dist: pip install --upgrade old-dist",
    ):
        Registry().offers(["old"])
    with pytest.raises(PluginError, match=r"'silent' .*for version 1 of the plugin API"):
        Registry().offers(["silent"])


def test_an_unknown_name_in_the_allowlist_is_an_error_and_in_the_blocklist_a_warning(
    install, monkeypatch
) -> None:
    install("mylib", GOOD)
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "mylob")
    with pytest.raises(
        UnknownNameError, match="unknown plugin in QUANTPATCH_PLUGINS 'mylob'. Did you mean 'mylib'"
    ):
        Registry().offers()
    with pytest.warns(QuantPatchWarning, match="QUANTPATCH_PLUGINS names 'mylob', .* Did you mean 'mylib'"):
        assert "mylib" in {info.name for info in Registry().plugins()}  # can be listed all the same
    monkeypatch.delenv("QUANTPATCH_PLUGINS")
    monkeypatch.setenv("QUANTPATCH_BLOCK", "mylob")
    registry = Registry()
    with pytest.warns(
        QuantPatchWarning, match="QUANTPATCH_BLOCK names 'mylob', and there is no such plugin. Did you mean"
    ):
        registry.offers()
    assert "mylib" in {offer.plugin for offer in registry.offers()}  # told once


def test_twenty_plugins_import_none_of_their_target_packages_until_the_user_does(tmp_path) -> None:
    for number in range(20):
        name = f"plugin{number}"
        (tmp_path / f"target{number}.py").write_text("from torch import nn\nclass Layer(nn.Linear): ...\n")
        (tmp_path / f"{name}.py").write_text(
            GOOD.replace("far.away", f"target{number}").replace("far.quant", f"{name}_layers")
        )
        (tmp_path / f"{name}_layers.py").write_text(
            f"import quantpatch, target{number}\n"
            f"class QuantLayer(quantpatch.QuantizedLayer, target{number}.Layer):\n"
            "    inputs, weights = ('input',), {'weight': 0}\n"
        )
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[quantpatch]\n{name} = {name}\n")
    code = """if True:
        import sys, torch
        def imported(*starts):
            return sorted(m for m in sys.modules if m.startswith(starts))
        import quantpatch
        print(imported("target", "plugin", "far"))
        with quantpatch.quantize_modules() as scope:
            torch.nn.Linear(2, 2)
            print(len(imported("plugin")), imported("target"))
            from target7 import Layer
            print(type(Layer(2, 2)).__name__, imported("target"), len(imported("plugin")))
        """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "20 []", "QuantLayer ['target7'] 21"]


UNFIT = """
import quantpatch, torch
def make():
    class QuantTanh(quantpatch.QuantizedLayer, torch.nn.Tanh):
        inputs = ("input",)
    return QuantTanh
@quantpatch.hookimpl
def quantpatch_entries():
    return [("torch.nn", "Tanh", REPLACEMENT)]
"""
PATCHING = """
import quantpatch, torch
torch.nn.Linear.shiny = 1
class QuantTanh(quantpatch.QuantizedLayer, torch.nn.Tanh):
    inputs = ("input",)
"""


def test_a_class_that_cannot_be_pickled_is_refused_with_what_to_write(install) -> None:
    module = install("local", UNFIT.replace("REPLACEMENT", "make()"), "local-dist")
    qp.registry._plugins |= {"local": discover()["local"]}
    try:
        with (
            pytest.raises(
                EntryError,
                match=rf"plugin 'local': entry torch.nn.Tanh.*{module}.make.<locals>.QuantTanh is not found "
                r"under that name, .* pickled. Define the class at the top of a module, .*:QuantTanh'",
            ),
            qp.quantize_modules(),
        ):
            pass
    finally:
        qp.registry.unregister("local")


def test_a_replacement_that_changes_torch_when_it_is_imported_is_refused(install, package) -> None:
    layers = package(layers=PATCHING)
    install("late", UNFIT.replace("REPLACEMENT", repr(f"{layers}.layers:QuantTanh")), "late-dist")
    qp.registry._plugins |= {"late": discover()["late"]}
    try:
        with (
            pytest.raises(
                EntryError,
                match="plugin 'late': .*importing it changes PyTorch: .*Linear.shiny: nothing became 1",
            ),
            qp.quantize_modules(),
        ):
            pass
    finally:
        qp.registry.unregister("late")


def test_plugins_by_hand() -> None:
    registry = Registry(discover=False)
    registry.register(ModuleType("mine"), "mine")
    assert [info.name for info in registry.plugins()] == ["mine"]
    with pytest.raises(PluginError, match="plugin 'mine' is registered already"):
        registry.register(ModuleType("mine"), "mine")
    registry.unregister("mine")
    with pytest.raises(UnknownNameError, match="unknown plugin 'mine'"):
        registry.unregister("mine")
    wrong = ModuleType("wrong")
    exec("import quantpatch\n@quantpatch.hookimpl\ndef quantpatch_entry(): ...", vars(wrong))
    with pytest.raises(PluginError, match="there are quantpatch_advice, quantpatch_calibrators"):
        registry.register(wrong, "wrong")
    assert registry.plugins() == []
    registry.register(ModuleType("wrong"), "wrong")


def test_names_from_plugins(plugin) -> None:
    recipe = qp.Recipe(name="mine")
    name = plugin(recipes={"mine": recipe})
    assert qp.registry.recipe("mine") is recipe
    assert qp.registry.recipe(recipe) is recipe
    assert qp.registry.recipe("int8") is DEFAULT_RECIPE
    with pytest.raises(UnknownNameError, match="unknown recipe 'mien'. Did you mean 'mine'\\?$"):
        qp.registry.recipe("mien")
    for unknown in (["int8"], qp.QuantDescriptor()):
        with pytest.raises(UnknownNameError, match="unknown recipe .* Or make one: Recipe"):
            qp.registry.recipe(unknown)
    with pytest.raises(UnknownNameError, match="unknown calibrator 'maxx'. Did you mean 'max'"):
        qp.registry.calibrator("maxx")
    plugin("zeta", recipes={"mine": recipe})
    with pytest.raises(PluginError, match=f"plugin 'zeta' returned 'mine' .*which '{name}' has already"):
        qp.registry.recipe("mine")


@pytest.mark.parametrize("bad", [["int8"], {"x": 3}, {3: DEFAULT_RECIPE}])
def test_names_of_another_kind_are_refused(bad, plugin) -> None:
    plugin("bad", recipes=bad)
    with pytest.raises(
        PluginError, match="plugin 'bad' returned .* from quantpatch_recipes, expected a (mapping|name)"
    ) as caught:
        qp.registry.recipe("int8")
    assert caught.value.hook == "quantpatch_recipes"


def test_a_plugin_without_a_hash_is_refused_at_once():
    with pytest.raises(PluginError, match="SimpleNamespace, which has no hash"):
        Registry(discover=False).register(SimpleNamespace(), "unhashable")
