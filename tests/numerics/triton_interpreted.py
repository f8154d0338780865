"""Runs the CUDA kernel on the CPU, in Triton's interpreter, and prints how many bits differ from the CPU's.

A program of its own, since Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

import itertools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from quantpatch.numerics import fake_quant, gradients
from quantpatch.numerics.backends import select, triton
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS
from quantpatch.numerics.modes import is_in_memory
from quantpatch.numerics.qparams import QParams

INTEGERS = ("int8", "int8_narrow", "uint8", "uint8_z37", "uint8_z254", "int4", "uint3", "uint3_z5", "int2")
FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WHOLE = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


def convert_bfloat16(data, source, target, rounding, own=interpreter._convert_float):
    """The interpreter's own conversion cuts bits off where a GPU rounds, and loses subnormals."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return (data.astype(np.uint32) << 16).view(np.float32)
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return own(data, source, target, rounding)


interpreter._convert_float = convert_bfloat16
np.seterr(all="ignore")


def hard_values(scale, high, dtype, lower_end=-1, n=4000):
    """Ties and their neighbours, subnormals, the ends of the range, infinities, NaN, any bit patterns."""
    rng = np.random.default_rng(0)
    last = 2 * min(high, 300) + 3
    steps = np.arange(-last, last + 1, dtype=np.float32) / 2 * np.float32(scale)
    ends = np.array([-1, 1, lower_end], np.float32) * np.float32(high) * np.float32(scale)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, 3.4e38], np.float32)
    steps = np.concatenate([steps, ends])
    x = [steps, np.nextafter(steps, np.float32(np.inf)), np.nextafter(steps, np.float32(-np.inf)), special]
    x.append(rng.standard_normal(n // 2).astype(np.float32) * np.float32(scale * high / 3))
    x.append(rng.integers(0, 2**32, n // 2, dtype=np.uint32).view(np.float32))
    return torch.from_numpy(np.concatenate(x)).to(dtype)


def mismatches(a, b, dtype):
    """Elements whose bits differ, a NaN being like any other."""
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return -1
    whole = WHOLE[dtype]
    differ = a.contiguous().view(whole) != b.contiguous().view(whole)
    return int((differ & ~(a.isnan() & b.isnan())).sum())


def grid_of(name):
    """The format, and the zero point of a name such as "uint8_z37"."""
    name, _, zero_point = name.partition("_z")
    return QParams(BUILTIN_FORMATS[name], None, zero_point=int(zero_point) if zero_point else None)


def the_kernel(x, q):
    """Selects the kernel's backend, though its tensors are on the CPU here."""
    if not triton.serves(x, q):
        raise AssertionError(f"the kernel refuses {q.format.name} for {tuple(x.shape)}")
    return triton


triton._works = lambda device: True


def both(x, amax, name, axis=None):
    """Result and gradient by the CPU's operations and by the kernel."""
    results, q = [], grid_of(name)
    zero_point = None if q.zero_point is None else torch.tensor(q.zero_point, dtype=torch.uint8)
    for chosen in (select, the_kernel):
        gradients.select = chosen
        fake_quant.is_in_memory = is_in_memory if chosen is select else lambda x: False  # the kernel reads it
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = fake_quantize(leaf, amax, q.format, axis=axis, zero_point=zero_point)
        upstream = torch.linspace(-1, 1, x.numel()).to(x.dtype).view(x.shape)
        (g,) = torch.autograd.grad(y, leaf, upstream)
        results.append((y.detach(), g))
    return results


def compare(x, amax, name, dtype, axis=None):
    (y, g), (fused, fused_g) = both(x, amax, name, axis)
    # Of NaN any gradient will do, and in a range without end, whose result is NaN.
    anything = x.isnan() if amax is None else x.isnan() | amax.isinf().any()
    g, fused_g = (t.masked_fill(anything, 0) for t in (g, fused_g))
    return [x.numel(), mismatches(fused, y, dtype), mismatches(fused_g, g, dtype)]


def cases():
    for name, dtype in itertools.product(INTEGERS + FLOATS, DTYPES):
        q = grid_of(name)
        high = q.longer_side()
        for amax in (2.7182817, 0.0, float("inf")):
            scale = max(amax, 0.5) / q.max() if amax < 1e30 else 1.0
            x = hard_values(scale, high, DTYPES[dtype], q.lower_end())
            yield f"{name} {dtype} amax={amax}", compare(x, torch.tensor(amax), name, dtype)
        x = hard_values(1.0, high, DTYPES[dtype])
        x = x[x.isfinite()][:4000]
        yield f"{name} {dtype} dynamic", compare(x, None, name, dtype)
    shape = (3, 2, 300)
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[0] = 0
    for name, axis in itertools.product(("int8", "fp8_e4m3", "uint4", "uint8_z200"), (0, 1, 2, -1)):
        amax = torch.rand([n if d == axis % 3 else 1 for d, n in enumerate(shape)]) + 0.3
        amax[(0,) * 3] = 0
        for kind, t in (("contiguous", x), ("transposed", x.transpose(0, 2).contiguous().transpose(0, 2))):
            yield f"{name} axis={axis} {kind}", compare(t, amax, name, "float32", axis)
            yield f"{name} axis={axis} {kind} dynamic", compare(t, None, name, "float32", axis)
    images = torch.randn(2, 3, 17, 19).contiguous(memory_format=torch.channels_last)
    for axis in (0, 1, 3):
        yield f"int8 channels_last axis={axis}", compare(images, None, "int8", "float32", axis)
    gaps = torch.randn(40, 30)[:, ::2]
    yield "int8 with gaps", compare(gaps, torch.tensor(1.0), "int8", "float32")
    yield "int8 with gaps axis=0", compare(gaps, None, "int8", "float32", 0)
    yield "int8 0-dim", compare(torch.tensor(0.4), torch.tensor(1.0), "int8", "float32")
    yield "int8 empty", compare(torch.empty(0, 3), torch.tensor(1.0), "int8", "float32")
    blocks = torch.randn(4, 6, 256) * torch.rand(4, 6, 1)
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "int4_g128"):
        yield f"{name} blocks", compare(blocks, None, name, "float32")
    yield "nvfp4 given range", compare(blocks, blocks.abs().max(), "nvfp4", "float32")
    yield "int4_g128 given ranges", compare(blocks, torch.rand(4, 6, 2), "int4_g128", "float32")


def refused():
    """What the kernel leaves to plain operations."""
    x, one = torch.randn(4, 48), torch.tensor(1.0)
    int8, blocked = BUILTIN_FORMATS["int8"], BUILTIN_FORMATS["mxfp4"]
    yield triton.serves(x.double(), QParams(int8, one))
    yield triton.serves(x, QParams(int8, None, torch.rand(4, 48)))
    yield triton.serves(x, QParams(blocked, None, torch.rand(4, 2), 1))  # 48 is no multiple of 32
    yield triton.serves(x)  # a reduction


def main():
    json.dump({"cases": dict(cases()), "refused": [not serves for serves in refused()]}, sys.stdout)


if __name__ == "__main__":
    main()
