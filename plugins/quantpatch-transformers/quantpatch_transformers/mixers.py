"""Mixers of state-space models: Mamba and its relatives.

Their forward hands the weights of two of its layers, ``conv1d`` and ``dt_proj``, to functions and never calls
the layers, whose quantizers would see nothing. And it multiplies the state with ``C`` at each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantpatch.layers import QuantizedLayer
from quantpatch.recipes import QuantDescriptor, Recipe
from quantpatch_transformers.lazy_classes import classes_of
from quantpatch_transformers.products import QuantizedProducts
from quantpatch_transformers_entries import CONVOLUTION_MIXERS, MIXERS

__all__ = ["QuantizedConvolutionMixer", "QuantizedMixer"]


class QuantizedConvolutionMixer(QuantizedLayer):
    """Mixin for mixers that read the weights of layers inside instead of calling these.

    The layers' own quantizers are used, for the weights and for what they are multiplied with. The products
    of a scan in chunks, as in Mamba 2, stay float.
    """

    inputs = ()
    weights = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward, whose functions find quantized operands."""
        layers = {name: getattr(self, name, None) for name in ("conv1d", "dt_proj")}
        read = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        if not any(q.is_active for layer in (self, *read.values()) for q in layer.quantizers().values()):
            return self.quantize_output(self.run_float({}, args, kwargs))
        products = QuantizedProducts((self.quantizer("ssm_state"), self.quantizer("C")))
        stand_ins = {name: _Readable(layer, products) for name, layer in read.items()}
        with products:
            output = self.run_float(stand_ins, args, kwargs)
        return self.quantize_output(output)


class QuantizedMixer(QuantizedConvolutionMixer):
    """The same, with the operands of the selective scan's product quantized: the state, and ``C``.

    They are quantized where they are multiplied; the state goes on to the next step as it is.
    """

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """The state and ``C``."""
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            yield "ssm_state", recipe.input.for_axes(None, -1)
            yield "C", recipe.input.for_axes(None, -2)


class _Readable:
    """A layer as a forward sees it that reads its weights: they come out quantized. Calls are the layer's."""

    def __init__(self, layer: Any, products: QuantizedProducts) -> None:
        self._layer = layer
        self._products = products

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        if name not in self._layer.weight_axes():
            return value
        # Only now: a layer that is offloaded gets its weights just before they are read.
        value = self._layer.quantize_weights().get(name, value)
        self._products.partner(value, self._layer.quantizer("input"))
        return value


__getattr__, __dir__ = classes_of(
    globals(), {QuantizedMixer: MIXERS, QuantizedConvolutionMixer: CONVOLUTION_MIXERS}
)
