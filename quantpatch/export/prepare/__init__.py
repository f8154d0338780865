"""Before calibration: batch norm folded, quantizers placed where a runtime's integer kernels want them."""

from quantpatch.export.prepare.batchnorm import FoldedBatchNorm, fold_batchnorm
from quantpatch.export.prepare.fold_weights import FoldedWeights, fold_weights
from quantpatch.export.prepare.placement import Preparation, prepare

__all__ = ["FoldedBatchNorm", "FoldedWeights", "Preparation", "fold_batchnorm", "fold_weights", "prepare"]
