"""What records or transforms the operations at the moment, and so which backend quantizes a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # came with torch 2.7

# Modes that make tensors up or write operations down. Others, such as FlopCounterMode, see real values go
# by: a checkpointed part is computed in one and computed again outside of it, by the same way.
_RECORDING = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def is_traced() -> bool:
    """Whether the operations are recorded, to be run again on other values."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_compiled() -> bool:
    """Whether it is ``torch.compile`` that records the operations, and not ``torch.export``."""
    return torch.compiler.is_compiling() and not _is_exporting()


def is_jit_traced() -> bool:
    """Whether it is ``torch.jit.trace`` that records."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_in_memory(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor in main memory, and nothing records the operations."""
    return x.is_cpu and is_readable(x)


def is_readable(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor, whose values can be read, and nothing records the operations."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and not (torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _RECORDING)))
    )


def is_plain_gradient(grad: Tensor) -> bool:
    """Whether a gradient is such a tensor, and has none of its own."""
    # The legacy kind is that of ``torch.autograd.grad(..., is_grads_batched=True)``.
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return not (torch.is_grad_enabled() or batched) and is_readable(grad)
