"""What users give for a model and for its batches."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, InputError
from quantpatch.torch_tools.forward import arguments, as_batches, uncompiled

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
        lambda path: qp.compare(quantized_model(), [X], float_model()),
        lambda path: qp.configure({}, quantized_model()),
        lambda path: qp.convert("model"),
        lambda path: qp.prepare(X, quantized_model()),
        lambda path: qp.fold_batchnorm(X),
        lambda path: qp.float_state_dict({}),
        lambda path: qp.save(path, quantized_model()),
        lambda path: qp.load(path, quantized_model()),
        lambda path: qp.load("model", path),
        lambda path: qp.export_onnx(X, path, quantized_model()),
        lambda path: qp.sensitivity(X, lambda model: 1.0),
    ],
)
def test_what_is_not_a_model_is_named(call, tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"takes a model|takes the model first"):
        call(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_what_is_shown_of_a_thing_that_is_not_a_model_fits_in_a_line():
    with pytest.raises(
        ArgumentTypeError, match=re.escape("summary takes a model (an nn.Module), not a Tensor")
    ):
        qp.summary(torch.randn(100))


@pytest.mark.parametrize("data", [X, {"input": X}, [X], [(X,)], iter([{"input": X}])])
def test_one_tensor_or_one_dict_is_one_batch(data):
    model = quantized_model()
    qp.calibrate(model, data, progress=False)
    assert model[0].input_quantizer.amax == X.abs().max()
    assert len(list(as_batches({"input": X}))) == len(list(as_batches(X))) == 1


@pytest.mark.parametrize("data", [None, 3, "data", b"data", nn.Linear(2, 2)])
def test_what_is_not_batches_is_an_error(data):
    with pytest.raises(ArgumentTypeError, match=f"^data is {type(data).__name__}, expected batches"):
        as_batches(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._dynamo at its import
def test_what_torch_compile_wraps_is_found():
    model = float_model()
    assert uncompiled(model) is model
    assert uncompiled(torch.compile(model)) is model


# --- batches that forward does not take -------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor, text: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(image) + scale * self.linear(text)


def pair() -> nn.Module:
    with qp.quantize_modules():
        return Pair()


class AnyKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, **options: int) -> torch.Tensor:
        if options:
            raise TypeError("not such options")
        return self.linear(x)


@pytest.mark.parametrize(
    ("build", "batch", "message"),
    [
        (pair, {"image": X, "text": X, "label": 1, "id": 2},
         "a dict with 'label', 'id', but Pair.forward takes (image, text, scale). Give batches without: "
         "({key: batch[key] for key in ('image', 'text')} for batch in data)"),
        (pair, {"image": X}, "a dict with 'image' and lacks 'text': Pair.forward takes (image, text, scale)"),
        (pair, X, "taken as 1 of the arguments and lacks 'text'"),
        (pair, (X, X, 1.0, X), "a batch of 4 is taken as that many arguments, but Pair.forward takes (image, "
         "text, scale). If the last are labels, give batches without: ((image, text, scale) for image, text, "
         "scale, *_ in data)"),
        (quantized_model, (X, X), "(input for input, *_ in data)"),
        (quantized_model, [X, X], "(input for input, *_ in data)"),
        (lambda: quantized_model()[0], (X, X), "QuantLinear.forward takes (input)"),
        (lambda: torch.compile(quantized_model()), (X, X), "Sequential.forward takes (input)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "use",
    [
        lambda model, batch: qp.calibrate(model, [batch], progress=False),
        lambda model, batch: qp.calibrate(model, (b for b in [batch]), strict=False, progress=False),
        lambda model, batch: qp.fit_zero_points(model, [batch], progress=False),
    ],
    ids=["calibrate", "not strict", "fit_zero_points"],
)
def test_batches_that_do_not_fit_forward_say_what_to_write(build, batch, message, use):
    model = build()
    with pytest.raises(InputError, match=re.escape(message)):
        use(model, batch)
    assert all(q.amax is None for q in model.modules() if isinstance(q, qp.TensorQuantizer))


def test_what_the_advice_writes_works():
    batches = [{"input": X, "label": torch.zeros(2)}]
    qp.calibrate(
        quantized_model(), ({key: batch[key] for key in ("input",)} for batch in batches), progress=False
    )
    qp.calibrate(quantized_model(), (input for input, *_ in [(X, 1), (X, 2)]), progress=False)


def test_a_type_error_of_the_models_own_is_left_alone():
    with qp.quantize_modules():
        model = AnyKeys()
    with pytest.raises(TypeError, match="not such options"):
        qp.calibrate(model, [{"x": X, "flag": 1}], progress=False)


def test_arguments_are_a_tuple_or_the_one_that_they_are():
    assert arguments(X, None) == ((X,), {})
    assert arguments((X, 3), {"scale": 2}) == ((X, 3), {"scale": 2})
    packed = nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])  # a named tuple
    assert arguments(packed, {}) == ((packed,), {})
    with pytest.raises(ArgumentTypeError, match=r"kwargs is a list, expected the model's keywords: kwargs="):
        arguments((), ["scale"])
