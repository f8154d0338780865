"""An example of each layer that this plugin replaces, for the conformance kit."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from quantpatch.example import Example

__all__ = ["EXAMPLES"]

EXAMPLES = (
    Example("transformers.pytorch_utils.Conv1D", lambda: Conv1D(4, 6), lambda: (torch.randn(2, 3, 6),)),
)
