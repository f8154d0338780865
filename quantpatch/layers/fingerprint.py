"""A digest of a model, by which a file knows what its results are of."""

from __future__ import annotations

import ctypes
import hashlib

from torch import Tensor, nn

from quantpatch.layers.quantizer import named_quantizers


def fingerprint(model: nn.Module, *settings: object) -> str:
    """A digest of all that results depend on: the quantizers' settings, and every tensor of the model.

    Args:
        model: The model.
        *settings: What else they depend on.
    """
    digest = hashlib.sha256()
    for name, quantizer in named_quantizers(model).items():
        settings = (*settings, (name, quantizer.descriptor, quantizer.disabled, quantizer.quantizing))
    digest.update(repr(settings).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            size = tensor.numel() * tensor.element_size()
            if size:
                digest.update((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))
    return digest.hexdigest()
