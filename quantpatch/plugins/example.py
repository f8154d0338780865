"""An example of a layer: how to build it, and what to call it with, for the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from quantpatch.errors import ArgumentTypeError


@attrs.frozen
class Example:
    """How to build an entry's target, and what to call it with.

    Attributes:
        target: Dotted name of the entry's target, as in the entry: ``"my_package.layers.MyConv"``.
        build: Builds the float layer by its ordinary class. The kit calls it inside a block as well, where
            the replacement comes out. Keep it small; give every operand something to do.
        inputs: Returns the positional arguments of a call, as a tuple. Called after the random seed was set.
        keywords: Keyword arguments of the call.
        label: Distinguishes several examples of a target.
        skip_checks: Checks that cannot hold for this layer, by name, each with the reason.
    """

    target: str
    build: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    keywords: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    label: str = attrs.field(default="", kw_only=True)
    skip_checks: Mapping[str, str] = attrs.field(factory=dict, kw_only=True)

    def __attrs_post_init__(self) -> None:
        for name in ("build", "inputs"):
            value = getattr(self, name)
            if not callable(value) or hasattr(value, "forward"):  # a layer is callable too
                raise ArgumentTypeError(
                    f"{name} of the example for {self.target} is {value!r}, expected a function without "
                    f"parameters. Write: {name}=lambda: ...",
                    **{name: value},
                )

    def __str__(self) -> str:
        return f"{self.target} [{self.label}]" if self.label else self.target
