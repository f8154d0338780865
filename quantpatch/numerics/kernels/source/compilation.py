"""From functions to machine code that ctypes calls."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import Any

from numba import cfunc, njit, types  # type: ignore[attr-defined,unused-ignore]

jit = njit(error_model="numpy", nogil=True)
inlined = njit(error_model="numpy", nogil=True, forceinline=True)  # where a call costs as much as the work

# Arguments of kernels: elements and their bits, by dtype; numbers in memory; numbers.
ELEMENTS, BITS = "elements", "bits"
FLOATS, DOUBLES, INTS, LONGS = map(types.CPointer, (types.float32, types.float64, types.int32, types.int64))
FLOAT, LONG = types.float32, types.int64
_OF_DTYPE = {
    "float32": {ELEMENTS: types.CPointer(types.float32), BITS: types.CPointer(types.int32)},
    "bfloat16": {ELEMENTS: types.CPointer(types.uint16), BITS: types.CPointer(types.int16)},
}
DTYPES = tuple(_OF_DTYPE)
_C_TYPES: dict[Any, Any] = {FLOAT: ctypes.c_float, LONG: ctypes.c_int64, types.void: None}

#: By name: the function, what it returns and its arguments.
KERNELS: dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]] = {}


def _version() -> str:
    """What changes with any of these files."""
    files = (f for f in resources.files(__package__).iterdir() if f.name.endswith(".py"))
    return hashlib.sha256(b"".join(sorted(f.read_bytes() for f in files))).hexdigest()[:12]


_VERSION = _version()


def register(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a kernel of a function."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[function.__name__] = (function, result, arguments)
        # numba's cache goes by name, and sees a change only in the kernel's own file.
        function.__qualname__ = f"{function.__name__}_{_VERSION}"
        return function

    return add


@functools.cache
def kernel(name: str, dtype: str) -> Callable[..., Any]:
    """A kernel as a C function, called with addresses and numbers; while it runs, other threads can.

    Args:
        name: One of ``KERNELS``.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """
    function, result, arguments = KERNELS[name]
    signature = result(*(_OF_DTYPE[dtype].get(a, a) for a in arguments))
    try:
        code = cfunc(signature, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        code = cfunc(signature, error_model="numpy")(function)
    prototype: Any = ctypes.CFUNCTYPE(
        _C_TYPES[result], *(_C_TYPES.get(a, ctypes.c_void_p) for a in arguments)
    )
    call: Any = prototype(code.address)
    call.code = code  # keeps the machine code in memory
    return call  # type: ignore[no-any-return]
