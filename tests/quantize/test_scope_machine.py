"""Blocks opened and closed in any order, everywhere at once, while other code patches the same classes.

A plain model says for each context what a layer must come out as; at the end PyTorch must be what it
would have been had there been no block.
"""

from __future__ import annotations

import contextvars
import threading
import warnings
from typing import Any

import attrs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from quantpatch import keep_float, quantize_modules
from quantpatch.interception.hooks import Slot
from quantpatch.layers import QuantizedLayer
from quantpatch.layers.linear import QuantLinear
from quantpatch.layers.pooling import QuantAdaptiveAvgPool2d

Linear, Pool = nn.Linear, nn.AdaptiveAvgPool2d  # Pool has no __init__ of its own
ABSENT = object()


class MyQuantLinear(nn.Linear):
    """The custom replacement."""


@attrs.define(eq=False)
class Node:
    """The model of an activation."""

    kind: str
    scope: Any
    table: type | None  # what Linear becomes by the table; None: there is no table yet
    parent: Node | None
    closed: bool = False

    def out(self) -> tuple[type, type]:
        if self.kind == "keep_float":
            return Linear, Pool
        return self.table or QuantLinear, QuantAdaptiveAvgPool2d


@attrs.define(eq=False)
class Place:
    """A context, and the model of what it holds."""

    context: contextvars.Context
    top: Node | None = None

    def innermost(self) -> Node | None:
        node = self.top
        while node is not None and node.closed:
            node = node.parent
        return node

    def run(self, function: Any, *args: Any, thread: bool = False) -> Any:
        if not thread:
            return self.context.run(function, *args)
        result: list[Any] = []
        worker = threading.Thread(target=lambda: result.append(self.context.run(function, *args)))
        worker.start()
        worker.join()
        return result[0]


@attrs.define(eq=False)
class Patch:
    """Somebody else's wrapper around a class's __init__, in the manner of unittest.mock."""

    cls: type
    saved: Any = ABSENT
    would_have_saved: Any = ABSENT
    wrapper: Any = None

    def start(self) -> None:
        self.saved = vars(self.cls).get("__init__", ABSENT)
        cls, saved = self.cls, self.saved

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if saved is ABSENT:
                super(cls, self).__init__(*args, **kwargs)
            else:
                saved(self, *args, **kwargs)

        self.wrapper = __init__
        cls.__init__ = __init__

    def stop(self) -> None:
        if self.saved is not ABSENT:
            self.cls.__init__ = self.saved
        elif "__init__" in vars(self.cls):
            del self.cls.__init__


def held(scope: Any) -> Any:
    with scope:
        yield


def quietly(function: Any, *args: Any) -> Any:
    """Calls without the warnings of hooks that were displaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


WHICH = st.integers(0, 5)
HOW = st.sampled_from(["block", "thread", "generator"])


class Scopes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.before = {cls: (list(vars(cls)), vars(cls).get("__init__", ABSENT)) for cls in (Linear, Pool)}
        self.theirs = {cls: init for cls, (_, init) in self.before.items()}  # had there been no blocks
        self.hooked = {Linear: False, Pool: False}
        self.places = [Place(contextvars.Context()), Place(contextvars.Context())]
        self.scopes = [
            ("plain", quantize_modules()),
            ("skip", quantize_modules(skip=["Linear"])),
            ("custom", quantize_modules(custom=[(nn, "Linear", MyQuantLinear)])),
            ("keep_float", keep_float()),
        ]
        self.nodes: list[Node] = []  # open, in the order of opening
        self.started: list[Node] = []
        self.running: list[Patch] = []
        self.entered: list[tuple[Any, Any, Node]] = []  # with the generators that hold some of them

    # --- the model -----------------------------------------------------------------------------

    def around(self, place: Place) -> Node | None:
        return place.innermost() or (self.started[-1] if self.started else None)

    def new_node(self, place: Place, kind: str, scope: Any) -> Node:
        around = self.around(place)
        table = None if around is None else around.table
        if kind == "skip":
            table = Linear
        elif kind == "custom":
            table = MyQuantLinear
        elif kind == "plain":
            table = table or QuantLinear
        self.nodes.append(node := Node(kind, scope, table, place.innermost()))
        if table is not None:  # a keep_float with nothing around it watches nothing
            self.hooked = dict.fromkeys(self.hooked, True)
        return node

    def node_left(self, place: Place, scope: Any) -> Node:
        """The innermost one of the scope here, or else the one opened last anywhere, by no with statement."""
        called = [node for _, generator, node in self.entered if generator is None and node.scope is scope]
        node = place.innermost()
        while node is not None and (node.closed or node not in called):
            node = node.parent
        return node or next(n for n in reversed(self.nodes) if n in called)

    def end(self, node: Node) -> None:
        node.closed = True
        self.nodes.remove(node)

    # --- places and scopes ---------------------------------------------------------------------

    @rule(of=WHICH)
    def new_task(self, of: int) -> None:
        if len(self.places) < 6:
            parent = self.places[of % len(self.places)]
            self.places.append(Place(parent.run(contextvars.copy_context), parent.top))

    def place(self, which: int) -> Place:
        return self.places[which % len(self.places)]

    @rule(which=WHICH, where=WHICH, how=HOW)
    def enter(self, which: int, where: int, how: str) -> None:
        kind, scope = self.scopes[which % len(self.scopes)]
        place, generator = self.place(where), held(scope) if how == "generator" else None
        place.run(*((next, generator) if generator else (scope.__enter__,)), thread=how == "thread")
        place.top = self.new_node(place, kind, scope)
        self.entered.append((scope, generator, place.top))

    @precondition(lambda self: self.entered)
    @rule(which=WHICH, where=WHICH, thread=st.booleans(), raising=st.booleans())
    def leave(self, which: int, where: int, thread: bool, raising: bool) -> None:
        """Here or elsewhere, with or without an exception."""
        scope, generator, node = self.entered[which % len(self.entered)]
        place = self.place(where)
        node = node if generator else self.node_left(place, scope)
        self.entered.remove(next(entered for entered in self.entered if entered[2] is node))
        self.end(node)
        error = (KeyError, KeyError("mine"), None) if raising else (None, None, None)
        leave = (generator.close,) if generator else (scope.__exit__, *error)
        assert not place.run(quietly, *leave, thread=thread)

    @rule(which=WHICH, where=WHICH)
    def start(self, which: int, where: int) -> None:
        kind, scope = self.scopes[which % len(self.scopes)]
        if not any(node.scope is scope for node in self.started):
            place = self.place(where)
            place.run(scope.start)
            self.started.append(self.new_node(place, kind, scope))

    @precondition(lambda self: self.started)
    @rule(which=WHICH, where=WHICH, thread=st.booleans())
    def stop(self, which: int, where: int, thread: bool) -> None:
        node = self.started.pop(which % len(self.started))
        self.end(node)
        self.place(where).run(quietly, node.scope.stop, thread=thread)

    # --- other code ----------------------------------------------------------------------------

    @rule(cls=st.sampled_from([Linear, Linear, Pool]))
    def patch(self, cls: type) -> None:
        patch = Patch(cls, would_have_saved=self.theirs[cls])
        patch.start()
        self.theirs[cls] = patch.wrapper
        self.running.append(patch)

    @precondition(lambda self: self.running)
    @rule(which=WHICH)
    def unpatch(self, which: int) -> None:
        patch = self.running.pop(which % len(self.running))
        patch.stop()
        self.theirs[patch.cls] = patch.would_have_saved
        self.hooked[patch.cls] = self._has_hook(patch.cls)

    def _has_hook(self, cls: type) -> bool:
        """Whether other code, in writing back what it found, has left a hook of ours within reach."""
        value = vars(cls).get("__init__", ABSENT)
        while value is not ABSENT and value.__code__.co_filename == __file__:
            value = dict(zip(value.__code__.co_freevars, value.__closure__, strict=True))[
                "saved"
            ].cell_contents
        return value is not self.before[cls][1]

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def layers_come_out_as_the_model_says(self) -> None:
        for place in self.places:
            node = self.around(place)
            expected = (Linear, Pool) if node is None else node.out()
            for cls, arguments, wanted in zip((Linear, Pool), ((1, 1), (1,)), expected, strict=True):
                out = type(place.run(cls, *arguments))
                # Past a hook that is lost come only the layers that can be converted when they are built.
                reached = self.hooked[cls] or issubclass(wanted, QuantizedLayer)
                assert out is (wanted if reached else cls), (cls, out, wanted, self.hooked)

    def teardown(self) -> None:
        while self.entered:
            self.leave(0, 0, False, False)
        while self.started:
            self.stop(0, 0, False)
        while self.running:
            self.unpatch(len(self.running) - 1)
        with quantize_modules():  # takes out what came up again after the last block was closed
            pass
        for cls, (keys, init) in self.before.items():
            assert vars(cls).get("__init__", ABSENT) is self.theirs[cls]
            if init is ABSENT and "__init__" in vars(cls):
                del cls.__init__
            elif init is not ABSENT:
                cls.__init__ = init
            assert list(vars(cls)) == keys
            assert not Slot.of(nn, cls.__name__).users
        assert type(Linear(1, 1)) is Linear


TestScopes = Scopes.TestCase
TestScopes.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
