"""Recurrent layers: stacks, packed sequences, and the fused kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import quantpatch as qp
from quantpatch.layers import QuantGRU, QuantLSTM, QuantLSTMCell, QuantRNN
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe

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


STACKS = {"plain": {}, "bidirectional": {"bidirectional": True}, "batch-first": {"batch_first": True}}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(pytest.param(k, o, id=f"{k.__name__}-{label}") for k in KINDS for label, o in STACKS.items()),
        pytest.param(QuantLSTM, {"bidirectional": True, "proj_size": 3}, id="QuantLSTM-projected"),
    ],
)
def test_each_layer_of_a_stack_gets_quantized_inputs(kind, options):
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
    twin.load_state_dict(qp.float_state_dict(layer))
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
def test_wrong_states_are_refused_by_torch(kind):
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


# --- the hidden state, step by step --------------------------------------------------------------------

HIDDEN = Recipe(name="hidden", hidden=QuantDescriptor())
LAYOUTS = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "deep": {"num_layers": 3, "bidirectional": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}
every_layout = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{kind.__name__}-{label}")
        for kind in KINDS
        for label, options in LAYOUTS.items()
        if "proj_size" not in options or kind is QuantLSTM
    ],
)


def with_hidden(kind, **options):
    """A layer whose every quantizer, those inside included, has a range of its own."""
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=HIDDEN):
        layer = kind.float_class(5, 4, **options)
    for position, (name, quantizer) in enumerate(layer.quantizers().items()):
        if name.startswith("weight"):
            quantizer.amax = (
                getattr(layer, name.removesuffix("_quantizer")).detach().abs().amax(1, keepdim=True)
            )
        else:
            quantizer.amax = 0.3 + 0.05 * position
    return layer


CELLS = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}


def one_sequence(layer, x, state):
    """What the layer should give for one sequence ``(steps, features)``: torch's cells, operands by hand.

    The state is a list for hidden and cell state, each ``(layers * directions, features)``.
    """
    directions = 2 if layer.bidirectional else 1
    finals = []
    for number in range(layer.num_layers):
        x = layer.quantizer(f"input_l{number}" if number else "input")(x)
        outputs = []
        for direction in range(directions):
            suffix = f"l{number}" + "_reverse" * direction

            def weight(name, suffix=suffix):
                name = f"{name}_{suffix}"
                return (
                    layer.quantizer(name)(getattr(layer, name))
                    if name.startswith("weight")
                    else getattr(layer, name)
                )

            h, *c = (part[number * directions + direction] for part in state)
            steps = []
            for step in x.flip(0) if direction else x:
                h = layer.quantizer(f"hidden_{suffix}")(h)
                # A cell wants a hidden state as wide as its own, so a narrow one gets columns of zeros.
                wide = layer.hidden_size - h.shape[0]
                cell = CELLS[layer.float_class](x.shape[1], layer.hidden_size, bias=layer.bias)
                with torch.no_grad():
                    cell.weight_ih.copy_(weight("weight_ih"))
                    cell.weight_hh.copy_(F.pad(weight("weight_hh"), (0, wide)))
                    if layer.bias:
                        cell.bias_ih.copy_(weight("bias_ih"))
                        cell.bias_hh.copy_(weight("bias_hh"))
                h = F.pad(h, (0, wide))
                new = cell(step, (h, *c) if c else h)
                h, c = (new[0], [new[1]]) if c else (new, [])
                if layer.proj_size:
                    h = layer.quantizer(f"projection_input_{suffix}")(h) @ weight("weight_hr").T
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if direction else steps))
            finals.append([h, *c])
        x = torch.cat(outputs, dim=1)
    return x, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def initial_state(layer, count):
    sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * isinstance(layer, nn.LSTM)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    return [torch.randn(rows, count, size) for size in sizes]


def as_given(state):
    return state[0] if len(state) == 1 else tuple(state)


def as_list(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("form", ["padded", "packed", "packed-sorted", "unbatched"])
@every_layout
def test_every_step_quantizes_the_hidden_state(kind, options, form, with_state):
    layer = with_hidden(kind, **options)
    lengths = {"padded": [5, 5, 5], "packed": [3, 5, 1, 4], "packed-sorted": [5, 3, 3], "unbatched": [5]}[
        form
    ]
    sequences = [torch.randn(n, 5) for n in lengths]
    state = initial_state(layer, len(lengths))
    if not with_state:
        state = [torch.zeros_like(part) for part in state]
    if form == "unbatched":
        given, given_state = sequences[0], [part[:, 0] for part in state]
    else:
        dim = 0 if layer.batch_first and form == "padded" else 1
        given = (
            torch.stack(sequences, dim) if form == "padded" else pack_sequence(sequences, form != "packed")
        )
        given_state = state
    output, final = layer(given, as_given(given_state)) if with_state else layer(given)
    final = as_list(final)
    if form == "unbatched":
        outputs, final = [output], [part.unsqueeze(1) for part in final]
    elif form == "padded":
        outputs = output.unbind(dim)
    else:
        assert type(output) is type(given)
        outputs = [
            row[:n] for row, n in zip(pad_packed_sequence(output, batch_first=True)[0], lengths, strict=True)
        ]
    for number, sequence in enumerate(sequences):
        expected, ends = one_sequence(layer, sequence, [part[:, number] for part in state])
        torch.testing.assert_close(outputs[number], expected, rtol=1e-5, atol=1e-6)
        for part, end in zip(final, ends, strict=True):
            torch.testing.assert_close(part[:, number], end, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_layout
def test_with_the_quantizers_inside_disabled_the_kernel_runs_and_nothing_differs(kind, options, monkeypatch):
    layer = with_hidden(kind, **options)
    plain = copy.deepcopy(layer)
    for name in [name for name in plain.quantizers() if "hidden" in name or "projection_input" in name]:
        del plain._modules[name]
        layer.get_submodule(name).disable()
    monkeypatch.setattr(layer.__class__, "_advance", None)
    x = torch.randn(6, 3, 5)
    output, final = layer(x)
    expected, ends = plain(x)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, as_list(final), as_list(ends)))
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    reference = layer.float_class(5, 4, **options)
    reference.load_state_dict(qp.float_state_dict(layer))
    assert torch.equal(layer(x)[0], reference(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_a_stack_can_run_by_steps_and_the_others_by_the_kernel(kind, monkeypatch):
    layer = with_hidden(kind, num_layers=3)
    for number in (0, 2):
        layer.quantizer(f"hidden_l{number}").disable()
    x = torch.randn(4, 2, 5)
    advanced = []
    advance = kind._advance
    monkeypatch.setattr(kind, "_advance", lambda *args: advanced.append(1) or advance(*args))
    output, _ = layer(x)
    assert len(advanced) == 4
    for number in range(2):
        expected, _ = one_sequence(layer, x[:, number], [torch.zeros(3, 4)] * (2 if kind is QuantLSTM else 1))
        torch.testing.assert_close(output[:, number], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_drop_between_layers_as_the_kernel_does(kind):
    layer = with_hidden(kind, num_layers=2, dropout=0.5, bidirectional=True)
    twin = layer.float_class(5, 4, num_layers=2, dropout=0.5, bidirectional=True)
    twin.load_state_dict(qp.float_state_dict(layer))
    for quantizer in layer.quantizers().values():
        quantizer.disable_quant()
        quantizer.enable_calib()  # active, and changes nothing
    x = torch.randn(6, 3, 5)
    torch.manual_seed(3)
    ours, _ = layer(x)
    torch.manual_seed(3)
    theirs, _ = twin(x)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(theirs, twin(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_report_wrong_inputs_in_torchs_words(kind):
    layer = with_hidden(kind)
    states = 2 if kind is QuantLSTM else 1
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(torch.randn(6, 2, 5), as_given([torch.randn(1, 3, 4)] * states))
    with pytest.raises(RuntimeError, match=r"hidden|hx|2-D"):
        layer(torch.randn(6, 5), as_given([torch.randn(1, 3, 4)] * states))
    with pytest.raises(RuntimeError, match="input_size|must be equal"):
        layer(torch.randn(6, 2, 7))
    with pytest.raises((RuntimeError, ValueError), match="2-?D or 3-?D"):
        layer(torch.randn(1, 6, 2, 5))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_are_an_error_and_no_sequences_are_none(kind, batch_first):
    layer = with_hidden(kind, batch_first=batch_first)
    with pytest.raises(RuntimeError, match="larger than 0"):
        layer(torch.randn(2, 0, 5) if batch_first else torch.randn(0, 2, 5))
    output, final = layer(torch.randn(0, 3, 5) if batch_first else torch.randn(3, 0, 5))
    assert output.shape == ((0, 3, 4) if batch_first else (3, 0, 4))
    assert all(part.shape == (1, 0, 4) for part in as_list(final))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_dtypes_of_the_kernel(kind):
    layer, x = with_hidden(kind), torch.randn(6, 2, 5)
    states = initial_state(layer, 2)
    reference = layer.float_class(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in ((x,), (x, as_given(states))):
            ours, theirs = layer(*given), reference(*given)
            assert ours[0].dtype == theirs[0].dtype
            assert [p.dtype for p in as_list(ours[1])] == [p.dtype for p in as_list(theirs[1])]
    wide = [part.double() for part in states]
    with pytest.raises(RuntimeError):
        layer(x, as_given(wide))
    assert layer.double()(x.double(), as_given(wide))[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_all_steps(kind):
    layer = with_hidden(kind, num_layers=2)
    for quantizer in layer.quantizers().values():
        quantizer.amax = None  # no clipping that would stop some
    x = torch.randn(6, 2, 5, requires_grad=True)
    output, _ = layer(x)
    output[-1].square().sum().backward()
    assert x.grad[0].abs().sum() > 0
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_model_with_hidden_states_quantized_calibrates_and_saves(tmp_path):
    pytest.importorskip("safetensors")
    layer, x = with_hidden(QuantLSTM, num_layers=2), torch.randn(6, 2, 5)
    for quantizer in layer.quantizers().values():
        quantizer.amax = None
    qp.calibrate(layer, [x])
    assert {row.state for row in qp.summary(layer).rows} == {"calibrated"}
    qp.save(layer, tmp_path / "lstm.safetensors")
    fresh = nn.LSTM(5, 4, num_layers=2)
    qp.load(fresh, tmp_path / "lstm.safetensors")
    assert torch.equal(fresh(x)[0], layer(x)[0])


def test_a_rule_gives_an_existing_layer_the_quantizers_inside():
    with qp.quantize_modules():
        model = nn.ModuleDict({"rnn": nn.LSTM(5, 4, 2, bidirectional=True), "fc": nn.Linear(4, 2)})
    before = set(model["rnn"].quantizers())
    qp.configure(model, {"rnn.*": qp.QuantDescriptor(num_bits=4)})
    assert set(model["rnn"].quantizers()) == before
    qp.configure(model, {"*.hidden_*_quantizer": qp.QuantDescriptor()})
    new = set(model["rnn"].quantizers()) - before
    assert new == {f"hidden_l{n}{d}_quantizer" for n in (0, 1) for d in ("", "_reverse")}
    assert qp.audit(model["rnn"], torch.randn(3, 2, 5)).share == 1.0


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_take_the_recipes_descriptor_for_the_hidden_state(cell):
    with qp.quantize_modules(recipe=Recipe(name="four", hidden=QuantDescriptor(num_bits=4))):
        assert cell(3, 4).hidden_quantizer.format.bits == 4
    with qp.quantize_modules(recipe="int8"):
        assert cell(3, 4).hidden_quantizer.format.bits == 8


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_they_come_out_of_a_block(kind):
    with qp.quantize_modules():
        layer = kind(3, 4)
    assert type(layer).__name__ == f"Quant{kind.__name__}"


# --- torch.compile ----------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Something before and after a stack."""

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x + 1)[0]).relu()


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_leaves_it_as_it_leaves_torchs(kind, training):
    model, twin = Tagger(kind), Tagger(kind.float_class)
    model.train(training)
    x = torch.randn(2, 5, 4)
    with torch.set_grad_enabled(training):
        expected = model(x)
        assert torch.equal(compiled(model, backend="eager")(x), expected)
        graphs = []
        for each in (model, twin):
            torch._dynamo.reset()
            found = torch._dynamo.explain(each)(x)
            graphs.append((found.graph_count, found.graph_break_count))
    assert graphs[0] == graphs[1]
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < "2.12", reason="older compilers make more than one graph")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_torch_compile_may_trace_it_the_result_is_the_same():
    model = Tagger(QuantLSTM).eval()
    x = torch.randn(2, 5, 4)
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):  # monkeypatch would lose the setting
        torch.testing.assert_close(compiled(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()
