"""Recurrent layers: stacks, packed sequences, and the fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from quantpatch.layers import QuantGRU, QuantLSTM, QuantLSTMCell, QuantRNN
from quantpatch.quantizer import TensorQuantizer

KINDS = [QuantRNN, QuantLSTM, QuantGRU]


def made(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def single_layers(layer, directions):
    """The layers of a stack as float modules of one layer each, with weights quantized by hand."""
    found = []
    for number in range(layer.num_layers):
        width = layer.input_size if number == 0 else (layer.proj_size or layer.hidden_size) * directions
        one = layer.float_class(
            width, layer.hidden_size, bidirectional=directions == 2, batch_first=layer.batch_first,
            **({"proj_size": layer.proj_size} if layer.proj_size else {}),
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                own = name.replace("l0", f"l{number}")
                value = getattr(layer, own)
                quantizer = layer.quantizer(own)
                parameter.copy_(value if quantizer is None else quantizer(value))
        found.append(one)
    return found


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"batch_first": True}, {"bidirectional": True, "proj_size": 3}],
    ids=["plain", "bidirectional", "batch-first", "projected"],
)
def test_each_layer_of_a_stack_gets_quantized_inputs(kind, options):
    if "proj_size" in options and kind is not QuantLSTM:
        pytest.skip("only LSTM has projections")
    layer = made(kind, 5, 4, num_layers=3, **options)
    for number, name in enumerate(("input", "input_l1", "input_l2")):
        layer.quantizer(name).amax = 0.5 + 0.3 * number
    directions = 2 if layer.bidirectional else 1
    x = torch.randn(3, 6, 5)
    states = []
    h = x
    for number, one in enumerate(single_layers(layer, directions)):
        h = layer.quantizer("input" if number == 0 else f"input_l{number}")(h)
        h, state = one(h)
        states.append(state)
    output, state = layer(x)
    assert torch.equal(output, h)
    if kind is QuantLSTM:
        assert torch.equal(state[0], torch.cat([s[0] for s in states]))
        assert torch.equal(state[1], torch.cat([s[1] for s in states]))
    else:
        assert torch.equal(state, torch.cat(states))


@pytest.mark.parametrize("kind", KINDS)
def test_running_layer_by_layer_is_the_stack(kind):
    """With quantizers that change nothing, one call a layer gives what one call for the stack gives."""
    layer = made(kind, 5, 4, num_layers=3, dropout=0.5, bidirectional=True)
    twin = layer.float_class(5, 4, num_layers=3, dropout=0.5, bidirectional=True)
    twin.load_state_dict(layer.state_dict())
    for quantizer in layer.quantizers().values():
        quantizer.disable_quant()
        quantizer.enable_calib()  # active, so the stack is taken apart
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 6, 4)], enforce_sorted=False)
    state = torch.randn(6, 3, 4)
    state = (state, state.flip(0)) if kind is QuantLSTM else state
    for given in ((torch.randn(6, 3, 5),), (packed,), (packed, state), (torch.randn(6, 3, 5), state)):
        torch.manual_seed(3)
        ours, our_state = layer(*given)
        torch.manual_seed(3)
        theirs, their_state = twin(*given)
        if given[0] is packed:
            assert torch.equal(ours.unsorted_indices, theirs.unsorted_indices)
            ours, theirs = ours.data, theirs.data
        assert torch.equal(ours, theirs)
        pairs = zip(our_state, their_state, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_packed_and_padded_agree():
    layer = made(QuantLSTM, 5, 4, num_layers=2)
    for quantizer in layer.quantizers().values():
        quantizer.amax = torch.tensor(1.0) if quantizer.descriptor.kept_axes is None else torch.ones(16, 1)
    sequences = [torch.randn(n, 5) for n in (3, 6, 4)]
    output, _ = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    for position, sequence in enumerate(sequences):
        alone, _ = layer(sequence)
        torch.testing.assert_close(padded[: lengths[position], position], alone)


def calls_of(layer, x, monkeypatch):
    """How often the kernel runs."""
    count = []
    kernel = torch._VF.lstm
    monkeypatch.setattr(torch._VF, "lstm", lambda *args: count.append(1) or kernel(*args))
    layer(x)
    monkeypatch.undo()
    return len(count)


def test_the_stack_is_one_call_without_upper_quantizers(monkeypatch):
    layer = made(QuantLSTM, 5, 4, num_layers=3)
    x = torch.randn(6, 2, 5)
    assert calls_of(layer, x, monkeypatch) == 3
    for number in (1, 2):
        layer.quantizer(f"input_l{number}").disable()
    assert calls_of(layer, x, monkeypatch) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    layer = made(kind, 5, 4, num_layers=2)
    other = made(kind, 5, 4, num_layers=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    x = torch.randn(6, 2, 5)
    state = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, state, (x,))[0], other(x)[0])
    assert not torch.equal(layer(x)[0], other(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_states_are_told_by_torch(kind):
    layer = made(kind, 5, 4, num_layers=2)
    bad = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(torch.randn(6, 2, 5), (bad, bad) if kind is QuantLSTM else bad)
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(6, 2, 7))


def test_a_stack_remembers_nothing_of_the_views():
    layer = made(QuantLSTM, 5, 4, num_layers=2, dropout=0.5)
    layer(torch.randn(6, 2, 5))
    assert (layer.num_layers, layer.dropout, layer.input_size) == (2, 0.5, 5)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    layer.flatten_parameters()


def test_cells_quantize_the_state_at_every_step():
    cell = made(QuantLSTMCell, 5, 4)
    cell.hidden_quantizer.amax = 0.1
    x, c = torch.randn(2, 5), torch.randn(2, 4)
    large, cut = torch.full((2, 4), 7.0), torch.full((2, 4), 0.1)
    assert torch.equal(cell(x, (large, c))[0], cell(x, (cut, c))[0])
    assert torch.equal(cell(x, hx=(large, c))[1], cell(x, hx=(cut, c))[1])


def test_gradients_of_weights_are_those_of_the_float_stack():
    layer = made(QuantGRU, 5, 4, num_layers=2)
    assert all(isinstance(q, TensorQuantizer) for q in layer.quantizers().values())
    output, _ = layer(torch.randn(6, 2, 5))
    output.sum().backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in ours)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_they_come_out_of_a_block(kind):
    import quantpatch as qp

    with qp.quantize_modules():
        layer = kind(3, 4)
    assert type(layer).__name__ == f"Quant{kind.__name__}"
