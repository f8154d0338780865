"""Whole quantized models, compiled and exported: the values, and what makes the compiler compile anew."""

import copy

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.layers import Add
from quantpatch.layers.quantizer import named_quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    """A small residual network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.add = Add()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.add(self.norm(self.conv(x)), x))
        return self.head(x.mean((2, 3)))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


MODELS = {"residual": (Residual, (3, 6, 6)), "encoder": (encoder, (5, 16))}


def quantized(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    with qp.quantize_modules():
        model = build()
    # A part of the data lies outside of these ranges.
    qp.calibrate(model, [torch.randn(4, *shape) * 0.8], progress=False)
    return model, shape


def small():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    qp.convert(model)
    qp.calibrate(model, [torch.randn(32, 6)], progress=False)
    return model.eval()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_serves_every_batch_size_and_equals_eager(name, training):
    model, shape = quantized(name)
    model.train(training)
    twin = copy.deepcopy(model)  # batch norm counts
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager" if training else "eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(training):
        for batch in (3, 6):
            x = torch.randn(batch, *shape, requires_grad=training)
            torch._dynamo.mark_dynamic(x, 0)  # an error if it had to be specialised
            eager, ours = model(x), compiled(x)
            assert torch.equal(eager, ours)
            if not training:
                continue
            wanted = torch.autograd.grad(eager.square().sum(), [x, *model.parameters()])
            grads = torch.autograd.grad(ours.square().sum(), [x, *twin.parameters()])
            for ours, theirs in zip(grads, wanted, strict=True):
                torch.testing.assert_close(ours, theirs)
            assert all(g.stride() == p.stride() for g, p in zip(grads[1:], twin.parameters(), strict=True))


@pytest.mark.parametrize(("name", "strict"), [("residual", True), ("encoder", False)])
def test_a_model_exports_with_dynamic_shapes(name, strict):
    model, shape = quantized(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(4, *shape)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(9, *shape)
    assert torch.equal(program.module()(x), model(x))


def test_a_model_compiled_inside_the_block_is_quantized():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(6, 4))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = torch.randn(2, 6)
        first = compiled(x)
    assert torch.equal(first, model(x))
    assert torch.equal(compiled(x), first)
    assert qp.audit(compiled, x).share == 1.0


class Block(nn.Module):
    """One of a stack."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of blocks
@pytest.mark.sweep(2)
@pytest.mark.parametrize("training", [True, False])
def test_blocks_that_differ_in_ranges_and_zero_points_share_a_graph(training):
    torch.manual_seed(0)
    with qp.quantize_modules():
        stack = nn.Sequential(*[Block() for _ in range(4)]).train(training)
    qp.calibrate(stack, [torch.randn(4, 6)], progress=False)
    for zero_point, block in zip((0, 40, 141, 141), stack, strict=True):
        block.up.input_quantizer.use_zero_point(zero_point)
        block.down.input_quantizer.use_zero_point(0)
    eager, x, graphs = copy.deepcopy(stack), torch.randn(5, 6, requires_grad=training), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in stack:
        block.compile(backend=backend, fullgraph=True)
    with torch.set_grad_enabled(training):
        stack(x)
        for model in (stack, eager):  # a change is seen as well
            model[3].up.input_quantizer.use_zero_point(7)
        ours, wanted = stack(x), eager(x)
    assert torch.equal(ours, wanted)
    if torch.__version__ >= "2.12":  # older ones may compile each block
        assert len(graphs) == 1
    if training:
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, wanted)]
        assert torch.equal(*grads)


# --- Whatever changes after compilation is seen -----------------------------------------------------------


def shrink_range(model):
    for quantizer in named_quantizers(model).values():
        quantizer.amax.mul_(0.9)


def set_range(model):
    for quantizer in named_quantizers(model).values():
        quantizer.amax = quantizer.amax * 0.9


def forget_range(model):
    model[0].input_quantizer.amax = None


def load_state(model):
    model.load_state_dict({key: value * 0.5 for key, value in model.state_dict().items()})


def change_weight(model):
    with torch.no_grad():
        model[0].weight.mul_(-0.8)


def change_data(model):
    model[0].weight.data = model[0].weight.data * 0.9


def calibrate(model):
    qp.calibrate(model, [torch.randn(32, 6) * 0.1], progress=False, existing="overwrite")


def disable(model):
    model[0].input_quantizer.disable()


def configure(model):
    qp.configure(model, {"0.input_quantizer": qp.QuantDescriptor(num_bits=3)})


CHANGES = [
    shrink_range, set_range, forget_range, load_state, change_weight, change_data, calibrate, disable,
    configure, qp.revert,
]  # fmt: skip


@pytest.mark.sweep(2)
@pytest.mark.parametrize("grad", [True, False])
def test_what_changes_after_compilation_is_seen(grad):
    torch.manual_seed(1)
    model = small()
    x = torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(recompile_limit=32):
        for change in CHANGES:
            before = compiled(x)
            assert torch.equal(before, model(x)), change.__name__
            change(model)
            after = compiled(x)
            assert torch.equal(after, model(x)), change.__name__
            assert not torch.equal(before, after), change.__name__


def test_what_is_enabled_calibrated_and_converted_after_compilation_is_seen():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = [compiled(x)]
    qp.convert(model)
    model[2].input_quantizer.disable()
    seen.append(compiled(x))
    qp.calibrate(model, [torch.randn(32, 6)], progress=False)
    seen.append(compiled(x))
    model[2].input_quantizer.enable()
    seen.append(compiled(x))
    assert torch.equal(seen[-1], model(x))
    assert len({tuple(y.flatten().tolist()) for y in seen}) == len(seen)


def test_folded_weights_are_quantized_in_no_call_and_undone_again():
    torch.manual_seed(1)
    model, x, graphs = small(), torch.randn(5, 6), []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        before = compiled(x)
        with qp.folded_weights(model):
            assert torch.equal(compiled(x), before)
        assert torch.equal(compiled(x), before)
        change_weight(model)
        assert torch.equal(compiled(x), model(x))
    roundings = [sum("round" in str(target) for target in graph) for graph in graphs]
    assert roundings == [4, 2]  # of two weights and two inputs; of the inputs
