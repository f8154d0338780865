"""Which models were built in a block: the outermost ones of all modules that were.

The rules of a recipe go by names within a model, and no module knows its name while it is being built.
"""

from __future__ import annotations

import weakref

from torch import nn

from quantpatch.interception.slots import lock


class _IdentitySet:
    """Modules, whatever they say of their equality; they are not kept alive."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def add(self, module: nn.Module) -> None:
        self._known[id(module)] = module

    def __contains__(self, module: nn.Module) -> bool:
        return self._known.get(id(module)) is module


class Built:
    """The modules built so far, in their order, from any thread. They are not kept alive.

    Attributes:
        count: How many were built, those that are gone included.
    """

    def __init__(self) -> None:
        self.count = 0
        self._left_out = _IdentitySet()
        self._modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def add(self, module: nn.Module) -> None:
        """Notes a module."""
        with lock:
            self._modules[self.count] = module
            self.count += 1

    def leave_out(self, module: nn.Module) -> None:
        """Notes one that a block inside has seen to; it may be a part of the others all the same."""
        with lock:
            self._left_out.add(module)

    def leaves_out(self, module: nn.Module) -> bool:
        """Whether it is one of these."""
        return module in self._left_out

    def roots(self) -> list[nn.Module]:
        """Those that no other one contains."""
        with lock:
            modules = [module for _, module in sorted(self._modules.items())]
        inside: set[int] = set()
        for module in modules:
            for child in module.children():
                if id(child) not in inside:
                    inside.update(map(id, child.modules()))
        return [module for module in modules if id(module) not in inside]
