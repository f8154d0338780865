"""Which entry wins; the rules themselves are in test_scope.py."""

from __future__ import annotations

import pytest
from torch import nn

from quantpatch.errors import ArgumentTypeError, EntryConflictError
from quantpatch.interception.hooks import Slot
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose, load_all, outermost
from quantpatch.quantize.reasons import Conflict, NotByDefault, SkippedBy


class One(nn.Linear):
    """A replacement."""


def offer(name: str = "Linear", plugin: str | None = BUILTIN, module: str = "torch.nn", **more) -> Entry:
    return Entry(module, name, One, plugin=plugin, **more)


def test_two_names_of_one_class_are_one_target() -> None:
    table = compose([offer(), offer(plugin="p", module="torch.nn.modules.linear")])
    assert list(table) == [Slot.of(nn, "Linear")]
    assert table[Slot.of(nn, "Linear")].entry.plugin == "p"


def test_targets_that_are_not_imported_are_known_by_name() -> None:
    table = compose([offer("X", module="far.away")], skip=["far.*"])
    assert table["far.away.X"].reason == SkippedBy("far.*")
    rivals = (offer("X", "p", "far.away"), offer("X", "q", "far.away"))
    table = compose(rivals)
    assert table["far.away.X"].reason == Conflict(rivals)
    with pytest.raises(EntryConflictError):
        load_all(table)


def test_a_plugins_entry_may_wait_to_be_asked_for() -> None:
    slow = offer("ReLU", "p", default=False)
    (decision,) = compose([slow]).values()
    assert decision.reason == NotByDefault(("ReLU",))
    (decision,) = compose([slow], include=["ReLU"]).values()
    assert decision.reason is None


def test_the_table_of_a_bare_block_is_remembered() -> None:
    first = outermost(registry.entries(), None, (), (), False)
    assert outermost(registry.entries(), None, (), (), False) is first
    assert outermost(registry.entries(), None, ("Linear",), (), False) is not first


def test_it_is_made_anew_when_a_name_means_another_class(monkeypatch) -> None:
    first = outermost(registry.entries(), None, (), (), False)

    class Linear(nn.Linear):
        pass

    monkeypatch.setattr(nn, "Linear", Linear)
    with pytest.raises(Exception, match="the replacement cannot take the target's place|cannot become"):
        outermost((offer(), Entry("torch.nn", "Linear", Linear, plugin="p")), None, (), (), False)
    monkeypatch.undo()
    assert outermost(registry.entries(), None, (), (), False) is first


def test_patterns_that_cannot_be_hashed_are_named() -> None:
    with pytest.raises(ArgumentTypeError, match="skip takes"):
        outermost(registry.entries(), None, (["Linear"],), (), False)  # type: ignore[arg-type]


def test_an_optional_target_may_be_missing_from_its_module() -> None:
    assert not any(isinstance(key, Slot) for key in compose([offer("Liner", "p", optional=True)]))
    assert list(compose([offer("Linear", "p", optional=True)])) == [Slot.of(nn, "Linear")]
