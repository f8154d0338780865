"""The built-in layers under the conformance kit, for each keyword and padding mode of torch's."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from layer_cases import CASES, subject
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from quantpatch.layers import QuantizedLayer
from quantpatch.layers.builtin_examples import EXAMPLES
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import CHANNEL, QuantDescriptor, Recipe
from quantpatch.testing import CHECKS, NotApplicable, run_check
from quantpatch.testing.subject import disable, floats

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:Lazy modules are a new feature",
    "ignore:Using padding='same' with even kernel lengths",
    "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning",  # torch.compile's
)

FAST = [name for name, check in CHECKS.items() if not check.traces]
SLOW = [name for name, check in CHECKS.items() if check.traces]
# What depends on the arguments is tried on all of them; the rest on one example of each class.
ON_ALL = ["disabled", "state_dict", "gradients"]


def short(example: Any) -> str:
    name = example.target.rpartition(".")[2]
    return f"{name}-{example.label}" if example.label else name


def make(check: str, example: Any) -> None:
    try:
        run_check(check, subject(example))
    except NotApplicable as reason:
        pytest.skip(str(reason))


every_case = pytest.mark.parametrize("example", CASES, ids=short)


def test_every_registered_layer_has_an_example():
    known = registry.entries([])
    assert [o.dotted for o in known if o.plugin == BUILTIN] != []
    assert {o.dotted for o in known} == {example.target for example in EXAMPLES}


@pytest.mark.sweep(5)
@every_case
@pytest.mark.parametrize("check", ON_ALL)
def test_every_argument_set(check, example):
    make(check, example)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("example", EXAMPLES, ids=short)
@pytest.mark.parametrize("check", [name for name in FAST if name not in ON_ALL])
def test_each_class(check, example):
    make(check, example)


# One of each kind: the whole matrix is what `pytest --quantpatch-conformance` runs.
TRACED = [
    ("compiled", ("Linear", "Conv2d-circular", "ConvTranspose1d-size", "MultiheadAttention-masks-fused",
                  "LSTMCell", "Embedding-plain", "AvgPool2d-plain")),
    ("exported", ("Linear", "MultiheadAttention-masks-fused", "LSTMCell", "AvgPool2d-plain")),
    ("onnx", ("Linear", "Cat")),
]  # fmt: skip


@pytest.mark.parametrize(("check", "case"), [(check, case) for check, cases in TRACED for case in cases])
def test_tracing(check, case):
    assert {check for check, _ in TRACED} == set(SLOW)
    if (check, case) == ("compiled", "Embedding-plain") and torch.__version__ < "2.12":
        pytest.skip("in more than one graph, if embeddings with max_norm have run before")
    make(check, next(example for example in CASES if short(example) == case))


@pytest.mark.parametrize("example", EXAMPLES, ids=short)
def test_replacements_are_documented_mixins(example):
    replacement = subject(example).replacement
    assert issubclass(replacement, QuantizedLayer)
    assert replacement.__doc__
    assert getattr(importlib.import_module(replacement.__module__), replacement.__qualname__) is replacement


# --- Each operand, against a layer that is given quantized operands by hand -----------------------


def coarse(x: Tensor, amax: Tensor) -> Tensor:
    """Three levels: -amax, 0, amax."""
    amax = amax.to(torch.float32)
    return ((x.float() / amax).round().clamp(-1, 1) * amax).to(x.dtype)


COARSE = QuantDescriptor(num_bits=2, narrow_range=True)
COARSE_RECIPE = Recipe(
    name="coarse", input=COARSE, weight=QuantDescriptor(num_bits=2, narrow_range=True, axis=CHANNEL)
)


def with_coarse_ranges(quantized: Any) -> Any:
    """Two bits, and a range for each quantizer (of weights: for each channel) that no other one has."""
    quantized.add_quantizers(COARSE_RECIPE)
    axes = quantized.weight_axes()
    for position, (name, quantizer) in enumerate(quantized.quantizers().items()):
        operand = name.removesuffix("_quantizer")
        if operand not in axes:
            quantizer.amax = 0.5 + 0.1 * position
            continue
        weight = getattr(quantized, operand)
        axis = 1 if "Transpose" in type(quantized).__name__ else 0
        groups = quantized.groups if axis else 1
        assert axes[operand] == (GroupedAxes(groups) if groups > 1 else axis)
        shape = [weight.shape[axis] if d == axis else 1 for d in range(weight.dim())]
        shape[0] = groups if groups > 1 else shape[0]
        scale = 0.4 + 0.05 * position
        quantizer.amax = (
            scale * weight.detach().abs().max().float() * torch.linspace(0.5, 1, math.prod(shape)).view(shape)
        )
    return quantized


def reference(case: Any, layer: Any, quantized: Any, data: tuple[Any, ...]) -> Any:
    """The float layer on operands that were quantized by hand."""
    layer = copy.deepcopy(layer)
    if getattr(layer, "max_norm", None) is not None:
        case.run(layer, data)  # renormalizes rows of the table, which quantization comes after
        layer.max_norm = None
    with torch.no_grad():
        for name in quantized.weight_axes():
            weight = layer.out_proj.weight if name == "out_proj_weight" else getattr(layer, name)
            amax = quantized.quantizer(name).amax
            if amax.dim() and amax.shape[0] > 1:  # of transposed convolutions shared within a group
                amax = amax.repeat_interleave(weight.shape[0] // amax.shape[0], 0)
            weight.copy_(coarse(weight, amax))
    arguments = list(data)
    inputs = quantized.inputs or [name for name in quantized._inner if name not in INSIDE]
    for position, name in enumerate(inputs):
        amax = quantized.quantizer(name).amax
        x = arguments[position]
        if isinstance(x, PackedSequence):
            arguments[position] = x._replace(data=coarse(x.data, amax))
        elif isinstance(x, list):
            arguments[position] = [coarse(tensor, amax) for tensor in x]
        else:
            arguments[position] = coarse(x, amax)
    if quantized.quantizer("hidden") is not None and len(data) > 1:
        state, amax = data[1], quantized.quantizer("hidden").amax
        arguments[1] = (
            coarse(state, amax) if isinstance(state, Tensor) else (coarse(state[0], amax), state[1])
        )
    return case.run(layer, tuple(arguments))


# What a float layer cannot be given from outside; test_recurrent.py and test_attention.py compute these.
INSIDE = ("input_l1", "input_l2", "q", "k", "v", "probabilities", "out_proj_input")


@pytest.mark.sweep(3)
@every_case
def test_every_operand_is_quantized(example):
    if "TransformerEncoder" in example.target:
        pytest.skip("has no operands of its own")
    case = subject(example)
    layer, quantized = case.pair()
    with_coarse_ranges(quantized)
    plain = case.run(layer)
    for name, quantizer in quantized.quantizers().items():  # each of them matters
        disable(quantized, but=[quantizer])
        changed = floats(case.run(quantized))[0]
        # Without a state a cell multiplies zeros.
        is_unused = "Cell" in example.target and len(case.data()) == 1 and ("hidden" in name or "hh" in name)
        assert torch.equal(changed, floats(plain)[0]) == is_unused, name
    disable(quantized, but=[q for name, q in quantized.quantizers().items() if name[:-10] not in INSIDE])
    ours = case.run(quantized)
    for a, b in zip(floats(ours), floats(reference(case, layer, quantized, case.data())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
