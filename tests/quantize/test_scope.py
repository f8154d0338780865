"""Every rule of the block, by the behaviour that it promises."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import Linear

import quantpatch as qp
from quantpatch import keep_float, quantize_modules
from quantpatch.errors import (
    ArgumentTypeError,
    BlockError,
    EntryConflictError,
    EntryError,
    QuantPatchWarning,
    UnknownNameError,
)
from quantpatch.layers import QuantizedLayer
from quantpatch.layers.conv import QuantConv2d
from quantpatch.layers.linear import QuantLinear

make_linear = functools.partial(nn.Linear, 2, 2)


class MyQuantLinear(nn.Linear):
    """A replacement that a test can tell from the built-in one."""


class MyQuantConv(nn.Conv2d):
    """Likewise."""


class OtherLinear(nn.Linear):
    """Likewise."""


CUSTOM = ("torch.nn", "Linear", MyQuantLinear)
HERE = __name__


def built(cls: type = nn.Linear) -> type:
    """What a class comes out as here."""
    arguments = {nn.Conv2d: (1, 1, 1), nn.AvgPool2d: (2,)}.get(cls, (2, 2))
    return type(cls(*arguments))


def opened(**settings: object) -> type:
    with quantize_modules(**settings):
        return built()


# --- what comes out ----------------------------------------------------------------------------


def test_a_layer_built_inside_is_quantized_and_one_built_outside_is_not() -> None:
    before = built()
    with quantize_modules() as scope:
        inside = built()
        assert isinstance(scope, type(quantize_modules()))
    assert (before, inside, built()) == (Linear, QuantLinear, Linear)


def test_names_imported_before_the_block_are_concerned_as_well() -> None:
    with quantize_modules():
        assert type(Linear(2, 2)) is QuantLinear
        assert type(make_linear()) is QuantLinear


def test_what_torch_builds_itself_is_replaced() -> None:
    with quantize_modules():
        layer = nn.TransformerEncoderLayer(4, 2, 8)
    assert type(layer.linear1) is type(layer.linear2) is QuantLinear


def test_isinstance_and_classes_are_what_they_were() -> None:
    float_layer = Linear(2, 2)
    with quantize_modules():
        assert isinstance(float_layer, nn.Linear)
        assert nn.Linear is Linear
        assert isinstance(nn.Linear(2, 2), nn.Linear)


def test_a_class_defined_inside_keeps_the_float_base() -> None:
    with quantize_modules() as scope:

        class Mine(nn.Linear):
            pass

        assert type(Mine(2, 2)) is Mine
    assert Mine.__bases__ == (Linear,)
    (line,) = scope.skipped
    assert line.target.endswith("Mine")
    assert line.reason == "a subclass of torch.nn.Linear, for which there is no entry; write subclasses=True"


def test_deepcopy_and_pickle_inside_keep_what_they_are_given() -> None:
    float_layer = Linear(2, 2)
    with quantize_modules() as scope:
        assert type(copy.deepcopy(float_layer)) is Linear
        assert type(pickle.loads(pickle.dumps(float_layer))) is Linear
        quantized = nn.Linear(2, 2)
        assert type(copy.deepcopy(quantized)) is QuantLinear
        buffer = io.BytesIO()
        torch.save(float_layer, buffer)
        buffer.seek(0)
        assert type(torch.load(buffer, weights_only=False)) is Linear
    assert [line.count for line in scope.replaced] == [1]


def test_skip_init_and_the_meta_device_work_inside() -> None:
    with quantize_modules():
        assert type(nn.utils.skip_init(nn.Linear, 3, 4)) is QuantLinear
        with torch.device("meta"):
            layer = nn.Linear(3, 4)
        assert type(layer) is QuantLinear
        assert layer.weight.is_meta


def test_signatures_inside_are_those_of_torch() -> None:
    outside = inspect.signature(nn.Linear)
    with quantize_modules():
        assert inspect.signature(nn.Linear) == outside
        assert nn.Linear.__init__.__qualname__ == "Linear.__init__"


def test_an_error_of_the_constructor_is_its_own() -> None:
    with quantize_modules(), pytest.raises(TypeError, match="out_features"):
        nn.Linear(2)
    with quantize_modules(), pytest.raises(ValueError, match="divisible"):
        nn.Conv2d(3, 3, 1, groups=2)
    assert built() is Linear


# --- order of authority ------------------------------------------------------------------------


def test_custom_beats_plugins_and_plugins_beat_builtins(plugin) -> None:
    plugin(entries=[("torch.nn", "Linear", OtherLinear)])
    assert opened() is OtherLinear
    assert opened(custom=[CUSTOM]) is MyQuantLinear


def test_skip_removes_builtins_and_plugins_but_not_custom(plugin) -> None:
    assert opened(skip=["Linear"]) is Linear
    assert opened(skip=["Linear"], custom=[CUSTOM]) is MyQuantLinear
    plugin(entries=[("torch.nn", "Linear", OtherLinear)])
    assert opened(skip=["Linear"]) is Linear
    assert opened(skip=["Linear"], custom=[CUSTOM]) is MyQuantLinear


@pytest.mark.parametrize(
    "skip",
    [
        "Linear",
        ["Linear"],
        "torch.nn.Linear",
        "torch.nn.modules.linear.Linear",
        "Lin*",
        "torch.nn.L*",
        nn.Linear,
        [nn.Linear],
    ],
)
def test_skip_takes_names_dotted_names_globs_and_classes(skip) -> None:
    with quantize_modules(skip=skip) as scope:
        assert built() is Linear
        assert built(nn.Conv2d) is QuantConv2d
    (line,) = scope.skipped
    assert line.target == "torch.nn.Linear"
    assert line.reason.startswith("skip=")


@pytest.mark.parametrize("skip", ["linear", "Linaer", "torch.nn.Linea", "nn.Linear"])
def test_skip_that_matches_nothing_suggests_what_comes_near(skip) -> None:
    with (
        pytest.raises(UnknownNameError, match="Did you mean .*Linear") as caught,
        quantize_modules(skip=[skip]),
    ):
        pass
    assert caught.value.name == skip
    assert "layer in skip" in str(caught.value)
    assert built() is Linear


@pytest.mark.parametrize("skip", ["", "*Nothing*", nn.ReLU, QuantLinear])
def test_skip_that_matches_nothing_is_an_error(skip) -> None:
    with pytest.raises(UnknownNameError), quantize_modules(skip=[skip]):
        pass


@pytest.mark.parametrize(
    ("skip", "advice"),
    [
        ("int8", "recipe='int8'"),  # given in the first place, as if it were the recipe
        ([nn.ReLU], "left float without being named"),
        (["classifier"], "qp.configure(model, {'classifier': None})"),
    ],
)
def test_skip_that_matches_nothing_says_what_to_write(skip, advice) -> None:
    with pytest.raises(UnknownNameError) as caught, quantize_modules(skip=skip):
        pass
    assert advice in str(caught.value)


@pytest.mark.parametrize("argument", ["skip", "include"])
@pytest.mark.parametrize("bad", [3, [3], [["Linear"]], [nn.Linear(1, 1)], b"Linear", {"Linear": 1}])
def test_skip_of_another_type_is_an_error_that_says_what_to_write(argument, bad) -> None:
    with pytest.raises(ArgumentTypeError, match=f"{argument} takes"), quantize_modules(**{argument: bad}):
        pass


def test_include_replaces_what_is_left_float_by_default() -> None:
    with quantize_modules() as scope:
        assert built(nn.Embedding) is nn.Embedding
    assert "include=['Embedding']" in scope.skipped[0].reason
    with quantize_modules(include="Embedding"):
        assert built(nn.Embedding).__name__ == "QuantEmbedding"
    with quantize_modules(include=["Embedding"], skip=["Embedding"]):
        assert built(nn.Embedding) is nn.Embedding
    with pytest.raises(UnknownNameError, match="layer in include"), quantize_modules(include=["Embeding"]):
        pass


@pytest.mark.parametrize(
    "entry",
    [
        (nn, "Linear", MyQuantLinear),
        ("torch.nn", "Linear", MyQuantLinear),
        ("torch.nn.modules.linear", "Linear", MyQuantLinear),
        ("torch.nn", "Linear", f"{HERE}:MyQuantLinear"),
        qp.Entry("torch.nn", "Linear", MyQuantLinear),
    ],
)
def test_custom_takes_tuples_and_entries(entry) -> None:
    with quantize_modules(custom=[entry]) as scope:
        assert built() is MyQuantLinear
    (line,) = scope.replaced
    assert (line.plugin, line.count, line.entry) == (
        None,
        1,
        qp.Entry(*entry) if isinstance(entry, tuple) else entry,
    )


def test_one_custom_entry_needs_no_list() -> None:
    assert opened(custom=CUSTOM) is MyQuantLinear
    assert opened(custom=qp.Entry(*CUSTOM)) is MyQuantLinear


class Slotted:
    __slots__ = ("a",)


class OtherLayout(nn.Module):
    __slots__ = ("a",)


BAD_CUSTOM = {
    "no such module": (("no_such_module", "Linear", MyQuantLinear), "there is no module 'no_such_module'"),
    "no such submodule": (("torch.nn.nothing", "Linear", MyQuantLinear), "there is no module"),
    "no such name": (("torch.nn", "Linaer", MyQuantLinear), "has no 'Linaer'. Did you mean 'Linear'"),
    "target is no class": (("torch.nn", "__version__", MyQuantLinear), "has no '__version__'"),
    "target is a value": (("torch", "__version__", MyQuantLinear), "neither a class nor a function"),
    "target in C": (("torch", "Size", MyQuantLinear), "implemented in C"),
    "replacement is no class": (("torch.nn", "Linear", built), "is not a class"),
    "replacement is nothing": (("torch.nn", "Linear", None), "expected a class or function"),
    "replacement is the target": (("torch.nn", "Linear", nn.Linear), "it is the target itself"),
    "replacement is its base": (("torch.nn", "Linear", nn.Module), "base class of the target"),
    "replacement is unrelated": (("torch.nn", "Linear", dict), "shares? no base|share no base"),
    "another layout": (("torch.nn", "Linear", OtherLayout), "cannot become"),
    "not a path": (("torch.nn", "Linear", "MyQuantLinear"), "expected 'package.module:ClassName'"),
    "path to no module": (("torch.nn", "Linear", "no_such_module:Q"), "cannot be imported"),
    "path to no name": (("torch.nn", "Linear", f"{HERE}:Nothing"), "does not exist"),
    "not three": (("torch.nn", "Linear"), "is not an entry"),
    "not a tuple": ("torch.nn.Linear", "is not an entry"),
    "no name": (("torch.nn", 3, MyQuantLinear), "is not an entry"),
    "no module": ((3, "Linear", MyQuantLinear), "expected a module or its dotted name"),
    "function for a class": (("torch.nn.functional", "linear", MyQuantLinear), "the target is a function"),
}


@pytest.mark.parametrize("case", BAD_CUSTOM)
def test_a_bad_custom_entry_is_named_and_nothing_stays_patched(case) -> None:
    entry, message = BAD_CUSTOM[case]
    with pytest.raises(EntryError, match=message) as caught, quantize_modules(custom=[entry]):
        pytest.fail("the block was entered")
    assert caught.value.entry is not None
    assert built() is Linear


def test_two_custom_entries_for_one_target_are_an_error() -> None:
    twice = [CUSTOM, ("torch.nn.modules.linear", "Linear", OtherLinear)]
    with pytest.raises(EntryError, match="another entry for the same target"), quantize_modules(custom=twice):
        pass


def test_an_entry_that_fails_leaves_nothing_patched_and_names_its_plugin(plugin) -> None:
    name = plugin(entries=[("torch.nn", "ReLU", f"{HERE}:Nothing")])
    with (
        pytest.raises(EntryError, match=f"plugin '{name}': entry torch.nn.ReLU") as caught,
        quantize_modules(),
    ):
        pass
    assert caught.value.plugin == name
    assert built() is Linear
    assert opened(skip=["ReLU"]) is QuantLinear


def test_a_failure_while_hooks_are_put_in_takes_them_all_out(monkeypatch) -> None:
    from quantpatch.interception import hooks

    real = hooks._ClassSlot._write
    calls = iter(range(100))

    def fail_at_the_fifth(self, value):
        if next(calls) == 4:
            raise MemoryError
        real(self, value)

    monkeypatch.setattr(hooks._ClassSlot, "_write", fail_at_the_fifth)
    with pytest.raises(MemoryError), quantize_modules():
        pass
    monkeypatch.undo()
    assert "quantpatch" not in Linear.__init__.__code__.co_filename
    assert opened() is QuantLinear


# --- nesting -----------------------------------------------------------------------------------


def test_an_inner_block_starts_from_the_outer_one() -> None:
    with quantize_modules(skip=["Conv2d"], custom=[CUSTOM]):
        with quantize_modules(skip=["AvgPool2d"]):
            assert (built(), built(nn.Conv2d), built(nn.AvgPool2d)) == (
                MyQuantLinear,
                nn.Conv2d,
                nn.AvgPool2d,
            )
        with quantize_modules(custom=[("torch.nn", "Conv2d", MyQuantConv)]):
            assert (built(), built(nn.Conv2d)) == (MyQuantLinear, MyQuantConv)
        with quantize_modules(include=["Conv2d"]):
            assert built(nn.Conv2d) is QuantConv2d
        with quantize_modules(skip=["Linear"]):  # what is custom outside is part of what is inherited
            assert built() is Linear
        assert (built(), built(nn.Conv2d)) == (MyQuantLinear, nn.Conv2d)


def test_an_inner_block_inherits_the_recipe_or_has_its_own() -> None:
    def bits() -> int:
        return nn.Linear(2, 2).weight_quantizer.descriptor.num_bits

    with quantize_modules(recipe="int4"):
        with quantize_modules():
            assert bits() == 4
        with quantize_modules(recipe="int8"):
            assert bits() == 8
        with keep_float(), quantize_modules():
            assert bits() == 4
        assert bits() == 4


def test_an_unknown_recipe_suggests_what_comes_near() -> None:
    with (
        pytest.raises(UnknownNameError, match="unknown recipe 'int88'. Did you mean 'int8'"),
        quantize_modules(recipe="int88"),
    ):
        pass


def test_keep_float_replaces_nothing_and_a_block_inside_starts_again() -> None:
    with quantize_modules(skip=["Conv2d"]):
        with keep_float() as scope:
            assert built() is Linear
            with quantize_modules():
                assert (built(), built(nn.Conv2d)) == (QuantLinear, nn.Conv2d)
        assert built() is QuantLinear
    assert [(line.target, line.reason, line.count) for line in scope.skipped] == [
        ("torch.nn.Linear", "keep_float()", 1)
    ]
    assert scope.replaced == ()
    assert repr(scope) == "keep_float()"
    with keep_float(), quantize_modules():
        assert built() is QuantLinear


def test_plugins_narrow_a_block_and_a_named_one_joins_inside(plugin) -> None:
    name = plugin("other", entries=[("torch.nn", "Linear", OtherLinear)])
    assert opened(plugins=[]) is QuantLinear
    assert opened(plugins=[name]) is opened(plugins=name) is OtherLinear
    with quantize_modules(plugins=[]):
        with quantize_modules():
            assert built() is QuantLinear
        with quantize_modules(plugins=["other"]):
            assert built() is OtherLinear
    with quantize_modules(), quantize_modules(plugins=[]):
        assert built() is QuantLinear
    with quantize_modules(skip=["Linear"]):
        with quantize_modules(plugins=["other"]):  # what is skipped outside stays so
            assert built() is Linear
        with quantize_modules(plugins=[]):
            assert built() is Linear
    with quantize_modules(custom=[CUSTOM]), quantize_modules(plugins=["other"]):
        assert built() is MyQuantLinear
    with (
        pytest.raises(UnknownNameError, match="unknown plugin 'othr'. Did you mean 'other'"),
        quantize_modules(plugins=["othr"]),
    ):
        pass


def test_two_plugins_for_one_target_conflict_with_three_ways_out(plugin, monkeypatch) -> None:
    plugin("one", entries=[("torch.nn", "Linear", OtherLinear)])
    plugin("two", entries=[("torch.nn.modules.linear", "Linear", MyQuantLinear)])
    with (
        pytest.raises(EntryConflictError, match="skip=.*custom=.*QUANTPATCH_BLOCK=") as caught,
        quantize_modules(),
    ):
        pass
    assert caught.value.plugins == ("one", "two")
    assert [entry.replacement for entry in caught.value.entries] == [OtherLinear, MyQuantLinear]
    assert built() is Linear
    assert opened(skip=["Linear"]) is Linear
    assert opened(custom=[("torch.nn", "Linear", QuantLinear)]) is QuantLinear
    assert opened(plugins=["one"]) is OtherLinear
    monkeypatch.setenv("QUANTPATCH_BLOCK", "one")
    assert opened() is MyQuantLinear


# --- use ---------------------------------------------------------------------------------------


def test_a_decorated_function_runs_in_a_fresh_block_each_time() -> None:
    scope = quantize_modules(custom=[CUSTOM])

    @scope
    def build(depth: int) -> list[type]:
        """Builds."""
        return [built()] + (build(depth - 1) if depth else [])

    assert build(2) == [MyQuantLinear] * 3
    assert built() is Linear
    assert (build.__name__, build.__doc__) == ("build", "Builds.")
    assert scope.replaced == ()  # each call has a scope of its own

    @keep_float()
    def build_float() -> type:
        return built()

    with quantize_modules():
        assert build_float() is Linear


def test_a_decorated_coroutine_function_runs_in_a_block() -> None:
    @quantize_modules()
    async def build() -> type:
        await asyncio.sleep(0)
        return built()

    class Builder:
        async def __call__(self) -> type:
            await asyncio.sleep(0)
            return built()

    @quantize_modules()
    @functools.wraps(build)
    def wrapped():
        with keep_float():
            return build.__wrapped__()

    assert inspect.iscoroutinefunction(build)
    assert asyncio.run(build()) is QuantLinear
    assert asyncio.run(wrapped()) is QuantLinear
    assert asyncio.run(quantize_modules()(Builder())()) is QuantLinear


def test_generator_functions_and_classes_are_refused_with_the_reason() -> None:
    def generator():
        yield

    async def async_generator():
        yield

    class WithGenerator:
        def __call__(self):
            yield

    for function in (generator, async_generator, WithGenerator()):
        with pytest.raises(BlockError, match="generator function .*with-block inside it"):
            quantize_modules()(function)
    with pytest.raises(BlockError, match="cannot decorate the class .*Mine"):

        @quantize_modules()
        class Mine:
            pass

    with pytest.raises(ArgumentTypeError, match="decorates functions, not 3"):
        quantize_modules()(3)
    with pytest.raises(ArgumentTypeError, match="with parentheses"):
        quantize_modules(built)


def test_start_and_stop_concern_the_whole_process() -> None:
    scope = quantize_modules()
    seen: list[type] = []
    assert scope.start() is scope
    try:
        thread = threading.Thread(target=lambda: seen.append(built()))
        thread.start()
        thread.join()
        assert built() is QuantLinear
        with keep_float():
            assert built() is Linear
        with quantize_modules(custom=[CUSTOM]):
            assert built() is MyQuantLinear
        with pytest.raises(BlockError, match="called twice"):
            scope.start()
    finally:
        scope.stop()
    assert seen == [QuantLinear]
    assert built() is Linear
    scope.start()
    scope.stop()


def test_an_unbalanced_stop_or_exit_is_an_error_and_ends_nobody_elses_block() -> None:
    scope = quantize_modules()
    with pytest.raises(BlockError, match="without start"):
        scope.stop()
    with pytest.raises(BlockError, match="without having been entered"):
        scope.__exit__(None, None, None)
    with scope, pytest.raises(BlockError, match="without start"):
        scope.stop()
    scope.start()
    with pytest.raises(BlockError, match="without having been entered"):
        scope.__exit__(None, None, None)
    assert built() is QuantLinear
    scope.stop()
    assert built() is Linear


def test_started_blocks_may_stop_in_any_order() -> None:
    first, second = quantize_modules(custom=[CUSTOM]), quantize_modules(skip=["Linear"])
    first.start()
    second.start()
    assert built() is Linear
    first.stop()
    assert built() is Linear
    second.stop()
    assert built() is Linear


def test_the_same_object_can_be_entered_again_and_inside_itself() -> None:
    scope = quantize_modules()
    for _ in range(2):
        with scope:
            with scope:
                assert built() is QuantLinear
            assert built() is QuantLinear
        assert built() is Linear
    assert [line.count for line in scope.replaced] == [4]


@pytest.mark.filterwarnings("error")
def test_the_bodys_exception_is_never_masked() -> None:
    with pytest.raises(KeyError, match="mine"), quantize_modules():
        nn.Linear.__init__ = nn.Linear.__init__  # puts its own over the hook; would warn
        raise KeyError("mine")
    assert built() is Linear


def test_a_displaced_hook_warns() -> None:
    original = vars(Linear)["__init__"]
    for leave in (lambda s: s.__exit__(None, None, None), lambda s: s.stop()):
        scope = quantize_modules()
        (
            scope.stop
            if False
            else scope.__enter__
            if leave.__code__.co_names == ("__exit__",)
            else scope.start
        )()
        Linear.__init__ = original
        with pytest.warns(QuantPatchWarning, match="replaced the __init__ of torch.nn.Linear for good"):
            leave(scope)
        assert vars(Linear)["__init__"] is original


# --- contexts ----------------------------------------------------------------------------------


def test_another_thread_builds_float_at_the_same_moment() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[type] = []

    def other() -> None:
        inside.wait(5)
        seen.append(built())
        with quantize_modules(custom=[CUSTOM]):
            seen.append(built())
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with quantize_modules():
        inside.set()
        done.wait(5)
        assert built() is QuantLinear
    thread.join()
    assert seen == [Linear, MyQuantLinear]


def test_many_threads_open_and_close_at_once() -> None:
    scope = quantize_modules()
    wrong: list[object] = []

    def work(which: int) -> None:
        try:
            for _ in range(30):
                with scope if which % 2 else quantize_modules(custom=[CUSTOM]):
                    if built() is not (QuantLinear if which % 2 else MyQuantLinear):
                        wrong.append("inside")
                if built() is not Linear:
                    wrong.append("outside")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert [line.count for line in scope.replaced] == [90]


def test_a_task_outside_the_block_builds_float_and_one_inside_ends_with_it() -> None:
    async def main() -> list[type]:
        go, ended = asyncio.Event(), asyncio.Event()
        seen = []

        async def child() -> None:
            seen.append(built())
            go.set()
            await ended.wait()
            seen.append(built())

        with quantize_modules():
            task = asyncio.create_task(child())
            await go.wait()
            seen.append(built())
        ended.set()
        await task

        async def inside() -> None:
            with quantize_modules():
                await asyncio.sleep(0.01)
                seen.append(built())

        task = asyncio.create_task(inside())
        await asyncio.sleep(0)
        seen.append(built())
        await task
        return seen

    assert asyncio.run(main()) == [QuantLinear, QuantLinear, Linear, Linear, QuantLinear]


def test_generators_may_leave_their_blocks_out_of_order() -> None:
    def block(scope):
        with scope:
            yield built()

    first, second = block(quantize_modules()), block(quantize_modules(custom=[CUSTOM]))
    assert (next(first), next(second)) == (QuantLinear, MyQuantLinear)
    first.close()
    assert built() is MyQuantLinear
    second.close()
    assert built() is Linear


def test_a_generator_may_be_closed_in_another_thread_or_by_the_collector() -> None:
    def block():
        with quantize_modules():
            yield

    generator = block()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert built() is Linear
    generator = block()
    next(generator)
    del generator
    gc.collect()
    assert built() is Linear


def test_async_generators_may_be_closed_in_another_task() -> None:
    async def block():
        with quantize_modules():
            yield built()

    async def main() -> None:
        generator = block()
        assert await anext(generator) is QuantLinear
        await asyncio.create_task(generator.aclose())
        assert built() is Linear

    asyncio.run(main())


def test_fork_while_another_thread_holds_the_lock() -> None:
    code = """
import os, threading, time, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forking with threads
import quantpatch as qp
from quantpatch.interception.slots import lock
from torch import nn
held = threading.Event()
def hold():
    with lock:
        held.set()
        time.sleep(0.3)
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
with qp.quantize_modules():
    assert isinstance(nn.Linear(2, 2), qp.QuantizedLayer)
assert not isinstance(nn.Linear(2, 2), qp.QuantizedLayer)
if child == 0:
    os._exit(0)
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- other people's patches --------------------------------------------------------------------


def patched(order: str) -> list[type]:
    """What comes out after each step: ( ) open and close a block, [ ] start and stop another's patch."""
    real = Linear.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)

    patch, scope = mock.patch.object(Linear, "__init__", init), quantize_modules()
    steps = {
        "(": scope.__enter__,
        ")": lambda: scope.__exit__(None, None, None),
        "[": patch.start,
        "]": patch.stop,
    }
    out = []
    for step in order:
        if step == "[":
            real = vars(Linear)["__init__"]
        steps[step]()
        out.append(built())
    return out


@pytest.mark.parametrize(
    ("order", "quantized"),
    [("([])", "111"), ("[()]", "010"), ("[(])", None), ("([)]", "110"), ("[]()", "001"), ("()[]", "100")],
)
def test_mock_patches_the_same_init_in_every_order(order, quantized) -> None:
    before = vars(Linear)["__init__"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantPatchWarning)
        out = patched(order)
        with quantize_modules():
            assert built() is QuantLinear
    assert out[-1] is Linear
    assert vars(Linear)["__init__"] is before
    if quantized:
        assert [cls is QuantLinear for cls in out[:3]] == [bit == "1" for bit in quantized]


def test_an_init_that_is_not_a_function_is_called_as_python_would() -> None:
    init = mock.MagicMock(return_value=None)
    with mock.patch.object(Linear, "__init__", init), quantize_modules(skip=["Linear"]):
        Linear(3, bias=False)
    init.assert_called_once_with(3, bias=False)


# --- recursion ---------------------------------------------------------------------------------


class BuildsItsTarget(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inner = nn.Linear(1, 1)


class Tree(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.child = Tree(depth - 1) if depth else None


class QuantTree(Tree):
    pass


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)


class QuantPair(nn.Module):  # shares no more than nn.Module with its target, and wraps one
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()


def test_a_replacement_that_builds_its_target_gets_a_float_one() -> None:
    with quantize_modules(custom=[("torch.nn", "Linear", BuildsItsTarget)]):
        layer = nn.Linear(2, 2)
        assert type(layer) is BuildsItsTarget
        assert type(layer.inner) is Linear
        assert built() is BuildsItsTarget


def test_what_the_base_builds_is_replaced() -> None:
    with quantize_modules(custom=[(sys.modules[HERE], "Tree", QuantTree)]):
        tree = Tree(2)
    assert [type(m) for m in tree.modules() if isinstance(m, Tree)] == [QuantTree] * 3
    assert {type(m) for m in tree.modules() if isinstance(m, nn.Linear)} == {QuantLinear}


def test_a_replacement_that_wraps_its_target() -> None:
    with quantize_modules(custom=[(sys.modules[HERE], "Pair", QuantPair)]):
        layer = Pair()
    assert type(layer) is QuantPair
    assert type(layer.pair) is Pair
    assert type(layer.pair.linear) is QuantLinear


# --- functions ---------------------------------------------------------------------------------


def doubled(*args, **kwargs):
    return 2 * torch.nn.functional.relu(*args, **kwargs)


def test_a_function_is_replaced_by_a_dispatcher_and_given_back() -> None:
    original = nn.functional.relu
    x = torch.ones(1)
    with quantize_modules(custom=[(nn.functional, "relu", doubled)]) as scope:
        assert nn.functional.relu is not original
        assert inspect.signature(nn.functional.relu) == inspect.signature(original)
        assert nn.functional.relu(x).item() == 2  # the call of the original inside does not recurse
        seen = []
        thread = threading.Thread(target=lambda: seen.append(nn.functional.relu(x).item()))
        thread.start()
        thread.join()
        with quantize_modules(), keep_float():
            assert nn.functional.relu(x).item() == 1
    assert seen == [1]
    assert nn.functional.relu is original
    assert [(line.target, line.replacement, line.count) for line in scope.replaced] == [
        ("torch.nn.functional.relu", f"{HERE}.doubled", 1)
    ]


def test_a_function_of_a_module_that_makes_its_names_on_demand(package) -> None:
    name = package(__init__="def __getattr__(name): return {'f': real}[name]\ndef real(): return 1\n")
    module = __import__(name)
    with quantize_modules(custom=[(module, "f", lambda: 2)]):
        assert module.f() == 2
    assert "f" not in vars(module)
    assert module.f() == 1


# --- targets that are imported later -----------------------------------------------------------

LAYERS = "from torch import nn\nclass Mine(nn.Linear):\n    pass\nclass QuantMine(Mine):\n    pass\n"


def imported(name: str) -> SimpleNamespace:
    __import__(name)
    return sys.modules[name]


def test_a_target_that_is_not_imported_costs_no_import_and_is_replaced_once_it_is(package) -> None:
    name = package(layers=LAYERS)
    target = f"{name}.layers"
    meta_path = list(sys.meta_path)
    with quantize_modules(custom=[(target, "Mine", f"{target}:QuantMine")]) as scope:
        assert name not in sys.modules
        assert len(sys.meta_path) == len(meta_path) + 1
        module = imported(target)
        assert type(module.Mine(2, 2)) is module.QuantMine
        with quantize_modules():
            assert type(module.Mine(2, 2)) is module.QuantMine
        assert module.__loader__ is module.__spec__.loader
        assert type(module.__loader__).__module__.startswith(("importlib", "_frozen", "_pytest"))
    assert sys.meta_path == meta_path
    assert type(module.Mine(2, 2)) is module.Mine
    assert "__init__" not in vars(module.Mine)
    assert [(line.target, line.count) for line in scope.replaced] == [(f"{target}.Mine", 1)]


def test_a_target_that_is_never_imported_leaves_no_trace(package) -> None:
    target = f"{package(layers=LAYERS)}.layers"
    with quantize_modules(custom=[(target, "Mine", f"{target}:QuantMine")]):
        pass
    assert target not in sys.modules
    assert type(imported(target).Mine(2, 2)).__name__ == "Mine"


def test_a_target_imported_in_an_inner_block_is_replaced_in_the_outer_one_too(package) -> None:
    target = f"{package(layers=LAYERS)}.layers"
    with quantize_modules(custom=[(target, "Mine", f"{target}:QuantMine")]):
        with quantize_modules(), keep_float():
            assert type(imported(target).Mine(2, 2)).__name__ == "Mine"
        assert type(imported(target).Mine(2, 2)).__name__ == "QuantMine"
    assert type(imported(target).Mine(2, 2)).__name__ == "Mine"


def test_a_late_module_without_the_name_warns_and_imports(package) -> None:
    target = f"{package(layers=LAYERS)}.layers"
    with quantize_modules(custom=[(target, "Mien", f"{target}:QuantMine")]):
        with pytest.warns(
            QuantPatchWarning, match="has no 'Mien'. Did you mean 'Mine'.*nothing was replaced"
        ):
            module = imported(target)
        assert type(module.Mine(2, 2)) is module.Mine


def test_a_late_module_may_lack_an_optional_target(package) -> None:
    target = f"{package(layers=LAYERS)}.layers"
    entries = [
        qp.Entry(target, "Mien", f"{target}:QuantMine", optional=True),
        qp.Entry(target, "Mine", f"{target}:QuantMine", optional=True),
    ]
    with quantize_modules(custom=entries):
        assert type(imported(target).Mine(2, 2)).__name__ == "QuantMine"


def test_a_late_replacement_that_does_not_fit_is_an_error_where_it_is_built(package) -> None:
    target = f"{package(layers=LAYERS)}.layers"
    with quantize_modules(custom=[(target, "Mine", f"{target}:Nothing")]):
        module = imported(target)
        with pytest.raises(EntryError, match="does not exist"):
            module.Mine(2, 2)
    assert type(module.Mine(2, 2)) is module.Mine


def test_two_late_names_of_one_class(package, plugin) -> None:
    name = package(layers=LAYERS, names="from .layers import Mine\n")
    plugin("one", entries=[(f"{name}.layers", "Mine", f"{name}.layers:QuantMine")])
    plugin("two", entries=[(f"{name}.names", "Mine", f"{name}.layers:QuantMine")])
    with quantize_modules():
        with pytest.warns(QuantPatchWarning, match="is replaced by plugin '(one|two)'; the entry of plugin"):
            module = imported(f"{name}.names")
        assert type(module.Mine(1, 1)).__name__ == "QuantMine"
        with quantize_modules():
            assert type(module.Mine(1, 1)).__name__ == "QuantMine"
    with pytest.raises(EntryConflictError), quantize_modules():
        pass


def test_a_module_that_fails_to_import_fails_as_it_would_have(package) -> None:
    target = f"{package(layers='raise OSError(3)')}.layers"
    with (
        quantize_modules(custom=[(target, "Mine", f"{target}:QuantMine")]),
        pytest.raises(OSError, match="3"),
    ):
        imported(target)
    assert target not in sys.modules


# --- what came out -----------------------------------------------------------------------------


def test_replaced_and_skipped_say_what_came_out(plugin) -> None:
    plugin("mine", entries=[("torch.nn", "Conv2d", MyQuantConv)])

    class Sub(nn.Conv2d):
        pass

    with quantize_modules(skip=["AvgPool2d"]) as scope:
        for cls in (nn.Linear, nn.Linear, nn.Conv2d, nn.AvgPool2d):
            built(cls)
        Sub(1, 1, 1)
        Sub(1, 1, 1)
        MyQuantConv(1, 1, 1)  # quantized already: not to be told of
    assert [(r.target, r.replacement, r.plugin, r.count) for r in scope.replaced] == [
        ("torch.nn.Linear", "quantpatch.layers.linear.QuantLinear", "quantpatch.builtin", 2),
        ("torch.nn.Conv2d", f"{HERE}.MyQuantConv", "mine", 1),
    ]
    assert [(s.target.rpartition(".")[2], s.reason, s.count) for s in scope.skipped] == [
        ("AvgPool2d", "skip='AvgPool2d'", 1),
        (
            "Sub",
            "a subclass of torch.nn.Conv2d whose replacement is not a QuantizedLayer of it, for which there "
            "is no entry",
            2,
        ),
    ]


def test_a_class_that_takes_another_ones_name_between_blocks_is_seen(package) -> None:
    module = __import__(package(__init__=LAYERS))
    entry = (module.__name__, "Mine", f"{module.__name__}:QuantMine")
    with quantize_modules(custom=[entry]):
        assert type(module.Mine(1, 1)) is module.QuantMine
    module.QuantMine = module.Mine
    with pytest.raises(EntryError, match="the target itself"), quantize_modules(custom=[entry]):
        pass


def test_the_repr_shows_what_was_given() -> None:
    assert repr(quantize_modules()) == "quantize_modules()"
    assert (
        repr(quantize_modules(skip=["Linear"], recipe="int4"))
        == "quantize_modules(recipe='int4', skip=('Linear',))"
    )


def test_a_quantized_layer_built_by_name_is_reported_as_such() -> None:
    with quantize_modules() as scope:
        assert isinstance(QuantLinear(2, 2), QuantizedLayer)
    assert scope.skipped == ()
