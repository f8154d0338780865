"""Plugins: found, loaded, named, blocked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import quantpatch as qp
from quantpatch.errors import EntryError, PluginError, QuantPatchWarning, UnknownNameError
from quantpatch.plugins import hookspecs
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import Registry
from quantpatch.plugins.registry import registry as shared
from quantpatch.recipes.builtin import DEFAULT_RECIPE

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
    assert zeta.entries == (qp.Entry("far.away", "Layer", "far.quant:QuantLayer", plugin="zeta"),)
    assert [o.plugin for o in registry.entries(["zeta", "alpha"]) if o.plugin != BUILTIN] == ["alpha", "zeta"]
    assert "far" not in sys.modules


BROKEN = {
    "raises on import": ("raise OSError('no disk')", "cannot be imported: OSError: no disk"),
    "exits on import": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "raises in its hook": (
        GOOD.replace("return", "raise KeyError or"),
        "failed in its hook quantpatch_entries: KeyError",
    ),
    "ends in an error of another kind": (
        "class Gone(BaseException): ...\nraise Gone('away')",
        "cannot be imported: Gone: away",
    ),
    "ends as a generator does": ("raise GeneratorExit", "cannot be imported: GeneratorExit: "),
    "has an error that cannot be shown": (
        "class Bad(Exception):\n    def __str__(self): raise SystemExit\nraise Bad",
        "cannot be imported: Bad: \\(its message cannot be shown",
    ),
    "writes to the terminal in its error": (
        "raise ValueError('\\x1b[31mred\\x07')",
        r"cannot be imported: ValueError: \\x1b\[31mred\\x07",
    ),
    "stops in its hook": (
        GOOD.replace("return", "raise StopIteration or"),
        "failed in its hook quantpatch_entries: StopIteration",
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
        "returned something other than entries.*3 is not an entry",
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
    "changes what fills weights": (
        f"import torch\ntorch.nn.init.shiny = None\n{GOOD}",
        "changes PyTorch when it is imported: torch.nn.init.shiny: nothing became None. That was taken back",
    ),
    "changes an optimizer": (
        f"import torch\ntorch.optim.SGD.step = lambda self: None\n{GOOD}",
        "changes PyTorch when it is imported: torch.optim.sgd.SGD.step: ",
    ),
    "sets the default dtype": (
        f"import torch\ntorch.set_default_dtype(torch.float64)\n{GOOD}",
        "changes PyTorch when it is imported: .*the default dtype: torch.float32 became torch.float64",
    ),
    "sets the default device": (
        f"import torch\ntorch.set_default_device('meta')\n{GOOD}",
        "changes PyTorch when it is imported: the default device: device\\(type='cpu'\\) became",
    ),
    "switches gradients off": (
        f"import torch\ntorch.set_grad_enabled(False)\n{GOOD}",
        "changes PyTorch when it is imported: whether gradients are recorded: True became False",
    ),
    "hooks every module": (
        f"import torch\ntorch.nn.modules.module.register_module_forward_hook(print)\n{GOOD}",
        "changes PyTorch when it is imported: torch.nn.modules.module._global_forward_hooks: ",
    ),
    "forgets to mark its hook": (
        GOOD.replace("@quantpatch.hookimpl", ""),
        "has a function quantpatch_entries that is not marked as a hook.* Write @quantpatch.hookimpl above",
    ),
    "marks one of its hooks": (
        f"{GOOD}\ndef quantpatch_recipes(): ...",
        "has a function quantpatch_recipes that is not marked as a hook",
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
            registry.entries(["broken"])
        assert "set QUANTPATCH_BLOCK=broken" in str(caught.value)
        assert (caught.value.plugin, caught.value.distribution) == ("broken", "broken-dist 0.3")
    (info,) = [info for info in registry.plugins() if info.name == "broken"]
    assert info.state == "failed"
    assert "broken-dist 0.3" in info.reason
    assert registry.entries([])  # those not asked for do not matter
    monkeypatch.setenv("QUANTPATCH_BLOCK", " broken ,")
    sys.modules.pop(module, None)
    registry = Registry()
    assert {entry.plugin for entry in registry.entries(["broken"])} == {BUILTIN}
    assert module not in sys.modules, "a blocked plugin is not imported"
    (info,) = [info for info in registry.plugins() if info.name == "broken"]
    assert (info.state, info.reason, info.entries) == ("blocked", "QUANTPATCH_BLOCK names it", ())


def test_the_environment_allows_and_blocks(install, monkeypatch) -> None:
    install("one", GOOD)
    install("two", GOOD.replace("Layer", "Other"))

    def active() -> set[str]:
        return {str(entry.plugin) for entry in Registry().entries()} & {"one", "two", BUILTIN}

    assert active() == {"one", "two", BUILTIN}
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "one, ")
    assert active() == {"one", BUILTIN}
    monkeypatch.setenv("QUANTPATCH_BLOCK", "one")
    assert active() == {BUILTIN}
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "")
    monkeypatch.delenv("QUANTPATCH_BLOCK")
    assert active() == {BUILTIN}
    monkeypatch.setenv("QUANTPATCH_BLOCK", BUILTIN)
    with pytest.raises(
        PluginError, match="'quantpatch.builtin' cannot be blocked, .* write quantize_modules"
    ):
        active()


def test_two_distributions_with_one_plugin_name(install) -> None:
    install("same", GOOD, "first-dist")
    install("same", GOOD, "second-dist")
    with pytest.raises(
        PluginError, match=r"from first-dist 1.2\) has the same name as one from second-dist 1.2. Uninstall"
    ):
        Registry().entries(["same"])


def test_a_distribution_may_bring_two_plugins_but_not_under_one_name_or_from_one_module(install) -> None:
    install("one", GOOD, points="two = throwaway_second", dist="both")
    assert {"one", "two"} <= {info.name for info in Registry().plugins()}
    install("twice", GOOD, points="twice = MODULE:Other", dist="doubled")
    with pytest.raises(
        PluginError, match=r"'twice' \(from doubled 1.2\) is declared twice, as plugin_module"
    ):
        Registry().entries(["twice"])
    module = install("alpha", GOOD, points="omega = MODULE", dist="echo")
    registry = Registry()
    assert registry.entries(["alpha"])
    with pytest.raises(
        PluginError,
        match=rf"'omega' \(from echo 1.2\) is the same module as plugin 'alpha': two .* {module}. Remove one",
    ):
        registry.entries(["alpha", "omega"])
    assert registry.entries(["alpha"])


def test_what_torch_changes_by_itself_while_a_plugin_is_imported_is_not_the_plugins_doing(
    install, monkeypatch
) -> None:
    # As importing torch._dynamo does: a function of torch's own, which was not there before.
    source = "import torch\nexec('def manual_seed(seed): ...', vars(torch.random))\n"
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(torch.random, "manual_seed", torch.random.manual_seed)
    install("innocent", f"{source}torch.manual_seed = torch.random.manual_seed\n{GOOD}")
    assert "innocent" in {entry.plugin for entry in Registry().entries(["innocent"])}
    assert torch.manual_seed is torch.random.manual_seed


def test_blocks_that_other_threads_open_during_an_import_are_not_the_plugins_doing(install) -> None:
    shared.plugins()  # the registry of blocks, which would find the plugin and keep it for other tests
    source = (
        "import quantpatch, threading\nscope = quantpatch.quantize_modules(plugins=[])\n"
        "other = threading.Thread(target=scope.start)\nother.start()\nother.join()\n"
    )
    module = install("busy", source + GOOD)
    assert "busy" in {entry.plugin for entry in Registry().entries(["busy"])}
    sys.modules[module].scope.stop()


@pytest.mark.parametrize("how", ["start", "__enter__"])
def test_a_block_that_a_plugin_leaves_open_is_closed(how, install) -> None:
    shared.plugins()
    source = f"import quantpatch\nquantpatch.quantize_modules(plugins=[]).{how}()\n{GOOD}"
    install("open", source, "open-dist")
    with (
        qp.quantize_modules(plugins=[]) as around,
        pytest.raises(
            PluginError,
            match=r"'open' \(from open-dist 1.2\) .*a block was left open: quantize_modules",
        ),
    ):
        Registry().entries(["open"])
    assert type(torch.nn.Linear(1, 1)) is torch.nn.Linear
    assert not around.replaced


def test_a_plugin_written_for_an_older_api_is_to_be_updated(install, monkeypatch) -> None:
    install("old", f"quantpatch_api = (1, 2)\n{GOOD}", "old-dist")
    install("silent", GOOD.replace("Layer", "Other"), "silent-dist")
    for version in (1, 2):
        monkeypatch.setattr(hookspecs, "API_VERSION", version)
        monkeypatch.setattr("quantpatch.layers.builtin.quantpatch_api", (version, version))
        assert "old" in {entry.plugin for entry in Registry().entries(["old"])}
    monkeypatch.setattr(hookspecs, "API_VERSION", 3)
    monkeypatch.setattr("quantpatch.layers.builtin.quantpatch_api", (3, 3))
    with pytest.raises(
        PluginError,
        match="for versions 1 to 2 .* has version 3. Update old-dist: pip install --upgrade old-dist",
    ):
        Registry().entries(["old"])
    with pytest.raises(PluginError, match=r"'silent' .*for version 1 of the plugin API"):
        Registry().entries(["silent"])


def test_an_unknown_name_in_the_allowlist_is_an_error_and_in_the_blocklist_a_warning(
    install, monkeypatch
) -> None:
    install("mylib", GOOD)
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "mylob")
    with pytest.raises(
        UnknownNameError, match="unknown plugin in QUANTPATCH_PLUGINS 'mylob'. Did you mean 'mylib'"
    ):
        Registry().entries()
    with pytest.warns(QuantPatchWarning, match="QUANTPATCH_PLUGINS names 'mylob', .* Did you mean 'mylib'"):
        assert "mylib" in {info.name for info in Registry().plugins()}  # can be listed all the same
    monkeypatch.delenv("QUANTPATCH_PLUGINS")
    monkeypatch.setenv("QUANTPATCH_BLOCK", "mylob")
    registry = Registry()
    with pytest.warns(
        QuantPatchWarning, match="QUANTPATCH_BLOCK names 'mylob', and there is no such plugin. Did you mean"
    ):
        registry.entries()
    assert "mylib" in {entry.plugin for entry in registry.entries()}  # told once


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


def test_a_class_that_cannot_be_pickled_is_refused_with_what_to_write(install, take_part) -> None:
    module = install("local", UNFIT.replace("REPLACEMENT", "make()"), "local-dist")
    take_part("local")
    with (
        pytest.raises(
            EntryError,
            match=rf"plugin 'local': entry torch.nn.Tanh.*{module}.make.<locals>.QuantTanh is not found "
            r"under that name, .* pickled. Define the class at the top of a module, .*:QuantTanh'",
        ),
        qp.quantize_modules(),
    ):
        pass


def test_a_replacement_that_changes_torch_when_it_is_imported_is_refused(install, take_part, package) -> None:
    layers = package(layers=PATCHING)
    install("late", UNFIT.replace("REPLACEMENT", repr(f"{layers}.layers:QuantTanh")), "late-dist")
    take_part("late")
    with (
        pytest.raises(
            EntryError,
            match="plugin 'late': .*importing it changes PyTorch: .*Linear.shiny: nothing became 1",
        ),
        qp.quantize_modules(),
    ):
        pass


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
    with pytest.raises(PluginError, match="there are quantpatch_calibrators"):
        registry.register(wrong, "wrong")
    assert registry.plugins() == []
    registry.register(ModuleType("wrong"), "wrong")


def test_the_built_in_plugin_cannot_be_taken_away() -> None:
    with pytest.raises(PluginError, match=r"cannot be removed: .*skip=\['torch.nn.\*'\].*keep_float\(\)"):
        qp.registry.unregister(BUILTIN)
    with qp.quantize_modules(skip=["torch.nn.*"]):
        assert type(torch.nn.Linear(1, 1)) is torch.nn.Linear


def test_a_function_whose_name_is_nearly_that_of_a_hook_is_reported() -> None:
    near = ModuleType("near")
    exec("def quantpatch_entires(): ...\ndef quantpatch_version(): ...", vars(near))
    registry = Registry(discover=False)
    with pytest.warns(
        QuantPatchWarning,
        match="'near' has a function quantpatch_entires, .* If it is to be quantpatch_entries",
    ) as told:
        registry.register(near, "near")
    assert len(told) == 1


def test_a_plugin_object_with_a_method_that_is_not_marked_is_reported() -> None:
    class Base:
        @qp.hookimpl
        def quantpatch_entries(self):
            return []

    class Overrides(Base):
        def quantpatch_entries(self):
            return []

    registry = Registry(discover=False)
    registry.register(Base(), "base")
    with pytest.raises(PluginError, match="'overrides' has a function quantpatch_entries that is not marked"):
        registry.register(Overrides(), "overrides")
    assert [info.name for info in registry.plugins()] == ["base"]


def test_an_installed_plugin_without_hooks_is_reported(install) -> None:
    install("idle", "x = 1", "idle-dist")
    registry = Registry()
    with pytest.warns(QuantPatchWarning, match="'idle' .*implements no hook, .* @quantpatch.hookimpl"):
        registry.entries(["idle"])


class Twice:
    """Implements each hook twice."""

    def __init__(self):
        self.recipe, self.other = qp.Recipe(name="mine"), qp.Recipe(name="other")

    @qp.hookimpl(specname="quantpatch_entries")
    def first(self):
        return [("far.away", "First", "far.quant:QuantFirst")]

    @qp.hookimpl(specname="quantpatch_entries")
    def second(self):
        return [qp.Entry("far.away", "Second", "far.quant:QuantSecond")]

    @qp.hookimpl
    def quantpatch_recipes(self):
        return {"mine": self.recipe}

    @qp.hookimpl(specname="quantpatch_recipes")
    def more_recipes(self):
        return {"other": self.other}

    @qp.hookimpl(specname="quantpatch_examples")
    def one(self):
        return [qp.Example("far.away.First", build=lambda: 1, inputs=tuple)]

    @qp.hookimpl(specname="quantpatch_examples")
    def two(self):
        return (qp.Example("far.away.Second", build=lambda: 1, inputs=tuple),)


def test_each_hook_is_asked_once_until_plugins_come_or_go(monkeypatch) -> None:
    asked: list[str] = []

    class Counting:
        @qp.hookimpl
        def quantpatch_entries(self):
            asked.append("entries")
            return []

        @qp.hookimpl
        def quantpatch_recipes(self):
            asked.append("recipes")
            return {}

    registry = Registry(discover=False)
    registry.register(Counting(), "counting")
    first = registry.entries()
    for _ in range(2):
        assert registry.entries() is first
        assert registry.named("quantpatch_recipes", qp.Recipe) == {}
        assert registry.plugins()[0].entries == ()
    monkeypatch.setenv("QUANTPATCH_BLOCK", "counting")
    registry.entries()
    monkeypatch.delenv("QUANTPATCH_BLOCK")
    assert registry.entries() is first
    assert asked == ["entries", "recipes"]
    registry.register(Offering({"mine": qp.Recipe(name="mine")}), "mine")
    assert list(registry.named("quantpatch_recipes", qp.Recipe)) == ["mine"]
    registry.unregister("mine")
    assert registry.named("quantpatch_recipes", qp.Recipe) == {}


class Offering:
    def __init__(self, recipes):
        self.recipes = recipes

    @qp.hookimpl
    def quantpatch_recipes(self):
        return self.recipes


def test_several_implementations_of_a_hook_all_count() -> None:
    registry = Registry(discover=False)
    plugin = Twice()
    registry.register(plugin, "twice")
    assert {str(entry.dotted) for entry in registry.entries()} == {"far.away.First", "far.away.Second"}
    assert registry.named("quantpatch_recipes", qp.Recipe) == {"mine": plugin.recipe, "other": plugin.other}
    assert {e.target for e in registry.examples("twice")} == {"far.away.First", "far.away.Second"}


def test_several_implementations_may_not_contradict_each_other_or_forget_to_return() -> None:
    class Contradicting(Twice):
        @qp.hookimpl(specname="quantpatch_recipes")
        def third(self):
            return {"mine": self.other}

        @qp.hookimpl(specname="quantpatch_entries")
        def forgetful(self):
            pass

    registry = Registry(discover=False)
    registry.register(Contradicting(), "twice")
    with pytest.raises(PluginError, match="'twice' returned 'mine' from quantpatch_recipes twice"):
        registry.named("quantpatch_recipes", qp.Recipe)
    with pytest.raises(PluginError, match="returned None from quantpatch_entries"):
        registry.entries()


@pytest.mark.parametrize("kind", [RuntimeError, type("OutOfTime", (BaseException,), {})])
def test_a_timeout_during_an_import_is_not_the_plugins_failure(kind, install) -> None:
    def handler(number: int, frame: object) -> None:
        raise kind("out of time")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        source = "import os, signal, sys\nif not hasattr(sys, 'second_try'):\n    sys.second_try = 1\n"
        install("slow", f"{source}    os.kill(os.getpid(), signal.SIGUSR1)\n{GOOD}", "slow-dist")
        registry = Registry()
        with pytest.raises(kind, match="out of time"):
            registry.entries(["slow"])
        assert "slow" in {entry.plugin for entry in registry.entries(["slow"])}
    finally:
        signal.signal(signal.SIGUSR1, before)
        vars(sys).pop("second_try", None)


def test_an_import_that_fails_is_tried_again(install, monkeypatch) -> None:
    install("early", f"import sys\nif not hasattr(sys, 'ready'): raise OSError('disk')\n{GOOD}", "early-dist")
    registry = Registry()
    with pytest.raises(
        PluginError, match=r"plugin 'early' \(from early-dist 1.2\) cannot be imported: OSError"
    ):
        registry.entries(["early"])
    monkeypatch.setattr(sys, "ready", True, raising=False)
    assert "early" in {entry.plugin for entry in registry.entries(["early"])}


def test_names_from_plugins(plugin) -> None:
    recipe = qp.Recipe(name="mine")
    name = plugin(recipes={"mine": recipe})
    assert qp.recipe("mine") is recipe
    assert qp.recipe(recipe) is recipe
    assert qp.recipe("int8") is DEFAULT_RECIPE
    with pytest.raises(UnknownNameError, match="unknown recipe 'mien'. Did you mean 'mine'\\?$"):
        qp.recipe("mien")
    for unknown in (["int8"], qp.QuantDescriptor()):
        with pytest.raises(UnknownNameError, match="unknown recipe .* Or make one: Recipe"):
            qp.recipe(unknown)
    with pytest.raises(UnknownNameError, match="unknown calibrator 'maxx'. Did you mean 'max'"):
        qp.registry.calibrator("maxx")
    plugin("zeta", recipes={"mine": recipe})
    with pytest.raises(PluginError, match=f"plugin 'zeta' returned 'mine' .*which '{name}' has already"):
        qp.recipe("mine")


@pytest.mark.parametrize("bad", [["int8"], {"x": 3}, {3: DEFAULT_RECIPE}])
def test_names_of_another_kind_are_refused(bad, plugin) -> None:
    plugin("bad", recipes=bad)
    with pytest.raises(
        PluginError, match="plugin 'bad' returned .* from quantpatch_recipes, expected a (mapping|name)"
    ) as caught:
        qp.recipe("int8")
    assert caught.value.hook == "quantpatch_recipes"


def test_a_plugin_without_a_hash_is_refused_at_once():
    with pytest.raises(PluginError, match="SimpleNamespace, which has no hash"):
        Registry(discover=False).register(SimpleNamespace(), "unhashable")
