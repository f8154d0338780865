"""Which plugins the environment variables block and allow."""

from __future__ import annotations

import os
from collections.abc import Sequence

import attrs

from quantpatch.plugins.plugin import BLOCK_VARIABLE, BUILTIN

ALLOW_VARIABLE = "QUANTPATCH_PLUGINS"


@attrs.frozen
class Environment:
    """What the environment variables say.

    Attributes:
        blocked: Names of plugins to leave out.
        allowed: Names of the only plugins to take, besides the built-in one; None: all.
    """

    blocked: frozenset[str]
    allowed: frozenset[str] | None

    @classmethod
    def read(cls) -> Environment:
        """What they say now."""
        blocked, allowed = os.environ.get(BLOCK_VARIABLE, ""), os.environ.get(ALLOW_VARIABLE)
        return cls(_names_in(blocked), None if allowed is None else _names_in(allowed))

    def reason_blocked(self, name: str, only: Sequence[str] | None = None) -> str:
        """Why a plugin does not take part; empty if it does."""
        if name in self.blocked:
            return f"{BLOCK_VARIABLE} names it"
        if name == BUILTIN:
            return ""
        if self.allowed is not None and name not in self.allowed:
            return f"{ALLOW_VARIABLE} does not name it"
        if only is not None and name not in only:
            return "the block's plugins=[...] does not name it"
        return ""


def _names_in(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())
