"""What a model computes, recorded while it runs: which values go where, through which operators.

============  ====================================================================
flow.py       the graph: operators, and the values that go from one to the next
recorder.py   a run of a model that gives it
traits.py     what is known of operators: which keep values, signs, or move integers
macs.py       which operators multiply, what, and how much
============  ====================================================================
"""

from quantpatch.dataflow.flow import BATCHNORM, Dataflow, Operator, Value
from quantpatch.dataflow.macs import FAST_PATHS, Product
from quantpatch.dataflow.recorder import Recorder, dataflow, recording
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
