"""Hooks: put in, counted, taken out, and never in the way of other code's."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest

from quantpatch.interception.block import Block, current
from quantpatch.interception.hooks import Slot


class ByTable(Block):
    """Replaces by slot."""

    def __init__(self, replacements):
        super().__init__()
        self.replacements = replacements

    def replacement_for(self, slot):
        return self.replacements.get(slot)


@pytest.fixture
def code():
    """A module with a class that has an __init__, one that inherits it, and a function."""
    module = ModuleType("code_of_others")
    source = """
class Target:
    first = 1
    def __init__(self, x=0):
        self.x = x
    last = 2
class Heir(Target):
    pass
class Quick(Target):
    pass
class QuickHeir(Heir):
    pass
def function(x):
    "Doc."
    return x
"""
    exec(source, vars(module))
    before = [(owner, dict(vars(owner))) for owner in (module, module.Target, module.Heir)]
    yield module
    Slot.sweep()
    for owner, was in before:
        assert list(vars(owner)) == list(was)
        assert all(vars(owner)[key] is value for key, value in was.items())


def opening(module, **replacements) -> Block:
    table = {Slot.of(module, name): value for name, value in replacements.items()}
    block = ByTable(table)
    block.open(table)
    return block


def wrap(cls):
    """Another's patch; returns what undoes it."""
    saved = vars(cls)["__init__"]

    def __init__(self, *args, **kwargs):
        saved(self, *args, **kwargs)

    cls.__init__ = __init__
    return lambda: setattr(cls, "__init__", saved)


def test_an_activation_decides_only_while_it_is_in_force(code) -> None:
    block = opening(code, Target=code.Quick)
    assert type(code.Target()) is code.Target
    block.enter()
    assert current() is block
    made = code.Target(x=3)
    assert (type(made), made.x) == (code.Quick, 3)
    assert type(code.Heir()) is code.Heir
    assert block.close() == []
    assert block.close() == []
    assert current() is None
    assert type(code.Target()) is code.Target


def test_a_class_without_an_init_of_its_own(code) -> None:
    block = opening(code, Heir=code.QuickHeir, Target=code.Quick)
    block.enter()
    assert (type(code.Heir(1)), type(code.Target(1)), code.Heir(x=4).x) == (code.QuickHeir, code.Quick, 4)
    block.close()
    assert "__init__" not in vars(code.Heir)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_hooks_stay_until_the_last_one_leaves_in_any_order(code, order) -> None:
    original = vars(code.Target)["__init__"]
    blocks = [opening(code, Target=code.Quick) for _ in range(3)]
    for which in order:
        assert vars(code.Target)["__init__"] is not original
        blocks[which].close()
    assert vars(code.Target)["__init__"] is original


@pytest.mark.parametrize("steps", sorted(set(itertools.permutations("((pp))uu")))[::97])
def test_wrapped_hooks_are_taken_out_once_they_are_on_top_again(code, steps) -> None:
    """( opens, ) closes, p patches, u undoes the last patch; what cannot be done is left out."""
    opened, undo = [], []
    for step in steps:
        if step == "(":
            opened.append(opening(code, Target=code.Quick))
        elif step == ")" and opened:
            opened.pop(0).close()
        elif step == "p":
            undo.append(wrap(code.Target))
        elif step == "u" and undo:
            undo.pop()()
        assert code.Target(5).x == 5
    for block in opened:
        block.close()
    while undo:
        undo.pop()()


def test_a_hook_that_comes_up_from_below_another_one(code) -> None:
    first = opening(code, Target=code.Quick)
    undo = wrap(code.Target)
    second = opening(code, Target=code.Quick)  # a second hook, above the other's patch
    undo()
    second.close()
    first.close()


def test_a_hook_that_nobody_can_write_back_is_forgotten(code) -> None:
    original = vars(code.Target)["__init__"]
    hooks = []
    for _ in range(5):
        block = opening(code, Target=code.Quick)
        hooks.append(weakref.ref(vars(code.Target)["__init__"]))
        code.Target.__init__ = original
        assert block.close() == [Slot.of(code, "Target")]
    gc.collect()
    assert [hook() for hook in hooks] == [None] * 5


def test_a_slot_is_one_object_while_it_is_used_and_goes_with_its_last_user(code) -> None:
    slot = Slot.of(code, "Target")
    assert Slot.of(SimpleNamespace(Other=code.Target), "Other") is slot
    gone = weakref.ref(slot)
    del slot
    gc.collect()
    assert gone() is None


def test_a_function(code) -> None:
    original = code.function
    block = opening(code, function=lambda x: code.function(x) + 1)
    assert code.function(1) == 1
    block.enter()
    assert code.function(1) == 2
    assert (code.function.__doc__, code.function.__name__) == ("Doc.", "function")
    assert Slot.of(code, "function").target is original
    block.close()
    assert code.function is original


def test_started_for_the_whole_process(code) -> None:
    first, second = opening(code, Target=code.Quick), opening(code)
    first.start()
    second.start()
    assert type(code.Target()) is code.Target
    second.close()
    assert type(code.Target()) is code.Quick
    first.close()
    assert current() is None


def test_a_late_slot_is_hooked_unless_the_activation_is_closed(code) -> None:
    slot = Slot.of(code, "Target")
    block = ByTable({slot: code.Quick})
    block.open(())
    block.enter()
    block.add(slot)
    block.add(slot)
    assert type(code.Target()) is code.Quick
    block.close()
    block.add(slot)


def test_what_cannot_be_hooked(code) -> None:
    with pytest.raises(AttributeError):
        Slot.of(code, "nothing")
    with pytest.raises(TypeError, match="neither a class nor a function"):
        Slot.of(sys, "path")
    with pytest.raises(TypeError, match="implemented in C"):
        Slot.of(SimpleNamespace(x=int), "x")


def test_a_failing_replacement_leaves_the_context_as_it_was(code) -> None:
    class Fails(code.Target):
        def __init__(self, *args):
            raise KeyError

    block = opening(code, Target=Fails)
    block.enter()
    for _ in range(2):
        with pytest.raises(KeyError):
            code.Target()
    block.close()
