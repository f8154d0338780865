"""Whatever a test does: layers are float afterwards, and the classes of torch.nn what they were."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from torch import nn

from pytorch_quantization import quant_modules
from pytorch_quantization.nn import TensorQuantizer

# What Python (on first copying) and torch (on first compiling) note on a class.
_NOTES = ("__slotnames__", "___")


def _dictionaries() -> dict[type, dict[str, object]]:
    classes = [value for value in vars(nn).values() if isinstance(value, type)]
    return {
        cls: {key: value for key, value in vars(cls).items() if not key.startswith(_NOTES)} for cls in classes
    }


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
