"""A factor for each channel of what a layer is given, multiplied before the layer quantizes it.

It is where SmoothQuant has moved scale into a layer's weight, and nothing before the layer can divide by it.
It is a module of the layer's, put before its forward by a hook, as quantizers at outputs are behind: it
copies, pickles and traces with the layer, and changes neither its class nor its code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantpatch.torch_tools import nn

#: Its name in a layer.
INPUT_FACTOR = "input_factor"
#: The name of its tensor in a layer.
FACTOR_KEY = f"{INPUT_FACTOR}.factor"


class InputFactor(nn.Module):
    """Multiplies by a factor for each channel.

    Args:
        factor: Of a shape that broadcasts to what it is multiplied by.

    Attributes:
        factor: The same, a buffer.
    """

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """The product, of the type of ``x``."""
        return x * self.factor.to(x.dtype)

    def extra_repr(self) -> str:
        """Its shape."""
        return str(tuple(self.factor.shape))


def _multiplied(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The hook before the forward."""
    factor: Any = layer._modules.get(INPUT_FACTOR)
    if factor is None:
        return None
    if args:
        return (factor(args[0]), *args[1:]), kwargs
    name: str = getattr(layer, "inputs", ("input",))[0]
    return args, {**kwargs, name: factor(kwargs[name])}


def multiply_input_of(layer: nn.Module, factor: Tensor) -> None:
    """Makes a layer multiply its first argument by a factor; in the place of the one that it has."""
    made = InputFactor(factor)
    made.train(layer.training)
    layer._modules[INPUT_FACTOR] = made
    if _multiplied not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_multiplied, with_kwargs=True)


def input_factor_of(layer: nn.Module) -> Tensor | None:
    """The factor that a layer multiplies its first argument by."""
    found = layer._modules.get(INPUT_FACTOR)
    return found.factor if isinstance(found, InputFactor) else None


def named_input_factors(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have one, by name."""
    return {name: module for name, module in model.named_modules() if input_factor_of(module) is not None}


def drop_input_factor(layer: nn.Module) -> None:
    """Undoes ``multiply_input_of``."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _multiplied:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    layer._modules.pop(INPUT_FACTOR, None)
