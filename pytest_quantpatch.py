"""The pytest plugin that comes with quantpatch.

It is a module of its own, beside the package, because pytest imports it in every run of every project:
quantpatch, and torch with it, are imported only where an option or a fixture asks for them.

``--quantpatch-conformance`` makes every check of ``quantpatch.testing`` on every entry of the installed
plugins, one test a check. The fixture ``torch_untouched`` fails a test that leaves a block open or PyTorch
changed; to have it in all tests, write ``usefixtures = ["torch_untouched"]`` under
``[tool.pytest.ini_options]``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quantpatch.interception.block import Block
    from quantpatch.interception.torch_state import Snapshot
    from quantpatch.testing import Trial

_FLAG = "--quantpatch-conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("quantpatch")
    group.addoption(
        _FLAG,
        action="store_true",
        help="try every entry of the installed quantpatch plugins; without paths, nothing else is run",
    )
    group.addoption(
        "--quantpatch-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="try this plugin's entries only (may be given several times)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without paths on the command line the conformance tests are all there is to run."""
    if config.getoption("quantpatch_plugin") and not config.getoption("quantpatch_conformance"):
        raise pytest.UsageError(f"--quantpatch-plugin chooses what {_FLAG} tries; give both")
    if config.getoption("quantpatch_conformance") and config.args_source is not config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Adds a test for each check on each example of each entry."""
    if not config.getoption("quantpatch_conformance"):
        return
    from quantpatch.errors import UnknownNameError
    from quantpatch.testing import trials

    try:
        found = trials(config.getoption("quantpatch_plugin"))
    except UnknownNameError as error:
        raise pytest.UsageError(str(error)) from error
    if not found:
        raise pytest.UsageError(
            "the plugins to try have no entries; `quantpatch plugins` lists what there is"
        )
    group = Conformance.from_parent(session, name="quantpatch", nodeid="quantpatch", trials=found)
    report = config.hook.pytest_make_collect_report(collector=group)
    config.hook.pytest_collectreport(report=report)  # for the count of what was collected
    items.extend(report.result)


class Conformance(pytest.Collector):
    """What the conformance tests hang from."""

    def __init__(self, *, trials: list[Trial], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trials = trials

    def collect(self) -> list[pytest.Item]:
        """A test for each trial."""
        return [ConformanceItem.from_parent(self, name=trial.name, trial=trial) for trial in self.trials]


class ConformanceItem(pytest.Item):
    """One check on one example of an entry."""

    def __init__(self, *, trial: Trial, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trial = trial

    def runtest(self) -> None:
        """Makes the check; one that says nothing about the layer is a skip."""
        from quantpatch.testing import NotApplicable

        try:
            self.trial.run()
        except NotApplicable as reason:
            pytest.skip(f"{self.trial.name}: {reason}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What was seen and what to change, instead of the kit's own traceback."""
        from quantpatch.errors import CheckError
        from quantpatch.testing.subject import Broken

        error = excinfo.value
        if not isinstance(error, CheckError):
            return super().repr_failure(excinfo)
        cause = error.__cause__
        if cause is None or isinstance(cause, Broken):
            return str(error)
        raised = pytest.ExceptionInfo.from_exception(cause)
        return f"{error}\n\n{raised.getrepr(style='short')}"

    def reportinfo(self) -> tuple[Any, None, str]:
        """Where it is from, and its heading in the report of failures."""
        return self.path, None, f"{self.trial.plugin}: {self.trial.target}, {self.trial.check}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remembers which test has left a block open, for ``torch_untouched`` of a later one to name it."""
    result = yield
    if "quantpatch.interception.block" in sys.modules:
        from quantpatch.interception.block import open_here

        known = [block for block, _ in _left_open]
        _left_open.extend(
            (block, item.nodeid) for block in open_here() if block not in known and block not in _of_fixtures
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """What is open before a test's own code runs belongs to its fixtures, and may serve others as well."""
    if "quantpatch.interception.block" in sys.modules:
        from quantpatch.interception.block import open_here

        _of_fixtures[:] = open_here()
    return (yield)


# Blocks that the fixtures of the current test have opened, and those left open with the test that did.
_of_fixtures: list[Block] = []
_left_open: list[tuple[Block, str]] = []

_snapshot: Snapshot | None = None


@pytest.fixture
def torch_untouched() -> Iterator[None]:
    """Fails a test that leaves a block of quantpatch open, or PyTorch other than it found it.

    A block that an earlier test without this fixture has left open is closed before, with a warning that
    names that test.
    """
    from quantpatch.errors import QuantPatchWarning
    from quantpatch.interception.block import open_here
    from quantpatch.interception.torch_state import Snapshot
    from quantpatch.testing.untouched import close_blocks, import_hooks, warm_up

    global _snapshot
    for block, test in _left_open:
        if not block.closed:
            block.close()
            warnings.warn(
                f"{test} left a block open: {block.scope!r}. It was closed",
                QuantPatchWarning,
                stacklevel=2,
            )
    _left_open.clear()
    before = open_here()
    if _snapshot is None:
        warm_up()
    if _snapshot is None or _snapshot.changes():
        _snapshot = Snapshot()  # what came before this test is not its doing
    yield
    found = close_blocks(before)
    if not before:  # the hooks of a block around are no fault of the test's
        found += [*import_hooks(), *map(str, _snapshot.changes())]
    if found:
        _snapshot = None  # one test's fault is reported once
        pytest.fail("PyTorch is not what it was before this test:\n" + "\n".join(found), pytrace=False)
