"""What a model computes, recorded while it runs: which values go where, through which operators.

============  ====================================================================
recorder.py   a run of a model as a graph of operators and values
operators.py  what is known of operators: which keep values, signs, or move integers
macs.py       which operators multiply, what, and how much
============  ====================================================================
"""

from quantpatch.dataflow.macs import FAST_PATHS, Product
from quantpatch.dataflow.recorder import BATCHNORM, Dataflow, Operator, Recorder, Value, dataflow, recording
from quantpatch.dataflow.traits import MOVING_NODES, PASSED_NODES, Traits, traits

__all__ = [
    "BATCHNORM",
    "FAST_PATHS",
    "MOVING_NODES",
    "PASSED_NODES",
    "Dataflow",
    "Operator",
    "Product",
    "Recorder",
    "Traits",
    "Value",
    "dataflow",
    "recording",
    "traits",
]
