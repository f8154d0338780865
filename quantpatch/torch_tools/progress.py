"""How far long work is, and how long it will take: on terminals and in notebooks, and nothing in logs."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from quantpatch.torch_tools.notebooks import as_html, in_notebook

if TYPE_CHECKING:  # imported when something is shown
    from rich.progress import Progress

T = TypeVar("T")

_SECONDS = 0.2  # between two pictures in a notebook


class Bar:
    """Long work, as it is shown; here it is not.

    Attributes:
        total: How many steps there are; None if that is not known.
    """

    total: float | None = None

    def step(self, text: str) -> None:
        """Says what is being done now; what was said before is done."""

    def advance(self, steps: float = 1) -> None:
        """Says that steps are done."""


class _Shown(Bar):
    """One that is shown by rich."""

    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        from rich.markup import escape

        self._escape = escape
        self._progress = progress
        self._description = escape(description)
        self._task = progress.add_task(self._description, total=total)
        self._begun = False

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total

    @total.setter
    def total(self, total: float | None) -> None:
        self._progress.update(self._task, total=total)

    def step(self, text: str) -> None:
        self._progress.update(self._task, description=f"{self._description}: {self._escape(text)}")
        self.advance(self._begun)
        self._begun = True

    def advance(self, steps: float = 1) -> None:
        self._progress.advance(self._task, steps)
        self._look()

    def _look(self) -> None:
        """Shows how far it is, where nothing else does so."""


class _InNotebook(_Shown):
    """One that is a display of the cell, and needs no widgets."""

    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        super().__init__(progress, description, total)
        self._display: Any = importlib.import_module("IPython.display")
        self._handle = self._display.display(self._picture(), display_id=True)
        self._last = time.monotonic()

    def _picture(self) -> Any:
        return self._display.HTML(as_html(self._progress.get_renderable()))

    def _look(self) -> None:
        if time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self._handle.update(self._picture())

    def close(self) -> None:
        """Takes it away: what it was for is over."""
        self._handle.update(self._display.HTML(""))


@contextlib.contextmanager
def progress_bar(description: str, total: float | None = None, *, progress: bool) -> Iterator[Bar]:
    """A block that takes long, with the bar that shows how far it is and how long it will still take.

    Args:
        description: Stands before the bar.
        total: How many steps there are; None if that is not known.
        progress: Whether to show it (on a terminal or in a notebook only).
    """
    if not progress:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if in_notebook():
        shown = _InNotebook(Progress(console=console, auto_refresh=False), description, total)
        try:
            yield shown
        finally:
            shown.close()
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            yield _Shown(bar, description, total)
    else:  # without a bar: one that is disabled still ends with an empty line in older rich
        yield Bar()


@contextlib.contextmanager
def progress_over(items: Iterable[T], description: str, *, progress: bool) -> Iterator[Iterable[T]]:
    """A block with the items, over which a bar runs.

    Args:
        items: What is iterated over.
        description: Stands before the bar.
        progress: Whether to show it (on a terminal or in a notebook only).
    """
    total = len(items) if isinstance(items, Sized) else None
    with progress_bar(description, total, progress=progress) as bar:
        yield _counted(items, bar)


def _counted(items: Iterable[T], bar: Bar) -> Iterator[T]:
    for item in items:
        yield item
        bar.advance()
