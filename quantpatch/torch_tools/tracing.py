"""Tracing with torch's exporters: one thread at a time, and quietly."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx.experimental", "onnxscript", "onnx_ir")
_TRACING = threading.RLock()


@contextlib.contextmanager
def tracing(at_least: int = logging.ERROR) -> Iterator[None]:
    """A block that traces models, or compiles them.

    torch does so for one thread at a time and fails in the others: while one traces, its tensors stand in for
    the parameters of a model. Exporters log what they skip, and whole graphs.

    Args:
        at_least: Level of what is logged.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    with _TRACING:
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(max(logger.level, at_least))
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
