"""What users give for a model and for its batches."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import InputError
from quantpatch.running import as_batches, uncompiled

X = torch.randn(2, 4)


def float_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4))


def quantized_model() -> nn.Sequential:
    with qp.quantize_modules():
        return float_model()


@pytest.mark.parametrize(
    "call",
    [
        lambda path: qp.summary("model"),
        lambda path: qp.calibrate([X], quantized_model()),
        lambda path: qp.calibrate(nn.Linear, [X]),
        lambda path: qp.audit(X, quantized_model()),
        lambda path: qp.compare([X], float_model(), quantized_model()),
        lambda path: qp.configure({}, quantized_model()),
        lambda path: qp.convert("model"),
        lambda path: qp.prepare(X, quantized_model()),
        lambda path: qp.fold_batchnorm(X),
        lambda path: qp.float_state_dict({}),
        lambda path: qp.save(path, quantized_model()),
        lambda path: qp.load(quantized_model(), path),
        lambda path: qp.load(path, "model"),
        lambda path: qp.export_onnx(X, path, quantized_model()),
        lambda path: qp.sensitivity(X, lambda model: 1.0),
    ],
)
def test_what_is_no_model_is_said_to_be_none(call, tmp_path):
    with pytest.raises(InputError, match=r"takes a model|takes the file first"):
        call(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_shown_of_a_thing_that_is_no_model_fits_in_a_line():
    with pytest.raises(InputError, match=re.escape("summary takes a model (an nn.Module), not a Tensor")):
        qp.summary(torch.randn(100))


@pytest.mark.parametrize("data", [X, {"input": X}, [X], [(X,)], iter([{"input": X}])])
def test_one_tensor_or_one_dict_is_one_batch(data):
    model = quantized_model()
    qp.calibrate(model, data, progress=False)
    assert model[0].input_quantizer.amax == X.abs().max()
    assert len(list(as_batches({"input": X}))) == len(list(as_batches(X))) == 1


@pytest.mark.parametrize("data", [None, 3, "data", b"data", nn.Linear(2, 2)])
def test_what_is_no_batches_is_an_error(data):
    with pytest.raises(InputError, match=f"^data is {type(data).__name__}, expected batches"):
        as_batches(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._dynamo at its import
def test_what_torch_compile_wraps_is_found():
    model = float_model()
    assert uncompiled(model) is model
    assert uncompiled(torch.compile(model)) is model
