"""Multi-head attention and the transformer layers around it: every product quantized, no fast path."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import quantpatch as qp
from quantpatch.errors import InputError
from quantpatch.layers import QuantMultiheadAttention
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import QuantDescriptor

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

OPERANDS = ["query", "key", "value", "in_proj_weight", "out_proj_weight", "q", "k", "v", "probabilities",
            "out_proj_input"]  # fmt: skip


def coarse(x, amax):
    return (x / amax).round().clamp(-1, 1) * amax


def made(**kwargs):
    torch.manual_seed(0)
    layer = QuantMultiheadAttention(8, 2, **kwargs)
    with torch.no_grad():
        layer.in_proj_bias.uniform_(-0.5, 0.5)
    return layer


def with_coarse_ranges(layer):
    for position, operand in enumerate(OPERANDS):
        amax = 0.25 if operand == "probabilities" else 0.6 + 0.05 * position
        quantizer = TensorQuantizer(QuantDescriptor(num_bits=2, narrow_range=True, amax=amax))
        layer._modules[f"{operand}_quantizer"] = quantizer
    return {operand: layer.quantizer(operand).amax.item() for operand in OPERANDS}


def attention_by_hand(layer, amax, query, key, value):
    """Positions first; the formula of the paper, with every operand of every product quantized."""
    length, batch, _ = query.shape
    weights = coarse(layer.in_proj_weight, amax["in_proj_weight"]).chunk(3)
    heads = []
    for x, name, weight, bias, inner in zip(
        (query, key, value),
        ("query", "key", "value"),
        weights,
        layer.in_proj_bias.chunk(3),
        "qkv",
        strict=True,
    ):
        projected = F.linear(coarse(x, amax[name]), weight, bias)
        split = projected.view(x.shape[0], batch, 2, 4).permute(1, 2, 0, 3)
        heads.append(coarse(split, amax[inner]))
    q, k, v = heads
    probabilities = coarse((q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1), amax["probabilities"])
    joined = (probabilities @ v).permute(2, 0, 1, 3).reshape(length, batch, 8)
    weight = coarse(layer.out_proj.weight, amax["out_proj_weight"])
    return F.linear(coarse(joined, amax["out_proj_input"]), weight, layer.out_proj.bias), probabilities


@pytest.mark.parametrize("need_weights", [True, False])
def test_every_product_is_of_quantized_operands(need_weights):
    layer = made()
    amax = with_coarse_ranges(layer)
    assert sorted(layer.quantizers()) == sorted(f"{operand}_quantizer" for operand in OPERANDS)
    data = torch.randn(5, 3, 8), torch.randn(6, 3, 8), torch.randn(6, 3, 8)
    expected, probabilities = attention_by_hand(layer, amax, *data)
    output, weights = layer(*data, need_weights=need_weights, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    if need_weights:
        torch.testing.assert_close(weights, probabilities)


def test_without_quantized_probabilities_the_fused_kernel_gives_the_same():
    layer = made()
    with_coarse_ranges(layer)
    layer.probabilities_quantizer.disable()
    data = (torch.randn(5, 3, 8),) * 3
    mask = torch.randn(5, 5)
    fused = layer(*data, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(fused, layer(*data, attn_mask=mask)[0])


def test_separate_projections_each_have_a_weight_quantizer():
    layer = made(kdim=4, vdim=7)
    assert list(layer.weight_axes()) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"]
    data = torch.randn(5, 3, 8), torch.randn(6, 3, 4), torch.randn(6, 3, 7)
    plain = layer(*data)[0]
    for name in layer.weight_axes():
        amax = layer.quantizer(name).amax
        layer.quantizer(name).amax = 0.01 * torch.ones(8, 1)
        assert not torch.equal(layer(*data)[0], plain)
        layer.quantizer(name).amax = amax


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_our_path_is_torchs_slow_path(need_weights, grad, batch_first):
    """With quantizers that only watch, the result is torch's but for the order of sums.

    Ours takes products of the tensors as they lie in memory; torch transposes and copies them before.
    """
    layer = made(batch_first=batch_first, add_bias_kv=True).eval()
    twin = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True).eval()
    twin.load_state_dict(qp.float_state_dict(layer))
    for quantizer in layer.quantizers().values():
        quantizer.disable_quant()
        quantizer.enable_calib()
    layer.probabilities_quantizer.disable()
    x, y = (torch.randn(3, n, 8) if batch_first else torch.randn(n, 3, 8) for n in (5, 6))
    with torch.set_grad_enabled(grad):
        for data in ((x, x, x), (x, y, y)):
            ours, theirs = (m(*data, need_weights=need_weights)[0] for m in (layer, twin))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_where_every_key_is_hidden_output_and_gradients_are_those_of_torch(dtype):
    layer = made()
    twin = nn.MultiheadAttention(8, 2)
    twin.load_state_dict(qp.float_state_dict(layer))
    x = torch.randn(5, 3, 8, requires_grad=True)
    hidden = torch.zeros(3, 5, dtype=dtype)
    hidden[1] = True if dtype == torch.bool else -torch.inf
    theirs = twin(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    (wanted,) = torch.autograd.grad(theirs.sum(), x)
    for need_weights in (True, False):
        ours = layer(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)
        (got,) = torch.autograd.grad(ours.sum(), x)
        torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.1)


def test_dropout_does_not_move_the_range_of_probabilities():
    layer = made(dropout=0.5)
    layer.probabilities_quantizer.enable_calib()
    x = torch.randn(5, 3, 8)
    torch.manual_seed(0)
    layer(x, x, x)
    layer.probabilities_quantizer.load_calib_amax()
    assert layer.probabilities_quantizer.amax <= 1
    levels = layer.probabilities_quantizer.amax / 127
    weights = layer(x, x, x, average_attn_weights=False)[1]
    steps = weights * 0.5 / levels  # dropout of one half doubles what it keeps
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_one_input_is_quantized_once_where_its_quantizers_agree(monkeypatch):
    layer = made()
    x = torch.randn(5, 3, 8)
    calls = []
    layer.query_quantizer.register_forward_hook(lambda *_: calls.append("query"))
    layer.key_quantizer.register_forward_hook(lambda *_: calls.append("key"))
    layer.value_quantizer.register_forward_hook(lambda *_: calls.append("value"))

    def called(*data):
        calls.clear()
        layer(*data)
        return list(calls)

    assert called(x, x, x) == ["query"]  # ranges of the tensor itself
    assert called(x, x.clone(), x) == ["query", "key"]
    for quantizer in (layer.query_quantizer, layer.key_quantizer, layer.value_quantizer):
        quantizer.amax = 2.0
    assert called(x, x, x) == ["query"]
    shared = layer(x, x, x)[0]
    layer.key_quantizer.amax = 3.0
    assert called(x, x, x) == ["query", "key"]
    layer.key_quantizer.amax.copy_(torch.tensor(2.0))
    assert called(x, x, x) == ["query"]
    layer.key_quantizer.disable()
    assert called(x, x, x) == ["query", "key"]
    layer.key_quantizer.enable()
    layer.query_quantizer.enable_calib()
    assert called(x, x, x) == ["query", "key"]  # statistics are collected of each
    layer.query_quantizer.disable_calib()
    monkeypatch.setattr(TensorQuantizer, "agrees_with", lambda self, other: False)
    torch.testing.assert_close(layer(x, x, x)[0], shared)


def test_the_causal_hint_needs_its_mask():
    layer = made()
    x = torch.randn(5, 3, 8)
    with pytest.raises(InputError, match="generate_square_subsequent_mask"):
        layer(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.randn(5, 3, 6)}, "expected embed_dim=8"),
        ({"key": torch.randn(7, 3, 8)}, "other lengths"),
        ({"attn_mask": torch.zeros(4, 5)}, r"attn_mask: expected \(5, 5\), got \(4, 5\)"),
        ({"key_padding_mask": torch.zeros(3, 4)}, r"expected \(3, 5\), got \(3, 4\)"),
    ],
)
def test_wrong_shapes(arguments, message):
    layer = made()
    x = torch.randn(5, 3, 8)
    with pytest.raises(InputError, match=message):
        layer(**{"query": x, "key": x, "value": x, **arguments})


def test_it_is_left_alone_by_forward_hooks_on_out_proj_as_in_torch():
    layer = made()
    layer.out_proj.register_forward_hook(lambda *_: pytest.fail("torch does not call out_proj"))
    x = torch.randn(5, 3, 8)
    layer(x, x, x)


# --- the layers around it -----------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


FAST = {"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"}


class UsersOwn(nn.TransformerEncoderLayer):
    """No entry covers it, and it takes torch's forward as it is."""


def encoder_layer(kind=nn.TransformerEncoderLayer, **options):
    torch.manual_seed(0)
    return kind(8, 2, 16, dropout=0.0, batch_first=True, **options)


def operators(model, *data, **kwargs):
    with torch.no_grad(), Operators() as mode:
        model.eval()(*data, **kwargs)
    return mode.names


def test_torch_takes_its_fast_path_for_float_layers():
    x = torch.randn(3, 5, 8)
    assert operators(encoder_layer(), x) & FAST
    assert operators(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x) & FAST


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, UsersOwn])
@pytest.mark.parametrize("skip", [(), ("MultiheadAttention",), ("Linear",)])
def test_no_fast_path_passes_by_a_quantizer(kind, skip):
    with qp.quantize_modules(skip=skip):
        layer = encoder_layer(kind)
    x = torch.randn(3, 5, 8)
    assert "aten::_transformer_encoder_layer_fwd" not in operators(layer, x)
    reached = set()
    for name, quantizer in layer.named_modules():
        if isinstance(quantizer, TensorQuantizer):
            quantizer.register_forward_hook(lambda *_, name=name: reached.add(name))
    assert "aten::_transformer_encoder_layer_fwd" not in operators(layer, x)
    assert any("linear1.weight" in name for name in reached) == ("Linear" not in skip)
    assert any("in_proj_weight" in name for name in reached) == ("MultiheadAttention" not in skip)
    if not skip:
        assert not operators(layer, x) & FAST


class HoldsQuantizer(nn.Linear):
    """A layer of the user's own, which no base class tells torch of."""

    def __init__(self):
        super().__init__(16, 8)
        self.quantizer = TensorQuantizer()

    def forward(self, x):
        return super().forward(self.quantizer(x))


def test_no_fast_path_passes_by_a_quantizer_in_a_users_own_layer():
    layer = encoder_layer()
    layer.linear2 = HoldsQuantizer()
    assert not operators(layer, torch.randn(3, 5, 8)) & {"aten::_transformer_encoder_layer_fwd"}


def test_layers_that_a_recipe_leaves_float_take_the_fast_path():
    layer = encoder_layer()
    qp.convert(layer, recipe=qp.Recipe(name="none", input=None, weight=None))
    assert operators(layer, torch.randn(3, 5, 8)) & FAST


def test_a_reverted_model_takes_the_fast_path_again():
    layer = encoder_layer()
    qp.convert(layer)
    qp.revert(layer)
    assert operators(layer, torch.randn(3, 5, 8)) & FAST
    assert not any(module._forward_pre_hooks for module in layer.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_eval_and_training_quantize_alike(mode):
    with qp.quantize_modules():
        layer = encoder_layer()
    x = torch.randn(3, 5, 8)
    expected = layer.train()(x)
    with mode():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_an_encoder_of_the_block_makes_no_nested_tensors():
    with qp.quantize_modules():
        model = nn.TransformerEncoder(encoder_layer(), 2)
    float_model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    float_model.load_state_dict(qp.float_state_dict(model), strict=True)
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    assert not operators(model, x, src_key_padding_mask=padding) & FAST
    with torch.no_grad():
        ours = model(x, src_key_padding_mask=padding)
        theirs = float_model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], theirs[~padding], atol=0.2, rtol=0.1)


def test_a_nested_tensor_is_an_error_that_says_what_to_do():
    with qp.quantize_modules(skip=["TransformerEncoder"]):
        layer = encoder_layer()
    model = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), pytest.raises(InputError, match="enable_nested_tensor=False"):
        model(torch.randn(2, 5, 8), src_key_padding_mask=padding)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}, {"activation": "gelu"}])
def test_a_whole_transformer(options):
    with qp.quantize_modules() as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are not possible with some options
        model = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True, **options)
    replaced = {row.target: row.count for row in scope.replaced}
    assert replaced["torch.nn.MultiheadAttention"] == 3
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    reached = set()
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, TensorQuantizer):
            quantizer.register_forward_hook(lambda *_, name=name: reached.add(name))
    assert not operators(model, source, target, tgt_mask=mask, tgt_is_causal=True) & FAST
    quantizers = {name for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    # Of self-attention the three inputs are one tensor, which one quantizer takes.
    shared = {n for n in quantizers if n.endswith(("key_quantizer", "value_quantizer"))}
    assert quantizers - reached <= shared
    qp.calibrate(model, lambda m: m(source, target, tgt_mask=mask))
    output = model.train()(source, target, tgt_mask=mask)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(copy.deepcopy(model)(source, target, tgt_mask=mask), output)
