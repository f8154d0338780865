"""What ``skip`` and ``include`` mean: patterns, held against the targets of a table and their subclasses."""

from __future__ import annotations

import fnmatch
import sys
from typing import Any

from quantpatch.quantize.reasons import Pattern
from quantpatch.torch_tools.class_swap import dotted


def means(pattern: Pattern, cls: Any) -> bool:
    """Whether a pattern means a class, by the name that it was given by its own module or by another."""
    if isinstance(pattern, type):
        return cls is pattern
    return names(pattern, cls.__name__, dotted(cls)) or ("." in pattern and _found_under(pattern) is cls)


def names(pattern: str, name: str, dotted_name: str) -> bool:
    """Whether a pattern is one of two names, or a glob that fits one."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(dotted_name, pattern)


def _found_under(dotted_name: str) -> Any:
    """The object that a dotted name means in the modules imported so far, or None."""
    module, _, name = dotted_name.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
