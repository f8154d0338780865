"""ONNX Runtime's sessions, as the export's checks open them: quiet, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantpatch.errors import ExportError, MissingExtraError
from quantpatch.plugins.runtime import OpenedFile

try:
    import onnxruntime
except ImportError:
    raise MissingExtraError.of("onnx", "onnxruntime", "running a file in ONNX Runtime") from None


def open_file(path: Path, threads: int | None) -> OpenedFile:
    """A file in ONNX Runtime, with the options of a session that was given none.

    Args:
        path: The file.
        threads: How many threads run it; None for as many as there are cores.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    try:
        opened = session(path, options)
    except Exception as error:
        raise ExportError(_not_opened(error)) from error

    def run(feed: Mapping[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = opened.run(None, dict(feed))
        return outputs

    return run


def _not_opened(error: Exception) -> str:
    said = f"ONNX Runtime {onnxruntime.__version__} cannot run the exported file with optimizations: {error}"
    if "float8" not in str(error):
        return said
    return (
        f"{said}\nThe optimizations of ONNX Runtime before 1.32 move FP8 into operators that do not take it. "
        f"Upgrade it, use an int8 recipe, or pass check=False and run the file with its optimizations off"
    )


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
