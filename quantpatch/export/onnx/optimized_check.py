"""What ONNX Runtime's optimizations make of a file: each kernel beside the file, and what runs on floats."""

from __future__ import annotations

import glob

import onnx

from quantpatch.export.onnx.kernel_check import check_kernels
from quantpatch.export.onnx.latency import kernels_of_weights
from quantpatch.export.onnx.sessions import session, session_options
from quantpatch.plugins.runtime import Kernels, WrittenFile


def kernels(file: WrittenFile) -> Kernels:
    """What comes of ONNX Runtime's optimizations.

    Args:
        file: The file, the inputs to run it on, and the quantizers in it.
    """
    path = file.path
    graph = path.with_name(f"{path.name}.optimized")
    try:
        session(path, session_options(optimized=True, written_to=graph))
        checked = check_kernels(path, graph, file.feeds)
        written, optimized = (onnx.load(str(each), load_external_data=False) for each in (path, graph))
        on_integers, on_floats = kernels_of_weights(written, optimized, file.found)
        return Kernels(
            on_floats=on_floats,
            on_integers=on_integers,
            compared=len(checked.compared),
            within_step=checked.share,
        )
    finally:
        for left in graph.parent.glob(f"{glob.escape(graph.name)}*"):
            left.unlink()
