"""Embedding tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.layers import QuantEmbedding, QuantEmbeddingBag


def test_they_are_quantized_on_request():
    with qp.quantize_modules():
        assert type(nn.Embedding(10, 4)) is nn.Embedding
    with qp.quantize_modules(include=["Embedding"]):
        assert type(nn.Embedding(10, 4)) is QuantEmbedding


@pytest.mark.parametrize("cls", [QuantEmbedding, QuantEmbeddingBag])
def test_renormalizing_works_on_the_table_and_stays_on_the_grid(cls):
    torch.manual_seed(0)
    layer = cls(10, 4, max_norm=0.5)
    twin = cls.float_class(10, 4, max_norm=0.5)
    twin.load_state_dict(qp.float_state_dict(layer))
    layer.weight_quantizer.amax = torch.full((10, 1), 0.5)
    indices = torch.tensor([[1, 2], [3, 4]])
    output = layer(indices)
    twin(indices)
    assert torch.equal(layer.weight, twin.weight)
    assert layer.max_norm == 0.5
    rows = layer.weight_quantizer(layer.weight)[indices]
    torch.testing.assert_close(output, rows if cls is QuantEmbedding else rows.mean(1))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(input=indices), output)


def test_from_pretrained():
    table = torch.randn(10, 4)
    layer = QuantEmbedding.from_pretrained(table)
    assert type(layer) is QuantEmbedding
    assert not layer.weight.requires_grad
    assert not torch.equal(layer(torch.arange(10)), table)
    torch.testing.assert_close(layer(torch.arange(10)), table, atol=0.05, rtol=0.05)


def test_the_padding_row_gets_no_gradient():
    layer = QuantEmbedding(10, 4, padding_idx=2)
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.weight.grad[2].abs().sum() == 0
    assert layer.weight.grad[1].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's
def test_a_table_compiles_after_another_was_renormalized():
    """The other's call has left its class a property, which the compiler must not take for one of torch's."""
    indices = torch.arange(3)
    QuantEmbedding(5, 4, max_norm=1.0).eval()(indices)
    layer = QuantEmbedding(5, 4).eval()
    in_one_graph = torch.__version__ >= "2.12"
    compiled = torch.compile(layer, backend="eager", fullgraph=in_one_graph)
    assert torch.equal(compiled(indices), layer(indices))
    if not in_one_graph:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"of QuantEmbedding .* torch 2\.12"):
            torch.compile(layer, backend="eager", fullgraph=True)(indices)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_a_sparse_table_trains_as_a_dense_one(kind, learned):
    """Its gradient is dense, as all of the table is quantized."""
    recipe = qp.Recipe(name="rows", weight=qp.QuantDescriptor(num_bits=4, axis="channel", learn_amax=learned))
    tables = []
    for sparse in (True, False):
        torch.manual_seed(0)
        with qp.quantize_modules(recipe=recipe, include=[kind]):
            tables.append(getattr(nn, kind)(10, 8, sparse=sparse))
        qp.calibrate(tables[-1], [torch.tensor([[0, 1], [2, 3]])], progress=False)
        with torch.no_grad():
            tables[-1].weight.mul_(1.3)  # so that some elements are outside of their ranges
        optimizer = torch.optim.SGD(tables[-1].parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            tables[-1](torch.tensor([[1, 2], [2, 7]])).square().sum().backward()
            optimizer.step()
    for one, other in zip(tables[0].parameters(), tables[1].parameters(), strict=True):
        assert torch.equal(one, other)
    tables[0].weight_quantizer.disable()
    tables[0].weight.grad = None
    tables[0](torch.tensor([[1, 2]])).sum().backward()
    assert tables[0].weight.grad.is_sparse  # as in float
