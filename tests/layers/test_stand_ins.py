"""What a layer's own code sees while it runs: the layer itself, with quantized weights."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import quantpatch as qp
from quantpatch.layers import QuantEmbedding, QuantizedLayer, QuantLinear, QuantLSTM

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Reads its weight in its forward and through a method, a property and a closure; notes its calls."""

    calls = 0

    def __init__(self, width=3):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, width))
        self.register_buffer("seen", torch.zeros(()))
        self.notes = {}

    @property
    def transposed(self):
        return self.weight.t()

    def product(self, x):
        return x @ self.transposed

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = x
        self.notes[self] = weakref.ref(self)
        self.notes["weight"] = self.weight
        return (lambda: self.product(x) + self.weight.sum())()


class QuantScaled(QuantizedLayer, Scaled):
    inputs = ("x",)


def quantized(layer, cls, recipe="int8"):
    layer.__class__ = cls
    layer.add_quantizers(qp.recipe(recipe))
    return layer


def scaled():
    torch.manual_seed(0)
    with qp.quantize_modules(custom=[(__name__, "Scaled", QuantScaled)]):
        return Scaled()


def expected(layer, x=X):
    weight = layer.weight_quantizer(layer.weight)
    return layer.x_quantizer(x) @ weight.t() + weight.sum()


def test_the_module_that_a_forward_sees_is_the_layer():
    layer = scaled()
    for _ in range(3):
        assert torch.equal(layer(X), expected(layer))
    assert list(layer.notes) == [layer, "weight"]
    assert layer.notes[layer]() is layer
    assert layer.calls == layer.seen == 3
    assert torch.equal(layer.last, layer.x_quantizer(X))
    assert torch.equal(layer.notes["weight"], layer.weight_quantizer(layer.weight))
    assert layer.weight is layer._parameters["weight"]


def test_a_forward_patched_on_the_class_of_torch_sees_the_layer(monkeypatch):
    with qp.quantize_modules(include=["*"]):
        layers = nn.ModuleDict(
            {
                "Linear": nn.Linear(3, 3),
                "Conv1d": nn.Conv1d(4, 4, 1),
                "Embedding": nn.Embedding(3, 3, max_norm=1.0),
                "LSTM": nn.LSTM(3, 3),
            }
        )
    for name, layer in layers.items():
        seen = []
        plain = getattr(nn, name).forward

        def forward(self, *args, plain=plain, seen=seen):
            seen.append(self)
            return plain(self, *args)

        monkeypatch.setattr(getattr(nn, name), "forward", forward)
        layer(torch.tensor([0, 1]) if name == "Embedding" else X)
        assert len(seen) == 1
        assert seen[0] is layer, name


@pytest.mark.parametrize("instances", [1, 2])
def test_threads_see_stand_ins_of_their_own_calls_only(instances):
    entered, leave = threading.Barrier(3, timeout=20), threading.Barrier(3, timeout=20)

    class Waiting(Scaled):
        def forward(self, x):
            entered.wait()
            leave.wait()
            return x @ self.weight * x.sum()

    class QuantWaiting(QuantizedLayer, Waiting):
        inputs = ("x",)

    layers = [quantized(Waiting(), QuantWaiting) for _ in range(instances)]
    results = {}
    inputs = [X, -2 * X]
    runs = [
        threading.Thread(target=lambda n=n: results.update({n: layers[n % instances](inputs[n])}))
        for n in range(2)
    ]
    for run in runs:
        run.start()
    entered.wait()
    for layer in layers:  # both forwards are running
        assert layer.weight is layer._parameters["weight"]
    leave.wait()
    for run in runs:
        run.join(20)
    for n in range(2):
        layer = layers[n % instances]
        x = layer.x_quantizer(inputs[n])
        assert torch.equal(results[n], x @ layer.weight_quantizer(layer.weight) * x.sum())


def test_a_layer_that_calls_itself():
    class Recursive(Scaled):
        def forward(self, x, depth=2):
            inner = self(x, depth - 1) if depth else x
            return inner @ self.weight

    class QuantRecursive(QuantizedLayer, Recursive):
        inputs = ("x",)

    layer = quantized(Recursive(), QuantRecursive, "int8-weight-only")
    weight = layer.weight_quantizer(layer.weight)
    assert torch.equal(layer(X), X @ weight @ weight @ weight)
    assert layer.weight is layer._parameters["weight"]


def test_nothing_stands_in_after_an_error():
    layer = scaled()
    with pytest.raises(RuntimeError):
        layer(torch.ones(4, 7))
    assert layer.weight is layer._parameters["weight"]


def test_gradients_through_checkpointing_are_those_without():
    grads = []
    for use_reentrant in (None, False, True):
        layer, x = scaled(), X.clone().requires_grad_()
        output = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
        output.square().sum().backward()
        grads.append((layer.weight.grad, x.grad))
    for other in grads[1:]:
        assert all(map(torch.equal, grads[0], other))


class Checkpointed(nn.Module):
    """Runs a part of its own forward, which reads its weight, under a checkpoint."""

    mode = None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3) - 0.3)

    def part(self, x):
        return torch.tanh(x @ self.weight) @ self.weight

    def forward(self, x):
        if self.mode is None:
            return self.part(x) * self.weight.sum()
        return checkpoint(self.part, x, use_reentrant=self.mode) * self.weight.sum()


class QuantCheckpointed(QuantizedLayer, Checkpointed):
    inputs = ("x",)


@pytest.mark.parametrize("around", [False, True])
def test_a_checkpoint_inside_a_forward_computes_with_quantized_weights_again(around):
    grads = []
    for mode in (None, False, True):
        torch.manual_seed(0)
        layer, x = quantized(Checkpointed(), QuantCheckpointed, "int4"), X.clone().requires_grad_()
        layer.mode = mode
        output = checkpoint(layer, x, use_reentrant=False) if around and not mode else layer(x)
        output.square().sum().backward()
        grads.append((layer.weight.grad, x.grad))
        assert layer.weight is layer._parameters["weight"]
    for other in grads[1:]:
        assert all(map(torch.allclose, grads[0], other))


def test_a_layer_that_ran_is_copied_pickled_and_changed_as_one_that_did_not():
    layer, never_ran = scaled(), scaled()
    layer(X)
    layer.notes.clear()
    assert list(vars(layer)) == [*vars(never_ran), "calls", "last"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(twin(X), expected(layer))
    layer.weight = nn.Parameter(torch.ones(3, 3))
    assert layer._parameters["weight"] is layer.weight
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.ones(3, 3)
    del layer.weight
    assert not hasattr(layer, "weight")
    layer.weight = torch.zeros(3, 3)
    assert vars(layer)["weight"] is layer.weight
    del layer.weight
    with pytest.raises(AttributeError, match="weight"):
        layer.weight  # noqa: B018
    layer.register_parameter("weight", nn.Parameter(torch.ones(3, 3)))
    assert torch.equal(layer(X), expected(layer))


def test_functional_call_and_gradients_by_torch_func():
    layer = scaled()
    layer(X)
    weight = torch.full((3, 3), 0.3)
    layer.weight_quantizer.disable()
    given = torch.func.functional_call(layer, {"weight": weight}, (X,))
    assert torch.equal(given, layer.x_quantizer(X) @ weight.t() + weight.sum())


def test_a_parametrization_put_on_and_taken_off_a_layer_that_ran():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    with qp.quantize_modules():
        layer = nn.Linear(3, 3, bias=False)
    layer(X)
    own = layer.weight
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer.weight, 2 * own)
    for _ in range(2):
        weight = layer.weight_quantizer(layer.weight)
        assert torch.equal(layer(X), nn.functional.linear(layer.input_quantizer(X), weight))
    assert torch.equal(layer.weight, 2 * own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer) is QuantLinear
    assert torch.equal(layer.weight, own)
    weight = layer.weight_quantizer(layer.weight)
    assert torch.equal(layer(X), nn.functional.linear(layer.input_quantizer(X), weight))


def test_attributes_that_stand_in_for_a_call_are_the_layers_own_after_it():
    with qp.quantize_modules(include=["*"]):
        table = nn.Embedding(5, 3, max_norm=0.5)
        stack = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    table(torch.tensor([1, 2]))
    stack(X)
    assert (table.max_norm, stack.num_layers, stack.input_size, stack.dropout) == (0.5, 2, 3, 0.0)
    own = [stack._parameters[name] for name in stack._flat_weights_names]
    assert list(map(id, stack._flat_weights)) == list(map(id, own))
    table.max_norm = 2.0
    assert vars(table)["max_norm"] == 2.0
    stack.flatten_parameters()
    stack.double()
    assert stack(X.double())[0].dtype == torch.float64
    assert (type(table), type(stack)) == (QuantEmbedding, QuantLSTM)


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning")
@pytest.mark.parametrize("ran_before", [False, True])
def test_compilers_and_exporters_follow_it(ran_before):
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)

        def forward(self, x):  # reads a layer's weight itself, too
            return nn.functional.linear(self.first(x), self.second.weight) + self.second(x)

    with qp.quantize_modules():
        model = Model().eval()
    qp.calibrate(model, [X])
    reference = copy.deepcopy(model)(X)
    if ran_before:
        model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), reference)
    for strict in (False, True):
        program = torch.export.export(model, (X,), strict=strict)
        assert set(program.state_dict) >= {"first.weight", "second.weight"}
        torch.testing.assert_close(program.module()(X), reference)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), reference)
    traced = torch.jit.trace(model, (X,))
    torch.testing.assert_close(traced(X), reference)
    torch._dynamo.reset()
