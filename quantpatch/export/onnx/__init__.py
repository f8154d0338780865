"""ONNX files that compute the model's integers, and the checks that they do.

======================  ===========================================================================
export.py               ``export_onnx``, from the model to the report (comparison.py)
capture.py              the model traced, each quantizer as an operator
operators.py            these operators, and recurrent_operators.py, as ONNX has them
tidy.py                 passes over the graph; graph.py what they are made of
fast_kernels.py         passes for ONNX Runtime: channels.py, convolutions.py, weights.py
check.py                the file run beside the model, and in its runtime (outputs.py)
optimized_check.py      what ONNX Runtime makes of it, and kernel_check.py each kernel alone
openvino_file.py        what OpenVINO makes of it; openvino.py, tensorrt.py what these do not take
latency.py              the time beside the float file
======================  ===========================================================================
"""

from quantpatch.export.onnx.comparison import Comparison, ExportReport
from quantpatch.export.onnx.export import export_onnx

__all__ = ["Comparison", "ExportReport", "export_onnx"]
