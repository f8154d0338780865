"""One entry with one example: its layer in float and quantized, with the same weights."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.example import Example
from quantpatch.quantize.calibrate import calibrating
from quantpatch.quantize.scope import keep_float, quantize_modules
from quantpatch.recipes.descriptor import Recipe


class Broken(Exception):
    """A rule does not hold; says what was seen, in the words of the report."""


class NotApplicable(Exception):
    """A check says nothing about a layer, for the reason given."""


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and packed sequences."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def floats(value: Any) -> list[Tensor]:
    """Those of them that hold floating-point numbers."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point()]


def differ(ours: Any, theirs: Any) -> str:
    """How the tensors of two outputs differ, bit for bit (NaN equals NaN); empty if they do not."""
    mine, others = tensors(ours), tensors(theirs)
    if len(mine) != len(others):
        return f"it has {len(mine)} tensors, the float layer's {len(others)}"
    for position, (a, b) in enumerate(zip(mine, others, strict=True)):
        where = f"tensor {position}: " if len(mine) > 1 else ""
        for what in ("dtype", "shape", "device"):
            if getattr(a, what) != getattr(b, what):
                return f"{where}{what} {getattr(a, what)}, expected {getattr(b, what)}"
        if a.stride() != b.stride():
            return f"{where}strides {a.stride()}, expected {b.stride()}"
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            count = int((a.nan_to_num() != b.nan_to_num()).sum())
            return f"{where}{count} of {a.numel()} values differ"
    return ""


@attrs.frozen
class Subject:
    """What the checks are made on.

    Attributes:
        entry: The entry.
        example: How to build its target, and what to call it with.
        plugins: Plugins that take part in blocks besides the built-in one; None: all active ones.
        recipe: The recipe of the blocks; None: the default.
    """

    entry: Entry
    example: Example
    plugins: tuple[str, ...] | None = None
    recipe: str | Recipe | None = None

    @property
    def target(self) -> Any:
        """The class that is replaced."""
        return getattr(importlib.import_module(self.entry.module_name), self.entry.name)

    @property
    def replacement(self) -> Any:
        """The class that takes its place."""
        return self.entry.load_replacement()

    @property
    def options(self) -> dict[str, Any]:
        """What ``quantize_modules`` and ``convert`` are called with."""
        # As custom, so that no other plugin's entry for the target gets in the way.
        return {"custom": [self.entry], "plugins": self.plugins, "recipe": self.recipe}

    # --- the layer -----------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """What ``example.build`` builds here; the same weights each time."""
        torch.manual_seed(0)
        layer = self.example.build()
        if not isinstance(layer, nn.Module):
            raise Broken(f"build() of the example gave {layer!r}, expected the layer")
        return layer

    def fresh_float(self) -> nn.Module:
        """The float layer; a lazy one has its parameters."""
        with keep_float():
            layer = self.build()
        return self._settled(layer)

    def fresh_quantized(self) -> nn.Module:
        """The quantized layer, built in a block. Its ranges are not known."""
        with quantize_modules(**self.options):
            layer = self.build()
        if type(layer) is not self.replacement:
            raise Broken(
                f"build() of the example gave {type(layer).__qualname__}, expected "
                f"{self.replacement.__qualname__}: it has to call {self.entry.dotted} itself and return it"
            )
        return self._settled(layer)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A float layer, and a quantized one that has loaded its weights."""
        layer, quantized = self.fresh_float(), self.fresh_quantized()
        quantized.load_state_dict(layer.state_dict(), strict=True)
        return layer, quantized

    def calibrated(self) -> tuple[nn.Module, nn.Module]:
        """The same; the quantized one knows its ranges."""
        layer, quantized = self.pair()
        self.calibrate(quantized)
        state = quantized.state_dict()  # running a layer may have changed its state
        layer.load_state_dict({name: state[name] for name in layer.state_dict()}, strict=True)
        return layer, quantized

    def calibrate(self, layer: nn.Module) -> None:
        """Sets the ranges of a layer's quantizers from the example's inputs."""
        if all(q.disabled or q.descriptor.dynamic for q in named_quantizers(layer).values()):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a check reports quantizers that saw nothing
            with calibrating(layer, strict=False, existing="overwrite"):
                self.run(layer)

    def _settled(self, layer: nn.Module) -> nn.Module:
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            inputs = self.data()
            torch.manual_seed(0)
            layer(*inputs, **self.example.keywords)
        return layer

    # --- running it ----------------------------------------------------------------------------

    def data(self, seed: int = 1) -> tuple[Any, ...]:
        """The example's inputs; the same each time for a seed."""
        torch.manual_seed(seed)
        inputs = self.example.inputs()
        if not isinstance(inputs, tuple):
            raise Broken(f"inputs() of the example gave {type(inputs).__name__}, expected a tuple")
        return inputs

    def run(self, layer: nn.Module, data: tuple[Any, ...] | None = None) -> Any:
        """The layer's output on the example's inputs (or others); dropout is the same each time."""
        data = self.data() if data is None else data
        torch.manual_seed(7)
        return layer(*data, **self.example.keywords)

    def with_gradients(self, layer: nn.Module) -> tuple[Any, dict[str, Tensor | None]]:
        """The output, and the gradients of inputs and parameters by name."""
        data = self.data()
        inputs = {id(t): t.requires_grad_() for t in floats(data)}
        layer.zero_grad()
        output = self.run(layer, data)
        total = sum(t.double().square().sum() for t in floats(output))
        if not isinstance(total, Tensor) or not total.requires_grad:
            raise NotApplicable("its output needs no gradient")
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {f"input {position}": tensor.grad for position, tensor in enumerate(inputs.values())}
        return output, gradients | {name: p.grad for name, p in parameters(layer)}


def parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A layer's parameters that the float layer has too."""
    learned = {id(p) for q in named_quantizers(layer).values() for p in q.parameters()}
    return ((name, p) for name, p in layer.named_parameters() if id(p) not in learned)


def disable(layer: nn.Module, but: Iterable[TensorQuantizer] = ()) -> nn.Module:
    """Switches off all quantizers of a layer, but for some that are switched on."""
    chosen = list(but)
    for quantizer in named_quantizers(layer).values():
        quantizer.disabled = not any(quantizer is one for one in chosen)
    return layer
