"""Compiling ahead of the first use."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from quantpatch.errors import MissingExtraError
from quantpatch.numerics.kernels import __main__


def test_every_kernel_is_compiled_for_each_dtype_and_another_process_has_them_from_the_cache() -> None:
    pytest.importorskip("numba")
    from quantpatch.numerics.kernels.source import NAMES

    command = [sys.executable, "-m", "quantpatch.numerics.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert re.match(rf"{2 * len(NAMES)} kernels \(float32 and bfloat16\) are in numba's cache", done.stdout)
    code = (
        "from quantpatch.numerics.kernels.source import NAMES, kernel\n"
        "for name in NAMES: print(kernel(name, 'float32').code.cache_hits)"
    )
    hits = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "QUANTPATCH_KERNELS": "1"},
    ).stdout.split()  # fmt: skip
    assert hits == ["1"] * len(NAMES)


def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantpatch\[cpu\]'"):
        __main__.main()
