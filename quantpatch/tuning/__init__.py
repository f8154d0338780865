"""Methods that make a quantized model more accurate with a few batches and no labels: ``tune``.

==================  ========================================================================
tune.py             the verb
tuner.py            what a method is; a plugin's subclasses it
tuning.py           what a method works on: the model, the data, changes that can be undone
blocks.py           weights looked at block by block, in runs that wait
weights.py          the weights, and the grids that they are rounded to
clipping.py         ranges of weights clipped
operands.py         what weights are multiplied by, seen in a run
exchanges.py        which neighbours may exchange factors of channels; scaling.py does it and verifies it
products.py         what is lost in products, for candidates of factors
report.py           what was done; reasons.py why something was not
resuming.py         what was done so far, in files
==================  ========================================================================

Each other file is a method, registered in :mod:`quantpatch.layers.builtin`.
"""

from quantpatch.tuning import reasons
from quantpatch.tuning.adaround import AdaRound
from quantpatch.tuning.awq import AWQ
from quantpatch.tuning.bias_correction import BiasCorrection
from quantpatch.tuning.equalize import Equalize
from quantpatch.tuning.gptq import GPTQ
from quantpatch.tuning.report import Tuned, TuningReport, TuningStep
from quantpatch.tuning.rotate import Rotate
from quantpatch.tuning.smoothquant import SmoothQuant
from quantpatch.tuning.tune import tune
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning

__all__ = [
    "AWQ",
    "GPTQ",
    "AdaRound",
    "BiasCorrection",
    "Equalize",
    "Rotate",
    "SmoothQuant",
    "Tuned",
    "Tuner",
    "Tuning",
    "TuningReport",
    "TuningStep",
    "reasons",
    "tune",
]
