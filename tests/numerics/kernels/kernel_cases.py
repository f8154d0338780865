"""Tensors, formats and ranges for the kernels, and what torch's operations make of the same."""

import math

import torch
from hypothesis import strategies as st

from quantpatch.numerics.backends import numba
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Integer
from quantpatch.numerics.ranges import reduce_amax

PLAIN = "int8", "uint8", "int4", "int8_narrow", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"
BLOCKS = "mxfp8_e4m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4", "int4_g32", "int4_g128"
FORMATS = [
    *(BUILTIN_FORMATS[name] for name in PLAIN + BLOCKS),
    Blocked(Integer(4), 5),
]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, 0.5, 1.5, 2.5, -2.5]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def both_ways(function):
    """What the kernels give, and what torch's operations give."""
    with_kernels = function()
    numba._WANTED = False
    try:
        return with_kernels, function()
    finally:
        numba._WANTED = True


def strides(x):
    return [step for step, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    bits = BITS[a.dtype]
    same = a.view(bits) == b.view(bits)
    assert bool((same | nan).all()), (a[~(same | nan)][:5], b[~(same | nan)][:5])


@st.composite
def tensors(draw):
    shape = draw(
        st.lists(st.sampled_from([1, 2, 3, 5, 16, 33, 48]), min_size=1, max_size=4).filter(
            lambda s: math.prod(s) <= 40_000
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-38]))
    if draw(st.booleans()):
        where = torch.randint(x.numel(), (min(9, x.numel()),), generator=generator)
        x.view(-1)[where] = torch.tensor(SPECIAL)[
            torch.randint(len(SPECIAL), where.shape, generator=generator)
        ]
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return x.permute(draw(st.permutations(range(x.dim()))))


@st.composite
def cases(draw, formats=FORMATS):
    """A tensor, a format, the axis and a range that it may be given."""
    x, number_format = draw(tensors()), draw(st.sampled_from(formats))
    axes = list(range(x.dim()))
    kept = st.sampled_from(axes)
    finite = torch.nan_to_num(x.float(), 1.0, 4.0, -4.0)
    if isinstance(number_format, Blocked):
        axis = draw(kept)
        if number_format.scale == "e4m3":
            return x, number_format, axis, reduce_amax(finite)
        count = -(-x.shape[axis] // number_format.block_size)
        shape = [count if d == axis else n for d, n in enumerate(x.shape)]
        amax = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * finite.abs().max()
        return x, number_format, axis, amax
    axis = draw(st.one_of(st.none(), kept, st.just(tuple(axes[:2]))))
    return (
        x,
        number_format,
        axis,
        reduce_amax(finite, axis=axis) * draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
    )
