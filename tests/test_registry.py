"""Plugins: found, loaded, named, blocked."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest

import quantpatch as qp
from quantpatch.errors import PluginError, UnknownNameError
from quantpatch.recipes import DEFAULT_RECIPE
from quantpatch.registry import BUILTIN, Registry

_count = itertools.count()
GOOD = """
import quantpatch
@quantpatch.hookimpl
def quantpatch_entries():
    return [("far.away", "Layer", "far.quant:QuantLayer")]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a real distribution with one plugin; returns the name of its module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(plugin: str, source: str, dist: str = "", version: str = "1.2") -> str:
        module = f"plugin_module_{next(_count)}"
        (tmp_path / f"{module}.py").write_text(source)
        dist = dist or f"dist-{module}"
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[quantpatch]\n{plugin} = {module}\n")
        return module

    return make


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
    "takes arguments": (GOOD.replace("entries()", "entries(torch)"), "does not fit the hooks: .*torch"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_with_its_distribution_and_can_be_blocked(
    case, install, monkeypatch
) -> None:
    source, message = BROKEN[case]
    module = install("broken", source, "broken-dist", "0.3")
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
    monkeypatch.setenv("QUANTPATCH_BLOCK", " other, broken ")
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
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "one, unknown")
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
        PluginError, match=r"from first-dist 1.2\) has the same name as one from second-dist 1.2"
    ):
        Registry().offers(["same"])


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
    with pytest.raises(PluginError, match="there are quantpatch_calibrators, quantpatch_entries"):
        registry.register(wrong, "wrong")
    assert registry.plugins() == []
    registry.register(ModuleType("wrong"), "wrong")


def test_names_from_plugins(plugin) -> None:
    recipe = qp.Recipe(name="mine")
    name = plugin(recipes={"mine": recipe})
    assert qp.registry.recipe("mine") is recipe
    assert qp.registry.recipe(recipe) is recipe
    assert qp.registry.recipe("int8") is DEFAULT_RECIPE
    for unknown in ("mien", ["int8"]):
        with pytest.raises(UnknownNameError, match="unknown recipe"):
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
