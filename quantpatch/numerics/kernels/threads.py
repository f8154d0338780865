"""Kernels in as many threads as torch uses for its own operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_SMALLEST = 2**17  # elements that are worth a thread
_ALIGNED = 2**12

_pool: ThreadPoolExecutor | None = None


def for_parts(size: int, work: Callable[[int, int], T]) -> list[T]:
    """Calls ``work(start, length)`` for a part of ``range(size)`` in each thread; returns what it does."""
    threads = 1 if size < 2 * _SMALLEST else min(torch.get_num_threads(), size // _SMALLEST)
    if threads <= 1:
        return [work(0, size)]
    return in_steps(size, -(-size // threads), work)


def in_steps(size: int, step: int, work: Callable[[int, int], T]) -> list[T]:
    """The same for parts of a given length, rounded up: the same ones for any number of threads."""
    step = -(-step // _ALIGNED) * _ALIGNED
    parts = [(start, min(step, size - start)) for start in range(0, size, step)]
    each = -(-len(parts) // min(torch.get_num_threads(), len(parts)))

    def several(some: list[tuple[int, int]]) -> list[T]:
        return [work(*part) for part in some]

    first, *others = [parts[i : i + each] for i in range(0, len(parts), each)]
    waiting = [_threads().submit(several, some) for some in others]
    return [*several(first), *(found for future in waiting for found in future.result())]


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="quantpatch")
    return _pool


def _forget() -> None:
    """A forked process has none of the threads of its parent."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
