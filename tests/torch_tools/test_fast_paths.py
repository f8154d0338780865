"""Fast paths of torch that would pass quantizers by; tests/layers/test_attention.py has the layers."""

from __future__ import annotations

import pytest
import torch

from quantpatch.torch_tools.fast_paths import without_fast_paths


def test_fast_paths_are_on_again_after_an_error():
    with pytest.raises(KeyError), without_fast_paths():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled()
