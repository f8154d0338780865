"""Operations as modules: float outside a block, quantized inside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.layers import operand_modules

X, Y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, False, False, True]] * 4)
NOTHING = MASK & torch.tensor([[False], [True], [True], [True]])  # the first position sees no key

# How to build it, its arguments, and what it computes.
CASES = {
    "add": (operand_modules.Add, (X, Y), lambda: X + Y),
    "add broadcast": (operand_modules.Add, (X, Y[0, 0]), lambda: X + Y[0, 0]),
    "mul": (operand_modules.Mul, (X, Y), lambda: X * Y),
    "matmul": (operand_modules.MatMul, (X, Y), lambda: X @ Y),
    "cat": (lambda: operand_modules.Cat(1), ([X, Y],), lambda: torch.cat([X, Y], 1)),
    "attention": (
        operand_modules.ScaledDotProductAttention,
        (X, Y, X),
        lambda: F.scaled_dot_product_attention(X, Y, X),
    ),
    "causal attention": (
        lambda: operand_modules.ScaledDotProductAttention(is_causal=True, scale=0.3),
        (X, Y, X),
        lambda: F.scaled_dot_product_attention(X, Y, X, is_causal=True, scale=0.3),
    ),
    "masked attention": (
        operand_modules.ScaledDotProductAttention,
        (X, Y, X, MASK),
        lambda: F.scaled_dot_product_attention(X, Y, X, MASK),
    ),
    "attention to nothing": (
        operand_modules.ScaledDotProductAttention,
        (X, Y, X, torch.zeros(4, 4).masked_fill(~NOTHING, -torch.inf)),
        lambda: F.scaled_dot_product_attention(X, Y, X, NOTHING),
    ),
}


def quantized(name, recipe="int8"):
    with qp.quantize_modules(recipe=recipe):
        return CASES[name][0]().eval()


@pytest.mark.parametrize("name", CASES)
def test_outside_a_block_it_computes_the_plain_operation(name):
    build, args, expected = CASES[name]
    module = build().eval()
    assert not isinstance(module, qp.QuantizedLayer)
    assert torch.equal(module(*args), expected())


@pytest.mark.parametrize("name", CASES)
def test_inside_a_block_it_is_quantized_and_exact_when_disabled(name):
    module = quantized(name)
    _, args, expected = CASES[name]
    assert type(module).__name__.startswith("Quant")
    close = module(*args)
    assert not torch.equal(close, expected())
    torch.testing.assert_close(close, expected(), atol=0.1, rtol=0.1)
    for quantizer in module.quantizers().values():
        quantizer.disable()
    assert torch.equal(module(*args), expected())


@pytest.mark.parametrize("name", CASES)
def test_every_operand_counts(name):
    module = quantized(name)
    _, args, _ = CASES[name]
    before = module(*args)
    for quantizer in module.quantizers().values():
        quantizer.disable()
        assert not torch.equal(module(*args), before)
        quantizer.enable()


@pytest.mark.parametrize("name", CASES)
def test_it_copies_pickles_reverts_and_converts(name):
    module = quantized(name)
    _, args, expected = CASES[name]
    result = module(*args)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*args), result)
    model = nn.Sequential(module)
    qp.revert(model)
    assert torch.equal(model[0](*args), expected())
    qp.convert(model)
    assert torch.equal(model[0](*args), result)


def test_a_list_may_begin_with_a_tensor_of_nothing():
    """``torch.cat`` passes over it, and code that collects tensors begins so."""
    nothing = torch.tensor([])
    assert torch.equal(quantized("cat")([nothing, X, Y]), quantized("cat")([X, Y]))
    assert torch.equal(quantized("cat")([nothing]), nothing)


def test_what_is_put_together_has_one_scale():
    module = quantized("cat")
    small = X * 1e-3
    out = module([small, Y])
    step = torch.cat([small, Y], 1).abs().max() / 127
    assert torch.equal(out[:, :3], (small / step).round() * step)


def test_attention_is_covered_whole_and_with_float_probabilities_by_half():
    module = quantized("attention")
    assert qp.audit(module, (X, Y, X)).share == 1.0
    module.probabilities_quantizer.disable()
    report = qp.audit(module, (X, Y, X))
    assert report.share == 0.5


def test_probabilities_are_dropped_in_training_only():
    with qp.quantize_modules():
        module = operand_modules.ScaledDotProductAttention(dropout=0.5)
    assert not torch.equal(module(X, Y, X), module.eval()(X, Y, X))
    assert torch.equal(module(X, Y, X), module(X, Y, X))


def test_gradients_reach_every_input():
    for name, (_, args, _) in CASES.items():
        leaves = [
            t.clone().requires_grad_() for t in (args[0] if name == "cat" else args) if t.is_floating_point()
        ]
        module = quantized(name)
        rest = [t for t in args[1:] if isinstance(t, torch.Tensor) and not t.is_floating_point()]
        module(leaves, *rest).sum().backward() if name == "cat" else module(
            *leaves, *rest
        ).square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves), name
