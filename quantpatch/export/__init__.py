"""From a trained model to files: checkpoints and ONNX, and the folding that they profit from."""

from quantpatch.export.checkpoint import SaveReport, float_state_dict, load, save

__all__ = ["SaveReport", "float_state_dict", "load", "save"]
