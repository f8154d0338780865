"""Rows of a table that say the same of many alike places, such as the blocks of a transformer, as one row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

_Row = TypeVar("_Row")


def starred(name: str) -> str:
    """A qualified name with ``*`` in the place of numbers: ``blocks.*.attn``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def alike(rows: Iterable[_Row], key: Callable[[_Row], Hashable]) -> list[list[_Row]]:
    """The rows in groups of the same key, in the order of their first ones."""
    groups: dict[Hashable, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def folded_name(names: list[str]) -> str:
    """One name for several that differ in numbers alone, with how many there are."""
    return names[0] if len(names) == 1 else f"{starred(names[0])} ({len(names)})"


def folded_names(names: Iterable[str]) -> list[str]:
    """Names of which those that differ in numbers alone are one."""
    return [folded_name(group) for group in alike(names, starred)]
