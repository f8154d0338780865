"""Whatever a test does: layers are float afterwards, and the classes of torch.nn what they were."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from pytorch_quantization import quant_modules
from pytorch_quantization.nn import TensorQuantizer


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tests run side by side, on tensors too small to share out over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _dictionaries() -> dict[type, dict[str, object]]:
    # Not nn.Module itself, which torch's own compiler patches for good when it is first used.
    classes = [value for value in vars(nn).values() if isinstance(value, type) and value is not nn.Module]
    # Python notes on a class how to copy it, when it first does.
    return {cls: {k: v for k, v in vars(cls).items() if k != "__slotnames__"} for cls in classes}


@pytest.fixture(autouse=True)
def _torch_is_what_it_was() -> Iterator[None]:
    names, before = dict(vars(nn)), _dictionaries()
    yield
    quant_modules.deactivate()
    # torch imports some of its submodules when they are first used.
    assert {k: v for k, v in vars(nn).items() if k in names or not isinstance(v, ModuleType)} == names
    after = _dictionaries()
    for cls, members in before.items():
        assert list(after[cls]) == list(members), cls
        assert all(after[cls][key] is value for key, value in members.items()), cls
    assert TensorQuantizer._enable_onnx_export is False
