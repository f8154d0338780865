"""What ``lower`` needs: a CPU with integer kernels, a compiler that knows them, a folder to write to."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError, MissingExtraError, warn_caller
from quantpatch.torch_tools import nn

_PATTERNS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


def demand_cpu(model: nn.Module, inputs: Any, purpose: str = "lower compiles for CPUs") -> None:
    """Refuses what is not on the CPU, and a PyTorch without kernels.

    Raises:
        ExportError: That is so.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    others = sorted({str(x.device) for x in tensors} - {"cpu"})
    if others:
        raise ExportError(
            f"{purpose}, and the model or its inputs are on {', '.join(others)}: write model.cpu()"
        )
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ExportError("this PyTorch is built without oneDNN, which has the integer kernels")


def demand_compiler() -> None:
    """Refuses to begin without a C++ compiler, or a folder for what it makes.

    Raises:
        ExportError: There is none.
    """
    from torch._inductor import cpp_builder, exc
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ExportError(
            "lower needs a C++ compiler, which PyTorch's compiler runs, and found none. Install one (on "
            "Debian and Ubuntu: apt-get install g++), or name it in the environment variable CXX"
        ) from error
    try:
        folder = Path(cache_dir())
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        folder, is_writable = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "its cache folder")), False
    if not is_writable:
        raise ExportError(
            f"PyTorch's compiler cannot write to {folder}, where it keeps what it compiles: name another "
            f"folder in the environment variable TORCHINDUCTOR_CACHE_DIR"
        )


def demand_patterns() -> None:
    """Has PyTorch's compiler know which operators are an integer kernel together.

    Until 2.13 PyTorch has these patterns itself; later ones are in torchao, which registers them when it is
    imported. Without them all is compiled as float.

    Raises:
        MissingExtraError: They are in torchao, which is not installed.
    """
    from torch._inductor.fx_passes import quantization

    if hasattr(quantization, "_register_quantization_weight_pack_pass"):
        return
    try:
        importlib.import_module(_PATTERNS)
    except ImportError as error:
        raise MissingExtraError.of(
            "lower", "torchao", f"qp.lower with PyTorch {torch.__version__.partition('+')[0]}"
        ) from error


def instructions() -> str:
    """What this processor multiplies integers with."""

    def has(name: str) -> bool:
        return bool(getattr(torch.cpu, name, lambda: False)())

    if has("_is_amx_tile_supported"):
        return "AMX"
    if has("_is_vnni_supported") or has("_is_avx512_vnni_supported"):
        return "VNNI"
    kind = torch.backends.cpu.get_cpu_capability()
    warn_caller(
        f"this processor ({kind}) has no instructions for products of 8-bit integers (VNNI, AMX): the "
        f"kernels compute with 16 bits in between, which may saturate, and gain little over float. Weights "
        f'of 7 bits do not saturate: QuantDescriptor(num_bits=7, axis="channel", narrow_range=True)'
    )
    return kind
