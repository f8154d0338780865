"""Memory for quantized weights, used again from one training step to the next.

An allocator gives large memory back to the system when a step is over, and the next step pays for each page
anew: more than quantizing takes. So the memory of a parameter's quantized value stays with the parameter,
until that is freed or quantized without a gradient. It is used again only if nothing else refers to it.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_SMALLEST = 2**20  # bytes; the allocator keeps smaller ones itself

_of_parameter: MutableMapping[Tensor, torch.UntypedStorage] = WeakIdKeyDictionary()


def like(x: Tensor, *, trains: bool) -> Tensor:
    """Memory for a result, of the shape and strides of ``x``, which has no gaps.

    ``trains`` says that it is that of a training step, else what is kept for ``x`` is freed.
    """
    if type(x) is not torch.nn.Parameter or x.nbytes < _SMALLEST:
        return torch.empty_like(x)
    if not trains:
        _of_parameter.pop(x, None)
        return torch.empty_like(x)
    storage = _of_parameter.pop(x, None)  # so that another thread does not find it
    if (
        storage is not None
        and storage.nbytes() == x.nbytes
        and torch._C._storage_Use_Count(storage._cdata) == 1
    ):
        out = torch.empty(0, dtype=x.dtype, device="cpu").set_(storage, 0, x.shape, x.stride())
    else:
        out = torch.empty_like(x)
    _of_parameter[x] = out.untyped_storage()
    return out
