"""``python -m quantpatch.numerics.kernels`` compiles all kernels, as for an image."""

from __future__ import annotations

import importlib.util
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from quantpatch.errors import MissingExtraError


def _compile(dtype: str) -> int:
    from quantpatch.numerics.kernels import source

    return len([source.kernel(name, dtype) for name in source.NAMES])


def main() -> str:
    """Compiles every kernel into numba's cache, for each dtype in a process of its own.

    Returns:
        What was done, in a sentence.

    Raises:
        MissingExtraError: numba is not installed.
    """
    if importlib.util.find_spec("numba") is None:
        raise MissingExtraError.of("cpu", "numba", "compiling the CPU kernels")
    from quantpatch.numerics.kernels.source.compilation import DTYPES

    start = time.perf_counter()
    with ProcessPoolExecutor(len(DTYPES)) as processes:
        count = sum(processes.map(_compile, DTYPES))
    seconds = time.perf_counter() - start
    return f"{count} kernels ({' and '.join(DTYPES)}) are in numba's cache, after {seconds:.1f} s"


if __name__ == "__main__":
    try:
        print(main())
    except MissingExtraError as error:
        sys.exit(str(error))
