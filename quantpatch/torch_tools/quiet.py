"""Tracers of torch's that log what they skip, and whole graphs: a block in which they say errors alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx.experimental", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet(at_least: int = logging.ERROR) -> Iterator[None]:
    """A block in which exporters and passes log nothing below a level."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, at_least))
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
