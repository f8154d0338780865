"""Experts held in one parameter: each product's operands are quantized, whichever way it is computed."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import quantpatch as qp
from quantpatch.testing import CHECKS, assert_layer_conforms
from quantpatch_transformers import experts
from quantpatch_transformers_entries import EXPERTS, quantpatch_entries, quantpatch_examples

TOKENS, HIDDEN, INNER, COUNT, CHOICES = 12, 8, 12, 4, 2  # kernels want multiples of 4


def mixtral(implementation="grouped_mm"):
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT, num_experts_per_tok=CHOICES
    )
    config._experts_implementation = implementation
    return MixtralExperts(config)


def gpt_oss(implementation="grouped_mm"):
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT, num_experts_per_tok=CHOICES
    )
    config._experts_implementation = implementation
    return GptOssExperts(config)


def nemotron(implementation="grouped_mm"):
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=COUNT, moe_latent_size=None
    )
    config._experts_implementation = implementation
    return NemotronHExperts(config)


def step(implementation="eager"):
    config = transformers.MixtralConfig(hidden_size=HIDDEN, num_local_experts=COUNT)
    config.moe_intermediate_size = INNER
    return Step3p7Experts(config)


BUILD = {"mixtral": mixtral, "gpt_oss": gpt_oss, "nemotron_h": nemotron, "step3p7": step}
CASES = [
    (name, implementation)
    for name in BUILD
    for implementation in (("eager",) if name == "step3p7" else ("eager", "grouped_mm", "batched_mm"))
]


def filled(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return layer.eval()


def routed():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    # The last expert gets no token.
    scores = torch.rand(TOKENS, COUNT - 1, generator=generator)
    weights, indices = scores.topk(CHOICES, dim=-1)
    return x, indices, weights


def quantized(x, bits, dims):
    """Symmetric, narrow range off; one range for all indices along ``dims``."""
    top = 2 ** (bits - 1) - 1
    amax = x.abs().amax(dim=dims, keepdim=True)
    return torch.where(amax > 0, (x / (amax / top)).round().clamp(-top - 1, top) * (amax / top), 0.0)


def by_hand(layer, x, indices, weights, bits):
    """Each token through each of its experts, one at a time, with all four operands quantized."""
    transposed = getattr(layer, "is_transposed", False)
    reduced = 1 if transposed else 2
    first = layer.gate_up_proj if getattr(layer, "has_gate", True) else layer.up_proj
    up = quantized(first, bits, (reduced,))
    down = quantized(layer.down_proj, bits, (reduced,))
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    bias = getattr(layer, "has_bias", False)
    flat = indices.flatten()
    h = torch.einsum("ti,toi->to", quantized(x, bits, (0, 1)).repeat_interleave(CHOICES, 0), up[flat])
    if bias:
        h = h + layer.gate_up_proj_bias[flat]
    h = layer._apply_gate(h) if getattr(layer, "has_gate", True) else layer.act_fn(h)
    y = torch.einsum("ti,toi->to", quantized(h, bits, (0, 1)), down[flat])
    if bias:
        y = y + layer.down_proj_bias[flat]
    return (y * weights.flatten()[:, None]).view(TOKENS, CHOICES, -1).sum(1), h.abs().max()


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_each_operand_is_quantized_by_expert_and_output_channel(name, implementation):
    bits = 4
    descriptor = qp.QuantDescriptor(num_bits=bits)
    recipe = qp.Recipe(name="4", input=descriptor, weight=qp.QuantDescriptor(num_bits=bits, axis="channel"))
    reference = filled(BUILD[name](implementation))
    with qp.quantize_modules(recipe=recipe):
        layer = BUILD[name](implementation)
    layer.load_state_dict(reference.state_dict())
    layer.eval()
    with torch.no_grad():
        expected, inner_range = by_hand(reference, *routed(), bits)
        # A loop over experts would take ranges that are not known from each expert's tokens.
        layer.quantizer("down_proj_input").amax = inner_range
        torch.testing.assert_close(layer(*routed()), expected)
        assert not torch.equal(reference(*routed()), expected)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_disabled_it_is_the_float_class_bit_for_bit(name, implementation):
    reference = filled(BUILD[name](implementation))
    layer = copy.deepcopy(reference)
    qp.convert(layer)
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    assert torch.equal(layer(*routed()), reference(*routed()))


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_calibrated_ranges_are_the_weights_own_and_gradients_reach_all_operands(name, implementation):
    layer = filled(BUILD[name](implementation))
    qp.convert(layer)
    qp.calibrate(layer, [routed()], progress=False)
    for operand, axes in layer.weight_axes().items():
        weight = getattr(layer, operand)
        reduced = 3 - sum(axes)
        assert torch.equal(layer.quantizer(operand).amax, weight.abs().amax(reduced, keepdim=True))
    assert layer.quantizer("input").amax == routed()[0].abs().max()
    assert layer.quantizer("down_proj_input").amax.shape == ()
    x, indices, weights = routed()
    layer(x.requires_grad_(), indices, weights).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for operand in layer.weight_axes():
        reached = getattr(layer, operand).grad.abs().amax((1, 2)) > 0
        assert reached.tolist() == [True] * (COUNT - 1) + [False]  # the last one had no token


@pytest.mark.parametrize("recipe", ["int8-weight-only", "w4a8", "fp8", "mxfp8", "nvfp4", "int4-weight-only"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_kind_of_recipe_quantizes_along_the_axis_that_is_summed_over(name, recipe):
    layer = filled(BUILD[name]())
    expected = layer(*routed())
    qp.convert(layer, recipe=recipe)
    reduced = 1 if name == "gpt_oss" else 2
    for operand, axes in layer.weight_axes().items():
        quantizer = layer.quantizer(operand)
        axis = quantizer.descriptor.kept_axes
        assert axis == (axes if quantizer.format.block_size is None else reduced)
    output = layer(*routed())
    assert not torch.equal(output, expected)
    assert (output - expected).norm() < 0.4 * expected.norm()


def test_routing_may_be_given_by_name():
    layer = filled(gpt_oss())
    qp.convert(layer)
    x, indices, weights = routed()
    assert torch.equal(layer(x, indices, weights), layer(x, routing_weights=weights, router_indices=indices))


def test_llama4_multiplies_sorted_tokens():
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=COUNT
    )
    layer = filled(Llama4TextExperts(config))
    x = torch.randn(COUNT * 3, HIDDEN, generator=torch.Generator().manual_seed(2))
    expected = layer(x)
    up, down = (quantized(w, 8, (1,)) for w in (layer.gate_up_proj, layer.down_proj))
    gate, value = torch.bmm(quantized(x, 8, (0, 1)).view(COUNT, 3, HIDDEN), up).chunk(2, -1)
    by_hand = torch.bmm(quantized(value * layer.act_fn(gate), 8, (0, 1, 2)), down).view(-1, HIDDEN)
    qp.convert(layer, recipe=qp.Recipe(name="wide", weight=qp.QuantDescriptor(axis="channel")))
    torch.testing.assert_close(layer(x), by_hand)
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    assert torch.equal(layer(x), expected)


def test_jetmoe_has_a_range_for_each_channel_of_each_expert():
    layer = JetMoeParallelExperts(COUNT, HIDDEN, INNER)
    nn.init.normal_(layer.weight)
    qp.convert(layer)
    qp.calibrate(layer, [(torch.randn(TOKENS, HIDDEN), [3, 4, 0, 5])], progress=False)
    assert torch.equal(layer.weight_quantizer.amax, layer.weight.abs().amax(2, keepdim=True))
    assert qp.audit(layer, (torch.randn(TOKENS, HIDDEN), [3, 4, 0, 5])).share == 1.0


def test_it_compiles_to_the_same_values():
    layer = filled(mixtral())
    qp.convert(layer)
    qp.calibrate(layer, [routed()], progress=False)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*routed()), layer(*routed()))


# --- the classes that are made when they are asked for -----------------------------------------------


def test_every_experts_class_of_the_installed_transformers_has_an_entry():
    """The list is text, so that nothing has to be imported for it; here it is held against the source."""
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" in source:
            assert path.stem == f"modeling_{path.parent.name}"
            for name in re.findall(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", source, re.M):
                found.add(f"{path.parent.name}.{name}")
    assert found <= set(EXPERTS)
    assert set(EXPERTS) - found == {"step3p7.Step3p7Experts"}


def test_every_one_of_them_runs_quantized_and_is_exact_when_disabled():
    for example in quantpatch_examples():
        if "Experts" not in example.target:
            continue
        reference = example.build().eval()
        layer = copy.deepcopy(reference)
        qp.convert(layer)
        inputs = example.inputs()
        assert qp.audit(layer, tuple(inputs)).share == 1.0, example.target
        expected = reference(*inputs)
        assert not torch.equal(layer(*inputs), expected), example.target
        for quantizer in layer.quantizers().values():
            quantizer.disable()
        assert torch.equal(layer(*inputs), expected), example.target


def test_every_entry_has_an_example_and_a_small_one_conforms():
    targets = {example.target: example for example in quantpatch_examples()}
    entries = {entry.dotted: entry for entry in quantpatch_entries()}
    assert entries.keys() - targets.keys() == {"transformers.modeling_utils.get_hf_quantizer"}
    slow = ("compiled", "exported", "onnx")
    (target,) = (name for name in targets if name.endswith(".MixtralExperts"))
    checks = [name for name in CHECKS if name not in slow]
    example = targets[target]
    assert_layer_conforms(entries[target], example.build, example.inputs, checks=checks)


def test_the_classes_made_are_found_by_their_names():
    assert experts.QuantMixtralExperts is experts.QuantMixtralExperts
    assert experts.QuantMixtralExperts.float_class is MixtralExperts
    assert {f"Quant{name.partition('.')[2]}" for name in EXPERTS} <= set(dir(experts))
    with pytest.raises(AttributeError, match="no attribute 'QuantNonsense'"):
        experts.QuantNonsense  # noqa: B018


def test_a_class_made_can_be_unpickled_where_nobody_has_asked_for_it(monkeypatch):
    layer = filled(mixtral())
    qp.convert(layer)
    qp.calibrate(layer, [routed()], progress=False)
    data, before = pickle.dumps(layer), vars(experts)["QuantMixtralExperts"]
    monkeypatch.delitem(vars(experts), "QuantMixtralExperts")  # as in a process that starts
    again = pickle.loads(data)
    assert type(again) is not before
    assert type(again) is experts.QuantMixtralExperts
    assert torch.equal(again(*routed()), layer(*routed()))


def test_experts_of_ones_own_take_one_line():
    class MyExperts(MixtralExperts):
        pass

    class QuantMyExperts(experts.QuantizedExperts, MyExperts):
        pass

    reference = filled(mixtral())
    with qp.quantize_modules(custom=[qp.Entry(_module_with(MyExperts), "MyExperts", QuantMyExperts)]):
        layer = MyExperts(reference.config)
    layer.load_state_dict(reference.state_dict())
    assert qp.audit(layer, tuple(routed())).share == 1.0


def _module_with(cls):
    module = ModuleType("my_experts")
    setattr(module, cls.__name__, cls)
    return module


def halved(x):
    return x / 2


def products(x, weight):
    return [
        F.linear(x, weight[1]),
        x @ weight[2].T,
        weight[0].t() @ x,
        torch.matmul(x, weight[3]),
        torch.bmm(x.expand(4, 3, 3), weight.transpose(1, 2)),
    ]


def test_what_a_weight_is_multiplied_with_is_quantized_on_either_side():
    weight, x = nn.Parameter(torch.randn(4, 3, 3)), torch.randn(3, 3)
    partner = experts._Partner(weight, halved)
    expected = products(x, weight)
    with partner:
        computed = products(x, weight)
    for halved_product, product in zip(computed, expected, strict=True):
        torch.testing.assert_close(halved_product * 2, product)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experts_are_exported_as_a_product_each_and_run_with_any_routing(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    layer = filled(gpt_oss())
    qp.convert(layer)
    qp.calibrate(layer, [routed()], progress=False)
    report = qp.export_onnx(layer, tuple(routed()), tmp_path / "m.onnx", latency=False, progress=False)
    assert report.comparison.mismatching == 0
    session = ort.InferenceSession(tmp_path / "m.onnx")
    x, indices, weights = routed()
    for given in (indices, torch.full_like(indices, COUNT - 1), indices.flip(0)):
        feed = dict(zip((i.name for i in session.get_inputs()), (x, given, weights), strict=True))
        (output,) = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        torch.testing.assert_close(torch.from_numpy(output), layer(x, given, weights), atol=1e-5, rtol=1e-5)
