"""Layers, against torch's classes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pytorch_quantization import nn as quant_nn
from pytorch_quantization import tensor_quant as tq
from pytorch_quantization.nn.modules import _utils, quant_conv
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant

CONVOLUTIONS = [(f"Conv{d}d", (3, 4, 3), {"padding": 1}, (2, 3, *[6] * d)) for d in (1, 2, 3)]
TRANSPOSED = [(f"ConvTranspose{d}d", (3, 4, 3), {"stride": 2}, (2, 3, *[5] * d)) for d in (1, 2, 3)]
WEIGHTED = [*CONVOLUTIONS, *TRANSPOSED, ("Linear", (3, 4), {"bias": False}, (2, 3))]
INPUT_ONLY = [
    *((f"{kind}Pool{d}d", (2,), {}, (2, 3, *[6] * d)) for kind in ("Max", "Avg") for d in (1, 2, 3)),
    *((f"AdaptiveAvgPool{d}d", (2,), {}, (2, 3, *[6] * d)) for d in (1, 2, 3)),
    *((f"InstanceNorm{d}d", (3,), {"affine": True}, (2, 3, *[6] * d)) for d in (1, 2, 3)),
]
RECURRENT = [("LSTM", (3, 4), {"num_layers": 2}, (5, 2, 3)), ("LSTMCell", (3, 4), {}, (2, 3))]
ALL = [*WEIGHTED, *INPUT_ONLY, *RECURRENT]


def cases(some):
    return pytest.mark.parametrize(
        ("name", "args", "keywords", "shape"), some, ids=[case[0] for case in some]
    )


def pair(name, args, keywords, **own):
    """The float layer and the quantized one, with the same weights."""
    torch.manual_seed(0)
    float_layer = getattr(nn, name)(*args, **keywords)
    torch.manual_seed(0)
    return float_layer, getattr(quant_nn, f"Quant{name}")(*args, **keywords, **own)


def quantizers(layer):
    return [m for m in layer.modules() if isinstance(m, quant_nn.TensorQuantizer)]


def fake(x, axis=None, num_bits=8):
    amax = (
        x.abs().max()
        if axis is None
        else x.abs().amax([d for d in range(x.dim()) if d != axis], keepdim=True)
    )
    return fake_tensor_quant(x, amax, num_bits, False, False)


# --- what every layer does -------------------------------------------------------------------------


@cases(ALL)
def test_the_same_as_torch_but_for_the_quantizers(name, args, keywords, shape):
    float_layer, layer = pair(name, args, keywords)
    assert isinstance(layer, getattr(nn, name))
    assert getattr(quant_nn, name) is type(layer)
    assert list(layer.state_dict()) == list(float_layer.state_dict())  # the same keys before calibration
    for mine, theirs in zip(layer.parameters(), float_layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # the same random numbers
    layer.load_state_dict(float_layer.state_dict())
    float_layer.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    for quantizer in quantizers(layer):
        quantizer.disable()
    expected = float_layer(x)
    for given in (layer(x), copy.deepcopy(layer)(x), pickle.loads(pickle.dumps(layer))(x)):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


@cases(ALL)
def test_unknown_keywords_and_real_quantization_are_refused(name, args, keywords, shape):
    cls = getattr(quant_nn, f"Quant{name}")
    with pytest.raises(TypeError, match="Unused keys: bogus"):
        cls(*args, **keywords, bogus=1)
    with pytest.raises(ValueError, match="fake quantization"):
        cls(*args, **keywords, quant_desc_input=QuantDescriptor(fake_quant=False))
    if "Pool" in name or "Norm" in name:
        with pytest.raises(TypeError, match="Unused keys: quant_desc_weight"):
            cls(*args, **keywords, quant_desc_weight=QuantDescriptor())


@cases(ALL)
def test_calibrated_state_loads(name, args, keywords, shape):
    _, source = pair(name, args, keywords)
    for quantizer in quantizers(source):
        quantizer.disable_quant()
        quantizer.enable_calib()
    x = torch.randn(shape)
    source(x)
    for quantizer in quantizers(source):
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
    assert {k for k in source.state_dict() if k.endswith("._amax")} == {
        f"{k}._amax" for k, m in source.named_modules() if m in quantizers(source)
    }
    _, target = pair(name, args, keywords)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


# --- weighted layers -------------------------------------------------------------------------------


@cases(WEIGHTED)
def test_input_and_weight_are_quantized_and_nothing_else(name, args, keywords, shape):
    float_layer, layer = pair(name, args, keywords)
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        float_layer.weight.copy_(fake(layer.weight, 1 if "Transpose" in name else 0))
    y = layer(x)
    assert torch.equal(y, float_layer(fake(x)))
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.input_quantizer is layer._input_quantizer
    assert layer.weight_quantizer is layer._weight_quantizer


@cases(WEIGHTED)
def test_names_of_ranges_in_checkpoints(name, args, keywords, shape):
    own = {"quant_desc_input": QuantDescriptor(amax=1.0), "quant_desc_weight": QuantDescriptor(amax=2.0)}
    float_layer, layer = pair(name, args, keywords, **own)
    added = set(layer.state_dict()) - set(float_layer.state_dict())
    assert added == {"_input_quantizer._amax", "_weight_quantizer._amax"}


@cases(INPUT_ONLY)
def test_only_the_input_is_quantized(name, args, keywords, shape):
    float_layer, layer = pair(name, args, keywords)
    x = torch.randn(shape)
    assert torch.equal(layer(x), float_layer(fake(x)))
    assert torch.equal(layer(input=x), float_layer(fake(x)))
    assert not hasattr(layer, "_weight_quantizer")


def test_descriptors_of_a_layer():
    own = {"quant_desc_input": QuantDescriptor(num_bits=4), "quant_desc_weight": QuantDescriptor(num_bits=3)}
    layer = quant_nn.QuantLinear(3, 2, bias=False, **own)
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), F.linear(fake(x, None, 4), fake(layer.weight, None, 3)))


def test_default_descriptors_are_of_each_class_and_copied(monkeypatch):
    class Mine(quant_nn.QuantLinear):
        pass

    descriptor = QuantDescriptor(num_bits=4)
    Mine.set_default_quant_desc_input(descriptor)
    Mine.set_default_quant_desc_weight(QuantDescriptor(num_bits=5))
    layer = Mine(2, 2)
    assert (layer._input_quantizer.num_bits, layer._weight_quantizer.num_bits) == (4, 5)
    assert Mine.default_quant_desc_input == descriptor
    assert Mine.default_quant_desc_input is not descriptor
    assert quant_nn.QuantLinear(2, 2)._input_quantizer.num_bits == 8
    assert quant_nn.QuantLinear.default_quant_desc_weight == tq.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    with pytest.raises(ValueError, match="not a QuantDescriptor"):
        Mine.set_default_quant_desc_input("int8")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_mode(mode):
    float_layer, layer = pair("Conv2d", (3, 4, 3), {"padding": "same", "padding_mode": mode})
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        float_layer.weight.copy_(fake(layer.weight, 0))
    assert torch.equal(layer(x), float_layer(fake(x)))


def test_device_and_dtype():
    layer = quant_nn.QuantConv1d(3, 4, 3, device="meta", dtype=torch.bfloat16)
    assert layer(torch.ones(1, 3, 5, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (
        quant_nn.QuantLinear(2, 2, dtype=torch.float64)(torch.ones(1, 2, dtype=torch.float64)).dtype
        == torch.float64
    )
    x = torch.randn(2, 3, 5, 5)
    transposed = quant_nn.QuantConvTranspose2d(3, 2, 3, 2)
    assert transposed(x, output_size=[12, 12]).shape == (2, 2, 12, 12)


# --- LSTM ------------------------------------------------------------------------------------------


def step(x, h, c, weight, num_inputs, b_ih, b_hh):
    """One time step with everything quantized, input next to hidden state."""
    both, weight = fake(torch.cat([x, h], 1)), fake(weight, 0)
    gates = (
        both[:, :num_inputs] @ weight[:, :num_inputs].T
        + b_ih
        + both[:, num_inputs:] @ weight[:, num_inputs:].T
        + b_hh
    )
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_lstm_cell():
    cell = quant_nn.QuantLSTMCell(3, 4)
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1)
    torch.testing.assert_close(cell(x, (h, c)), step(x, h, c, weight, 3, cell.bias_ih, cell.bias_hh))
    torch.testing.assert_close(cell(x), cell(x, (torch.zeros(2, 4), torch.zeros(2, 4))))
    assert cell(x[0])[0].shape == (4,)


def test_lstm_at_every_time_step():
    lstm = quant_nn.QuantLSTM(3, 4, 2)
    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    steps = list(x)
    last = []
    for layer in range(2):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (getattr(lstm, f"{name}_l{layer}") for name in names)
        state = h[layer], c[layer]
        for t, given in enumerate(steps):
            state = step(given, *state, torch.cat([w_ih, w_hh], 1), w_ih.shape[1], b_ih, b_hh)
            steps[t] = state[0]
        last.append(state)
    output, (h_n, c_n) = lstm(x, (h, c))
    torch.testing.assert_close(output, torch.stack(steps))
    torch.testing.assert_close(h_n, torch.stack([s[0] for s in last]))
    torch.testing.assert_close(c_n, torch.stack([s[1] for s in last]))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "bidirectional": True},
        {"proj_size": 2, "num_layers": 2},
        {"num_layers": 2, "dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed", "packed unsorted"])
def test_the_loop_computes_what_torch_computes(keywords, kind):
    """With 24 bits the quantized loop is as good as float."""
    fine = QuantDescriptor(num_bits=24)
    float_layer, layer = pair("LSTM", (3, 4), keywords, quant_desc_input=fine, quant_desc_weight=fine)
    assert len(layer._input_quantizers) == len(layer._weight_quantizers)
    assert len(layer._input_quantizers) == layer.num_layers * (1 + layer.bidirectional)
    float_layer.eval()
    layer.eval()
    x = torch.randn(3, 5, 3) if layer.batch_first else torch.randn(5, 3, 3)
    if kind == "unbatched":
        x = torch.randn(5, 3)
    elif kind != "batched":
        lengths = [5, 3, 1] if kind == "packed" else [3, 5, 1]
        x = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=kind == "packed")
    given, expected = layer(x), float_layer(x)
    if "packed" in kind:
        given, expected = ((pad_packed_sequence(o)[0], s) for o, s in (given, expected))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_lstm_training_and_wrong_input():
    layer = quant_nn.QuantLSTM(3, 4, 2, dropout=0.5)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, 2, 7))


# --- layers of one's own ---------------------------------------------------------------------------


def test_mixins_for_own_layers():
    class Add(nn.Module, _utils.QuantInputMixin):
        def __init__(self, **kwargs):
            super().__init__()
            self.init_quantizer(_utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True, **kwargs))

        def forward(self, a, b):
            return self._input_quantizer(a) + self._input_quantizer(b)

    a, b = torch.randn(4), torch.randn(4)
    assert torch.equal(Add()(a, b), fake(a) + fake(b))
    assert Add(quant_desc_input=QuantDescriptor(num_bits=4)).input_quantizer.num_bits == 4
    with pytest.raises(TypeError, match="Unused keys"):
        Add(nothing=1)


def test_a_float_layer_turned_into_a_quantized_one():
    """As scripts for detectors do."""
    float_layer = nn.Conv2d(3, 4, 3)
    layer = quant_nn.QuantConv2d.__new__(quant_nn.QuantConv2d)
    for key, value in vars(float_layer).items():
        setattr(layer, key, value)
    assert not isinstance(layer, _utils.QuantInputMixin)
    layer.init_quantizer(*_utils.pop_quant_desc_in_kwargs(type(layer)))
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer(x), F.conv2d(fake(x), fake(layer.weight, 0), layer.bias))


def test_bases_that_scripts_ask_for():
    assert issubclass(quant_nn.QuantConv2d, quant_conv._QuantConvNd)
    assert issubclass(quant_nn.QuantConvTranspose2d, quant_conv._QuantConvTransposeNd)
    assert issubclass(quant_nn.QuantLinear, _utils.QuantMixin)
    assert issubclass(quant_nn.QuantMaxPool2d, _utils.QuantInputMixin)
    assert not issubclass(quant_nn.QuantLinear, _utils.QuantInputMixin)
