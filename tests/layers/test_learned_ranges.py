"""What the gradient of a learned range counts: the features that share it, not the examples in a batch."""

import math

import pytest
import torch
from torch import nn

import quantpatch as qp

# Both in torch's operations and in kernels of our own.
pytestmark = pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernels"], indirect=True)


def gradient_to_range(quantizer, x, upstream, batch_axis, pieces):
    quantizer.amax.grad = None
    for part, grad in zip(x.chunk(pieces, batch_axis), upstream.chunk(pieces, batch_axis), strict=True):
        quantizer(part, batch_axis=batch_axis).backward(grad)
    return quantizer.amax.grad


@pytest.mark.parametrize("axis", [None, 2])
@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize("size", [8, 64], ids=["small", "in a kernel"])
def test_examples_in_one_batch_are_worth_what_they_are_in_several(axis, batch_axis, size):
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4, axis=axis, learn_amax=True))
    x, upstream = torch.randn(8, 8, size), torch.randn(8, 8, size)
    quantizer.amax = torch.rand(1, 1, size) + 1 if axis is not None else 1.5
    whole, split = (gradient_to_range(quantizer, x, upstream, batch_axis, n) for n in (1, 4))
    torch.testing.assert_close(whole, split)


@pytest.mark.parametrize(
    ("shape", "axis", "batch_axis", "features"),
    [
        ((5, 6, 7), None, 0, 42),
        ((5, 6, 7), None, 1, 35),
        ((5, 6, 7), None, None, 210),  # a weight
        ((5, 6, 7), 2, 0, 6),
        ((5, 6, 7), 0, None, 42),
        ((5, 6), 0, 0, 6),  # each example has a range of its own
        ((5,), None, 0, 5),  # features alone
    ],
)
def test_of_a_learned_range_the_features_that_share_it_count(shape, axis, batch_axis, features):
    """LSQ's g = 1 / sqrt(N * Q), of the scale; beyond the range its slope is the end of the grid."""
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4, axis=axis, learn_amax=True))
    quantizer.amax = torch.ones(
        [n if d == axis else 1 for d, n in enumerate(shape)] if axis is not None else []
    )
    quantizer(torch.full(shape, 3.0), batch_axis=batch_axis).sum().backward()
    count = math.prod(shape) / quantizer.amax.numel()
    expected = 7 * count * 7 / math.sqrt(features * 7)
    torch.testing.assert_close(quantizer.amax.grad, torch.full_like(quantizer.amax, expected))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_the_features_count_too(dynamic):
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4, learn_amax=True))
    quantizer.amax = 1.0
    torch.compiler.reset()
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for examples in (6, 9):
        found = []
        x = torch.randn(examples, 5)
        for call in (quantizer, compiled):
            quantizer.amax.grad = None
            call(x).square().sum().backward()
            found.append(quantizer.amax.grad)
        torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for clamp_
def test_under_transforms_the_features_count_too():
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4, learn_amax=True))
    quantizer.amax = 1.0
    x = torch.randn(6, 5)
    quantizer(x).square().sum().backward()
    expected = quantizer.amax.grad
    ranges = {"_amax": quantizer.amax.detach()}
    total = torch.func.grad(lambda r: torch.func.functional_call(quantizer, r, (x,)).square().sum())(ranges)
    torch.testing.assert_close(total["_amax"], expected)
    one = torch.func.grad(lambda r, v: torch.func.functional_call(quantizer, r, (v,)).square().sum())
    # Each example for itself has one axis, of as many features.
    each = torch.func.vmap(one, in_dims=(None, 0))(ranges, x)
    torch.testing.assert_close(each["_amax"].sum(0), expected)


@pytest.mark.parametrize("build", ["LSTM", "MultiheadAttention"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_say_where_their_examples_are(build, batch_first):
    recipe = qp.Recipe(name="learned", input=qp.QuantDescriptor(learn_amax=True), weight=None)
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        options = {"batch_first": batch_first}
        layer = nn.LSTM(6, 4, **options) if build == "LSTM" else nn.MultiheadAttention(6, 2, **options)
    x = torch.randn(8, 5, 6)  # eight examples of five positions
    qp.calibrate(layer, [(x,) if build == "LSTM" else (x, x, x)], progress=False)
    quantizers = {
        n: q for n, q in layer.named_modules() if isinstance(q, qp.TensorQuantizer) and q.amax is not None
    }

    def gradients(pieces):
        layer.zero_grad()
        for part in x.chunk(pieces):
            part = part if batch_first else part.transpose(0, 1)
            layer(*[part] * (1 if build == "LSTM" else 3))[0].sum().backward()
        return {name: q.amax.grad.clone() for name, q in quantizers.items() if q.amax.grad is not None}

    whole, split = gradients(1), gradients(4)
    assert len(whole) == (1 if build == "LSTM" else 8)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-5)
