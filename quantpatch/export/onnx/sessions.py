"""ONNX Runtime's sessions, as the export's checks open them: quiet, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime


def session_options(*, optimized: bool, written_to: Path | None = None) -> Any:
    """ONNX Runtime's options, with graph optimizations on or off; quiet.

    Args:
        optimized: Whether the graph is optimized.
        written_to: Where to leave what became of it, with a file ``<name>.data`` beside it for what is large.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # It would keep what a run needs, weights turned into floats among it.
    options.enable_cpu_mem_arena = False
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if written_to is not None:
        options.optimized_model_filepath = str(written_to)
        # Within one file of 2 GiB there may be no room: weights of some operators are floats now.
        entry = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{entry}_file_name", f"{written_to.name}.data")
        options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
    return options


def session(path: Path, options: Any) -> Any:
    """A session of a file."""
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def changed(model: Any, path: Path, options: Any) -> Any:
    """A session of a changed model of a file, whose data may be beside it.

    Args:
        model: An ``onnx.ModelProto`` that was loaded without its data.
        path: The file. What is changed is written beside it for a moment.
        options: The session's.
    """
    own = path.with_name(f"{path.name}.changed")
    try:
        own.write_bytes(model.SerializeToString())
        return session(own, options)
    finally:
        own.unlink(missing_ok=True)
