"""Before calibration: batch norm folded, quantizers placed where a runtime's integer kernels want them."""

from quantpatch.export.prepare.batchnorm import FoldedBatchNorm, fold_batchnorm
from quantpatch.export.prepare.folded_weights import FoldedWeights, folded_weights
from quantpatch.export.prepare.placement import Preparation, prepare

__all__ = ["FoldedBatchNorm", "FoldedWeights", "Preparation", "fold_batchnorm", "folded_weights", "prepare"]
