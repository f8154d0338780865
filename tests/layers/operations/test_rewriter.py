"""Operands inside a forward: every spelling of an operation is found, and nothing else is touched."""

from __future__ import annotations

import importlib
import inspect
import linecache
import sys
import traceback

import blocks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.errors import LayerError
from quantpatch.testing import CHECKS, assert_layer_conforms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning"  # torch.compile's
)


def quantized(float_class, operations, **members):
    return type(f"Quant{float_class.__name__}", (qp.QuantizedLayer, float_class),
                {"operations": operations, "__module__": __name__, **members})  # fmt: skip


def with_ranges(layer):
    """Two bits and a range of its own for each quantizer, so that each can be told from the others."""
    two_bits = qp.QuantDescriptor(num_bits=2, narrow_range=True)
    layer.add_quantizers(qp.Recipe(name="coarse", input=two_bits, weight=two_bits))
    for position, quantizer in enumerate(layer.quantizers().values()):
        quantizer.amax = 0.5 + 0.1 * position
    return layer


@pytest.mark.parametrize("float_class", blocks.SUMS, ids=lambda c: c.__name__)
def test_every_spelling_of_a_sum_is_found_and_computes_as_before(float_class):
    layer = with_ranges(quantized(float_class, {torch.add: ("left", "right")})())
    assert list(layer.quantizers()) == ["left_quantizer", "right_quantizer"]
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    ours = layer(x, y)
    assert torch.equal(ours, float_class()(layer.quantizer("left")(x), layer.quantizer("right")(y)))
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    assert torch.equal(layer(x, y), float_class()(x, y))


def test_a_local_variable_is_not_taken_for_the_global_of_its_name():
    layer = with_ranges(quantized(blocks.Shadowed, {torch.add: ("left", "right")})())
    assert list(layer.quantizers()) == ["left_quantizer", "right_quantizer"]  # of the one sum, by +
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(layer(x, y), layer.quantizer("left")(x - y) + layer.quantizer("right")(y - y))


def test_operands_without_a_name_stay_float():
    layer = with_ranges(quantized(blocks.InPlace, {torch.add: (None, "skip")})())
    assert list(layer.quantizers()) == ["skip_quantizer"]
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(layer(x, y), x + layer.quantizer("skip")(y))


def test_products_with_functions_need_no_copy_of_their_forward():
    operations = {
        F.linear: ("first",),
        F.conv1d: ("second",),
        torch.matmul: ("q", "k"),
        F.scaled_dot_product_attention: ("query", "key", "value"),
    }
    made = quantized(blocks.Products, operations, weights={"weight": 0, "kernel": 0})
    layer = with_ranges(made())
    names = {"first", "second", "q", "k", "q_1", "k_1", "query", "key", "value", "weight", "kernel"}
    assert {name.removesuffix("_quantizer") for name in layer.quantizers()} == names
    q = layer.quantize_operand
    x = torch.randn(2, 6, 4)
    with torch.no_grad():
        weights = layer.quantize_weights()
        y = F.linear(q("first", x.tanh()), weights["weight"])
        y = F.conv1d(q("second", y.transpose(1, 2)), weights["kernel"], padding=1).transpose(1, 2)
        scores = torch.matmul(q("q", x), q("k", y.transpose(1, 2))).softmax(-1)
        value = q("q_1", scores) @ q("k_1", y)
        expected = F.scaled_dot_product_attention(q("query", x), q("key", y), q("value", value))
        assert torch.equal(layer(x), expected)


def test_blocks_of_a_format_run_along_the_axis_that_a_product_sums_over():
    layer = quantized(blocks.Products, {torch.matmul: ("q", "k")})()
    assert layer.weights == {}
    assert layer.inputs == ()
    axes = {name: descriptor.axis for name, descriptor in layer.descriptors(qp.recipe("mxfp8"))}
    assert axes == {"q": -1, "k": -2, "q_1": -1, "k_1": -2}


def test_places_are_numbered_in_the_order_they_are_computed():
    layer = with_ranges(quantized(blocks.Chain, {torch.add: ("left", "right")})())
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    q = layer.quantize_operand
    expected = q("left_1", q("left", x) + q("right", y)) + q("right_1", x * 2)
    assert torch.equal(layer(x, y), expected)


def test_a_block_inside_a_block_has_quantizers_of_its_own():
    custom = [(blocks, "Block", QuantBlock)]
    with qp.quantize_modules(custom=custom):
        float_inner = blocks.Block(4, 2)  # what a replacement builds of its own target is float
    assert type(float_inner) is QuantBlock
    model = nn.Sequential(blocks.Block(4), blocks.Block(4))
    qp.convert(model, custom=custom)
    qp.calibrate(model, torch.randn(2, 4, 5, 5))
    assert {name for name in model.state_dict() if "skip" in name} == {
        "0.skip_quantizer._amax",
        "1.skip_quantizer._amax",
    }


class QuantBlock(qp.QuantizedLayer, blocks.Block):
    operations = {torch.add: ("branch", "skip")}


def test_a_residual_block_passes_the_checks_of_the_kit():
    # Of those that trace one: the others go the same way, and files are tested with quantpatch-residual.
    checks = tuple(name for name, check in CHECKS.items() if not check.traces or name == "compiled")
    passed = assert_layer_conforms(
        (blocks, "Block", QuantBlock),
        lambda: blocks.Block(4),
        lambda: (torch.randn(2, 4, 5, 5),),
        checks=checks,
        plugins=[],
    )
    assert passed == checks


def test_a_traceback_names_the_line_of_the_float_class():
    layer = QuantBlock(4)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.zeros(1))
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "out = self.relu(self.norm1(self.conv1(x)))" in lines


def test_the_float_class_is_left_alone():
    before = {name: vars(blocks.Helper)[name] for name in vars(blocks.Helper)}
    spaces = len(vars(blocks))
    made = quantized(blocks.Helper, {torch.add: ("left", "right")})
    assert {name: vars(blocks.Helper)[name] for name in vars(blocks.Helper)} == before
    assert len(vars(blocks)) == spaces
    assert "_sum" in vars(made)
    assert inspect.signature(made._sum) == inspect.signature(blocks.Helper._sum)


def test_globals_are_looked_up_when_it_runs(monkeypatch):
    layer = quantized(blocks.Alias, {torch.add: ("left", "right")})()
    monkeypatch.setattr(blocks, "OTHER", torch.sub)
    assert torch.equal(layer(torch.ones(2), torch.ones(2)), torch.zeros(2))


# --- What is wrong is told ------------------------------------------------------------------------


def test_a_forward_without_the_operation_is_an_error():
    with pytest.raises(LayerError, match=r"NoSum.forward, with the methods it calls, has no add or matmul"):
        quantized(blocks.NoSum, {torch.add: ("a", "b"), torch.matmul: ("c", "d")})


@pytest.mark.parametrize("float_class", [blocks.Starred, blocks.CalledTarget], ids=lambda c: c.__name__)
def test_a_hidden_operand_is_an_error_that_shows_the_line(float_class):
    with pytest.raises(LayerError, match=r"`(torch.add\(|self.find).*quantize_operand"):
        quantized(float_class, {torch.add: ("a", "b")})


def test_a_class_without_source_is_an_error():
    namespace = {"nn": nn, "__name__": "nowhere"}
    exec("class Made(nn.Module):\n    def forward(self, x, y):\n        return x + y", namespace)
    with pytest.raises(LayerError, match=r"needs the source of Made.forward, which cannot be read"):
        quantized(namespace["Made"], {torch.add: ("a", "b")})


CHANGING = """
from torch import nn


class Changing(nn.Module):
    def forward(self, x, y):
        return x + y
"""


def test_a_source_that_changed_since_its_import_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "changing.py"
    file.write_text(CHANGING)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("changing")
    file.write_text(CHANGING.replace("x + y", "x.shiny + y"))
    linecache.checkcache()
    with pytest.raises(LayerError, match="is not what was imported"):
        quantized(module.Changing, {torch.add: ("a", "b")})
    del sys.modules["changing"]
