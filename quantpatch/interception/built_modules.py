"""Which models were built in a block: the outermost ones of all modules that were.

The rules of a recipe go by names within a model, and no module knows its name while it is being built.
"""

from __future__ import annotations

import weakref

from torch import nn

from quantpatch.interception.slots import lock


class Built:
    """The modules built so far, in their order, from any thread. They are not kept alive.

    Attributes:
        count: How many were built, those that are gone included.
    """

    def __init__(self) -> None:
        self.count = 0
        self._modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def add(self, module: nn.Module) -> None:
        """Notes a module."""
        with lock:
            self._modules[self.count] = module
            self.count += 1

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
