"""``QuantDescriptor`` and the constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytorch_quantization import cuda_ext
from pytorch_quantization import tensor_quant as tq
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor


def test_defaults():
    d = QuantDescriptor()
    assert (d.num_bits, d.name, d.fake_quant, d.axis, d.amax) == (8, None, True, None, None)
    assert (d.learn_amax, d.scale_amax, d.calib_method) == (False, None, "max")
    assert (d.unsigned, d.narrow_range) == (False, False)
    assert tq.ScaledQuantDescriptor is QuantDescriptor


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"num_bits": (5, 2)}, TypeError),
        ({"num_bits": 8.0}, TypeError),
        ({"num_bits": -1}, ValueError),
        ({"amax": "1"}, TypeError),
        ({"amax": torch.ones(())}, TypeError),
        ({"learn_amax": True, "axis": 0}, TypeError),
        ({"calib_method": "guess"}, ValueError),
        ({"no_such": 1}, TypeError),
    ],
)
def test_what_is_refused(keywords, error):
    with pytest.raises(error):
        QuantDescriptor(**keywords)


def test_ranges_are_kept_in_float32():
    one = QuantDescriptor(amax=0.1).amax
    assert isinstance(one, np.ndarray)
    assert (one, one.dtype, one.shape) == (np.float32(0.1), np.float32, ())
    for given in ([0.1, 0.2], np.array([0.1, 0.2])):
        amax = QuantDescriptor(amax=given, axis=0).amax
        assert amax.dtype == np.float32
        assert amax.tolist() == np.float32([0.1, 0.2]).tolist()


EXAMPLES = [
    QuantDescriptor(),
    QuantDescriptor(num_bits=(4, 3), name="x", amax=0.1),
    QuantDescriptor(num_bits=4, axis=(0, 1), unsigned=True, narrow_range=True, calib_method="histogram"),
    QuantDescriptor(axis=0, amax=[0.1, 0.2, 3.0], fake_quant=False, scale_amax=1.5),
    QuantDescriptor(learn_amax=True),
]


@pytest.mark.parametrize("descriptor", EXAMPLES, ids=str)
def test_there_and_back(descriptor):
    assert QuantDescriptor(**descriptor.dict()) == descriptor
    assert QuantDescriptor.from_yaml(descriptor.to_yaml()) == descriptor


def test_equality_and_text():
    for i, first in enumerate(EXAMPLES):
        for j, second in enumerate(EXAMPLES):
            assert (first == second) == (i == j)
    assert QuantDescriptor(amax=1.0) != QuantDescriptor(amax=2.0)
    assert len({str(d) for d in EXAMPLES}) == len(EXAMPLES)
    assert "unsigned" in str(EXAMPLES[2])


def test_constants():
    assert QuantDescriptor() == tq.QUANT_DESC_8BIT_PER_TENSOR
    assert QuantDescriptor(unsigned=True) == tq.QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR
    rows = ["LINEAR_WEIGHT_PER_ROW", *(f"CONV{d}D_WEIGHT_PER_CHANNEL" for d in (1, 2, 3))]
    for name in rows:
        assert getattr(tq, f"QUANT_DESC_8BIT_{name}") == QuantDescriptor(axis=0)
    for d in (1, 2, 3):
        constant = getattr(tq, f"QUANT_DESC_8BIT_CONVTRANSPOSE{d}D_WEIGHT_PER_CHANNEL")
        assert constant == QuantDescriptor(axis=1)


@pytest.mark.parametrize("unsigned", [False, True])
def test_of_0_bits_which_is_logged_all_becomes_0(caplog, unsigned):
    descriptor = QuantDescriptor(num_bits=0, unsigned=unsigned)
    assert "num_bits is 0: all that is quantized becomes 0" in caplog.text
    assert descriptor.num_bits == 0
    x = torch.rand(3, 4) + 0.1
    zeros = torch.zeros_like(x)
    assert torch.equal(TensorQuantizer(descriptor)(x), zeros)
    assert torch.equal(tq.fake_tensor_quant(x, x.amax(), 0, unsigned), zeros)
    assert torch.equal(tq.tensor_quant(x, x.amax(), 0, unsigned)[0], zeros)
    assert torch.equal(cuda_ext.fake_tensor_quant(x, x.amax(), 0, unsigned), zeros)
