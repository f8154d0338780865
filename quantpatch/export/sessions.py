"""ONNX Runtime's sessions, as the export's checks open them: quiet, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["session", "session_options"]


def session_options(*, optimized: bool) -> Any:
    """ONNX Runtime's options, with graph optimizations on or off; quiet."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return options


def session(model: Path | bytes, options: Any) -> Any:
    """A session of a file, or of what one holds."""
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
