"""Quantizers at the output of any module: of an activation, a residual block, a module of the user's own.

A quantized layer has a place for an ``output_quantizer``. Other modules get one by a forward hook, which
copies, pickles and traces with the module, and changes neither its class nor its code.
"""

from __future__ import annotations

from typing import Any

from quantpatch.layers.base import QuantizedLayer, quantized_output
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.torch_tools import nn

_OUTPUT = quantizer_name("output")
# What a container holds is what it runs, or lists.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _quantized_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook; of a tuple the first element is quantized, as in a quantized layer."""
    quantizer: Any = module._modules.get(_OUTPUT)
    return output if quantizer is None else quantized_output(quantizer, output)


def can_hold(module: nn.Module) -> bool:
    """Whether a module can have an output quantizer, and has no other member of that name."""
    if isinstance(module, (*_CONTAINERS, TensorQuantizer)):
        return False
    return isinstance(module._modules.get(_OUTPUT), TensorQuantizer) or not hasattr(module, _OUTPUT)


def quantize_output_of(module: Any, quantizer: TensorQuantizer | QuantDescriptor) -> TensorQuantizer:
    """Makes a module quantize what it gives.

    Args:
        module: Any module that ``can_hold`` one.
        quantizer: The quantizer, or the descriptor of a new one. It takes the place of the one there.

    Returns:
        The quantizer, which is the module's ``output_quantizer``.
    """
    assert can_hold(module)
    if isinstance(quantizer, QuantDescriptor):
        quantizer = TensorQuantizer(quantizer)
    module._modules[_OUTPUT] = quantizer
    quantizer.train(module.training)
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    quantizer.make_room(device)
    if not isinstance(module, QuantizedLayer) and _quantized_output not in module._forward_hooks.values():
        module.register_forward_hook(_quantized_output)
    return quantizer


def placed_in(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have an output quantizer by a hook, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if _quantized_output in module._forward_hooks.values()
    }


def take_out(module: nn.Module) -> None:
    """Undoes ``quantize_output_of``."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is _quantized_output:
            del module._forward_hooks[key]
    module._modules.pop(_OUTPUT, None)
