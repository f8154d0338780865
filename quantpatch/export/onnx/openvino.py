"""What OpenVINO's CPU plugin has no integer kernel for, and what it does not take.

Found by what it makes of files (2026.4), as ``openvino_file.py`` reads it.
"""

from __future__ import annotations

from typing import Any

from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.numerics.formats import Blocked
from quantpatch.torch_tools import nn


def why_float(layer: Any) -> str | None:
    """Why OpenVINO has no integer kernel for a layer, as a clause; None if it may have one."""
    if isinstance(layer, nn.RNNBase):
        return "OpenVINO runs recurrent layers on floats"
    if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
        return "OpenVINO runs convolutions of volumes on floats"
    return None


def why_refused(operand: ExportedQuantizer) -> str | None:
    """What OpenVINO does not take of a quantizer, and what to change; None if it takes it."""
    if not isinstance(operand.format, Blocked) or operand.weight is None or operand.axis is None:
        return None
    block_size = operand.format.block_size
    assert block_size is not None
    along = operand.weight.shape[operand.axis]
    if along > block_size and along % block_size:
        return (
            f"its blocks of {block_size} leave a shorter one of the {along} values along axis "
            f"{operand.axis % operand.weight.dim()}, and OpenVINO takes equal ones; use a format whose "
            f"blocks divide {along}"
        )
    return None
