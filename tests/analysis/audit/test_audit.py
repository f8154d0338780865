"""``audit``: every product that runs is seen, and what was float is explained."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import quantpatch as qp
import quantpatch.layers
from quantpatch.analysis.audit import trace
from quantpatch.errors import ArgumentError, ArgumentTypeError, CheckError, InputError


def reasons(report):
    return {(row.module, row.operation): row.reason for row in report.rows if not row.quantized}


def quantized(*layers, **settings):
    model = nn.Sequential(*layers)
    qp.convert(model, **settings)
    return model


class Wrapped(nn.Module):
    """A module with a forward of the test's own."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self._run(self, *args, **kwargs)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_model_of_quantized_layers_is_covered_whole():
    model = quantized(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    report = qp.audit(model, IMAGES)
    assert report.share == 1.0
    assert report.unreached == ()
    assert [row.operands for row in report.rows] == [
        (("input", "0.input_quantizer"), ("weight", "0.weight_quantizer")),
        (("input", "4.input_quantizer"), ("weight", "4.weight_quantizer")),
    ]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(6, 5), (3, 6)),
        (lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), (2, 4, 9)),
        (lambda: nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 8, 8)),
        (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    ],
)
def test_multiply_accumulates_are_half_of_torchs_own_count_of_operations(build, shape):
    layer, x = build(), torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    qp.convert(layer)
    assert qp.audit(layer, x).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("multiply", "shapes", "macs"),
    [
        (torch.addbmm, ((3, 5), (2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
        (
            lambda x, weight, bias: torch.conv_tbc(x, weight, bias),
            ((7, 2, 3), (3, 3, 4), (4,)),
            5 * 2 * 4 * 9,
        ),
        (torch.vdot, ((6,), (6,)), 6),
    ],
)
def test_the_less_common_products_are_counted(multiply, shapes, macs):
    model = Wrapped(lambda self, *tensors: multiply(*tensors))
    assert qp.audit(model, tuple(map(torch.randn, shapes))).macs == macs


def test_a_float_model_has_a_share_of_zero_and_says_that_it_was_left_float():
    report = qp.audit(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))
    assert report.share == 0.0
    assert "left float" in reasons(report)["0", "matrix product"]


def test_the_share_weighs_multiply_accumulates_not_layers():
    model = quantized(nn.Linear(4, 12), nn.Linear(12, 1), skip=[])
    model[1].weight_quantizer.disable()
    assert qp.audit(model, torch.randn(2, 4)).share == pytest.approx(48 / 60)


@pytest.mark.parametrize("operand", ["input", "weight"])
def test_a_disabled_quantizer_is_named(operand):
    model = quantized(nn.Linear(4, 4))
    model[0].quantizer(operand).disable()
    report = qp.audit(model, torch.randn(2, 4))
    assert reasons(report)["0", "matrix product"] == f"{operand}_quantizer of QuantLinear is switched off"
    assert report.share == 0.0


def test_all_but_a_sliver_is_not_shown_as_all_nor_a_sliver_as_nothing():
    model = quantized(nn.Linear(4, 4000), nn.Linear(4000, 1, bias=False))
    model[1].weight_quantizer.disable()
    model[0].weight_quantizer.disable()
    assert str(qp.audit(model, torch.randn(1, 4))).splitlines()[0].split()[1] == "0.0%"
    tiny = Wrapped(
        lambda self, x: self.large(x) + (x[:, :1] @ self.small), large=nn.Linear(64, 64), small=None
    )
    tiny.small = nn.Parameter(torch.randn(1, 1))
    qp.convert(tiny)
    report = qp.audit(tiny, torch.randn(1, 64))
    assert report.share < 1
    assert str(report).splitlines()[0].split()[1] == ">99.9%"
    assert "<0.1%" in str(report)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_input_is_followed_through_every_kind_of_padding(mode, dims):
    conv = getattr(nn, f"Conv{dims}d")
    model = quantized(conv(2, 2, 3, padding=1, padding_mode=mode))
    assert qp.audit(model, torch.randn(1, 2, *[4] * dims)).share == 1.0


def test_a_tensor_that_is_filled_with_something_float_is_float():
    def forward(self, x):
        padded = x.new_zeros(2, 6)
        padded[:, :4] = self.fc.input_quantizer(x)
        if self.spoiled:
            padded[:, 4:] = x[:, :2]
        return F.linear(padded, self.fc.weight_quantizer(self.fc.weight))

    model = Wrapped(forward, fc=nn.Linear(6, 2))
    qp.convert(model)
    for spoiled in (False, True):
        model.spoiled = spoiled
        assert qp.audit(model, torch.randn(2, 4)).share == 1 - spoiled


def test_what_makes_a_weight_is_listed_and_not_counted():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)),
        nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)),
        nn.utils.spectral_norm(nn.Linear(5, 3)),
    )
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4))
    assert (report.share, report.macs) == (1.0, 2 * (4 * 5 + 5 * 5 + 5 * 3))
    making = {row.module for row in report.rows if row.of_weight}
    assert making == {"0.parametrizations.weight.0", "1.parametrizations.weight.0", "2"}
    assert set(reasons(report).values()) == {"a weight is made of it, the same for every input: not counted"}
    assert report.to_paste == ""


@pytest.mark.parametrize("layer", [nn.GRU(4, 6), nn.LSTM(4, 6, proj_size=2)])
def test_a_hidden_state_is_named_where_torch_takes_a_recurrent_layer_apart(layer):
    model = quantized(layer)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 2]))
    found = set(reasons(qp.audit(model, packed)).values())
    assert len(found) == 1
    assert "Recipe(hidden=...)" in found.pop()


def test_an_operand_that_the_recipe_leaves_float_is_named():
    model = quantized(nn.Linear(4, 4), recipe="int8-weight-only")
    (reason,) = reasons(qp.audit(model, torch.randn(2, 4))).values()
    assert reason == "the recipe leaves it float"


def test_a_functional_call_is_found_in_its_module():
    model = Wrapped(
        lambda self, x: F.linear(self.fc(x), self.extra.weight), fc=nn.Linear(4, 4), extra=nn.Linear(4, 4)
    )
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4))
    assert "a function called in the forward of Wrapped" in reasons(report)["", "matrix product"]
    assert report.unreached == ("extra.input_quantizer", "extra.weight_quantizer")


def test_a_subclass_is_named_with_its_base():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4))
    assert (
        "Mine is a subclass of torch.nn.Linear with a forward of its own"
        in reasons(report)["0", "matrix product"]
    )
    assert "Mine': 'products'" in report.to_paste


LAYERS = """
import torch
from torch import nn

class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
    def forward(self, x, scale: float = 1.0):
        return x @ self.weight * scale

class Shifted(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
    def forward(self, x):
        return super().forward(x) + 1

class Scores(nn.Module):
    def forward(self, x):
        return x @ x.T

class Outer:
    class Inner(Transposed):
        pass
"""


@pytest.fixture
def layers(package):
    return importlib.import_module(f"{package(layers=LAYERS)}.layers")


@pytest.mark.parametrize("name", ["Transposed", "Shifted"])
def test_the_code_to_paste_runs_and_covers_the_class(layers, name):
    """As it stands: with the line that builds the model in the place that it names."""
    build = getattr(layers, name)
    x = torch.randn(2, 4)
    report = qp.audit(build(), x)
    assert f"{layers.__name__}.{name}': 'products'" in report.to_paste
    assert report.to_paste in str(report)
    assert report.to_paste.count("    ...  # build the model here") == 1
    namespace = {"build": build, "quantpatch": quantpatch}
    exec(report.to_paste.replace("...  # build the model here", "model = build()"), namespace)
    model = namespace["model"]
    assert type(model).__qualname__ == f"Quant{name}"
    assert qp.audit(model, x).share == 1.0
    reference = build()
    model.load_state_dict(reference.state_dict())
    for quantizer in model.quantizers().values():
        quantizer.disable()
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("name", ["Transposed", "Shifted"])
def test_the_replacements_to_paste_run_and_cover_the_class(layers, name):
    build = getattr(layers, name)
    x = torch.randn(2, 4)
    report = qp.audit(build(), x)
    assert report.replacements in str(report)
    namespace = {"build": build}
    exec(report.replacements.replace("...  # build the model here", "model = build()"), namespace)
    assert type(namespace["model"]) is namespace[f"Quant{name}"]
    assert qp.audit(namespace["model"], x).share == 1.0


class Hidden(nn.Module):
    """What multiplies is no part of the code of its forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_where_operations_cannot_help_the_report_says_so_and_why():
    report = qp.audit(Hidden(lambda x: (x + 1) @ x.mT), torch.randn(2, 3))
    assert report.to_paste == ""
    ((name, why),) = report.hidden
    assert name.endswith("Hidden")
    assert "self.function is <lambda>, which no other process finds by that name" in why
    assert f"Nothing covers {name}: " in str(report)


def test_without_the_source_the_report_says_that_it_cannot_be_read():
    names = {"torch": torch, "__name__": "made"}
    exec(
        "class Made(torch.nn.Module):\n    def forward(self, x):\n        return (x + 1) @ x.mT",
        names,
    )
    ((_, why),) = qp.audit(names["Made"](), torch.randn(2, 3)).hidden
    assert "needs the source of Made.forward, which cannot be read" in why


def test_modules_for_operations_are_covered_without_a_replacement():
    class Mended(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = quantpatch.layers.MatMul()

        def forward(self, x):
            return self.product(x, x.T)

    with qp.quantize_modules():
        model = Mended()
    assert qp.audit(model, torch.randn(2, 4)).share == 1.0


def test_a_class_that_no_entry_covers_is_reported(layers):
    (row,) = qp.audit(layers.Transposed(), torch.randn(2, 4)).rows
    assert row.reason == "a function called in the forward of Transposed: operations='products' quantizes it"


def test_a_skipped_layer_is_reported():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1))
    qp.convert(model, skip=["Linear"])
    (reason,) = reasons(qp.audit(model[0], torch.randn(2, 4))).values()
    assert reason == "Linear was left float: it was skipped, or built outside a block"


def test_a_layer_that_is_left_float_by_default_says_what_to_write():
    class Kernel(qp.QuantizedLayer, nn.Bilinear):
        inputs = ("input1", "input2")

    offered = qp.Entry("torch.nn", "Bilinear", Kernel, default=False)

    class Plugin:
        @qp.hookimpl
        def quantpatch_entries(self):
            return [offered]

    qp.registry.register(Plugin(), "on-request")
    try:
        report = qp.audit(nn.Bilinear(2, 2, 2), (torch.randn(1, 2), torch.randn(1, 2)))
    finally:
        qp.registry.unregister("on-request")
    assert all("include=['Bilinear']" in row.reason for row in report.rows)


def test_a_subclass_without_ways_of_its_own_says_what_to_write():
    class Mine(nn.Linear):
        pass

    (row,) = qp.audit(Mine(4, 4), torch.randn(2, 4)).rows
    assert (
        row.reason
        == "Mine is a subclass of torch.nn.Linear, for which there is no entry; write subclasses=True"
    )


def test_a_parametrized_layer_is_reported_by_its_own_class():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    (row,) = qp.audit(model, torch.randn(2, 4)).rows
    assert row.reason.startswith("Linear was left float")


def test_inputs_that_are_one_tensor_are_quantized_once_and_none_is_missed():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x, other):
            return self.attention(x, key=other, value=other)[0]

    with qp.quantize_modules():
        model = Attention()
    x, other = torch.randn(5, 2, 8), torch.randn(4, 2, 8)
    for calibrated in (False, True):
        if calibrated:
            qp.calibrate(model, [(x, x)])
        assert qp.audit(model, (x, x)).unreached == ()
        assert qp.audit(model, (x, other)).unreached == ()
    model.attention.value_quantizer.disable()
    assert qp.audit(model, (x, x)).share < 1.0
    assert not any("out_proj" in name for name, _ in qp.summary(model).float_layers)


def test_a_quantizer_that_no_tensor_passed_is_reported():
    model = Wrapped(lambda self, x: self.used(x), used=nn.Linear(4, 4), idle=nn.Linear(4, 4))
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4))
    assert report.unreached == ("idle.input_quantizer", "idle.weight_quantizer")
    assert "Quantizers that no tensor passed through: idle.input_quantizer" in str(report)
    model.idle.input_quantizer.disable()  # on purpose
    assert qp.audit(model, torch.randn(2, 4)).unreached == ("idle.weight_quantizer",)


def test_torchs_fast_path_is_seen_for_what_it_is():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    report = qp.audit(model, torch.randn(2, 5, 8))
    (row,) = report.rows
    assert row.operation == "transformer layer in one piece"
    assert row.macs == 10 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 10 * 5 * 8
    assert "fast path" in row.reason
    assert report.share == 0.0


def test_torchs_fast_path_is_not_taken_where_a_quantizer_would_be_passed_by():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 5, 8))
    assert report.share == 1.0
    assert not any("linear" in name for name in report.unreached)


def test_values_that_are_only_moved_stay_quantized():
    def forward(self, x):
        q = self.quantizer(x)
        left = q.reshape(2, 2, 6).transpose(1, 2).contiguous()[:, 1:]
        right = torch.cat([q.view(2, 12), q.view(2, 12)], dim=1).chunk(2, dim=1)[0].view(2, 2, 6)
        return (left * 0.5) @ right.relu().clone()

    model = Wrapped(forward, quantizer=qp.TensorQuantizer())
    assert qp.audit(model, torch.randn(2, 12)).share == 1.0


@pytest.mark.parametrize("spoil", [torch.sigmoid, lambda t: t + 1, lambda t: t * t])
def test_values_that_are_computed_anew_are_float_again(spoil):
    model = Wrapped(
        lambda self, x: spoil(self.quantizer(x)) @ self.quantizer(x), quantizer=qp.TensorQuantizer()
    )
    (row,) = qp.audit(model, torch.randn(3, 3)).rows
    assert row.operands == (("left", None), ("right", "quantizer"))


def test_attention_counts_scores_and_output_apart():
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(self.q(q), self.k(k), v)

    model = Wrapped(forward, q=qp.TensorQuantizer(), k=qp.TensorQuantizer())
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 4)
    scores, output = qp.audit(model, (q, k, v)).rows
    assert (scores.macs, scores.quantized) == (2 * 5 * 7 * 8, True)
    assert output.macs == 2 * 5 * 7 * 4
    assert not output.quantized


def test_a_recurrent_layer_distinguishes_its_hidden_state_from_its_input():
    model = quantized(nn.LSTM(4, 8))
    report = qp.audit(model, torch.randn(5, 2, 4))
    rows = {row.operation: row for row in report.rows}
    assert rows["recurrent input"].quantized
    assert rows["recurrent input"].macs == 5 * 2 * 32 * 4
    assert rows["recurrent state"].operands[0] == ("hidden", None)
    assert "Recipe(hidden=...)" in rows["recurrent state"].reason


def test_keywords_several_inputs_dict_outputs_and_tied_weights():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight

    def forward(self, x, *, scale):
        return {"a": self.first(x) * scale, "b": [self.second(x)]}

    model = Wrapped(forward, first=first, second=second)
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4), kwargs={"scale": 2.0})
    assert report.share == 1.0
    assert [row.module for row in report.rows] == ["first", "second"]


def test_a_layer_that_runs_twice_is_one_row_with_two_calls():
    model = Wrapped(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4))
    qp.convert(model)
    (row,) = qp.audit(model, torch.randn(2, 4)).rows
    assert (row.calls, row.macs) == (2, 2 * 2 * 16)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_works(use_reentrant):
    model = Wrapped(lambda self, x: checkpoint(self.fc, x, use_reentrant=use_reentrant), fc=nn.Linear(4, 4))
    qp.convert(model)
    assert qp.audit(model, torch.randn(2, 4, requires_grad=True)).share == 1.0


def test_a_compiled_model_is_looked_into():
    model = quantized(nn.Linear(4, 4))
    assert qp.audit(torch.compile(model, backend="eager"), torch.randn(2, 4)).share == 1.0


def test_weights_cached_by_an_earlier_run_count_as_quantized():
    model = quantized(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert qp.audit(model, torch.randn(2, 4)).share == 1.0


def test_custom_operators_are_named_because_nobody_can_look_into_them():
    with torch.library._scoped_library("quantpatch_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        model = Wrapped(lambda self, x: self.fc(torch.ops.quantpatch_test.twice(x)), fc=nn.Linear(4, 4))
        qp.convert(model)
        assert qp.audit(model, torch.randn(2, 4)).opaque == ("quantpatch_test::twice",)


# --- the model is as before -------------------------------------------------------------------------


def state_of(model):
    hooks = torch.nn.modules.module
    return (
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        torch.get_rng_state(),
    )


def same(left, right):
    return (
        left[0] == right[0]
        and left[2:4] == right[2:4]
        and torch.equal(left[4], right[4])
        and all(torch.allclose(value, right[1][key], 0, 0, equal_nan=True) for key, value in left[1].items())
    )


def test_modes_statistics_hooks_and_random_state_are_as_before():
    model = quantized(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before = state_of(model)
    qp.audit(model, IMAGES)
    assert same(before, state_of(model))


def test_a_forward_that_raises_leaves_everything_as_before():
    def forward(self, x):
        self.fc(x)
        raise KeyError("inside")

    model = Wrapped(forward, fc=nn.Linear(4, 4)).train()
    qp.convert(model)
    x = torch.randn(2, 4)
    before = state_of(model)
    with pytest.raises(KeyError, match="inside"):
        qp.audit(model, x)
    assert same(before, state_of(model))


def test_inputs_on_another_device_are_reported_and_nothing_is_lost():
    model = quantized(nn.Linear(4, 4), nn.LSTM(4, 4))
    qp.calibrate(model, [torch.randn(3, 2, 4)])
    before = state_of(model)
    with pytest.raises(
        InputError, match=r"Sequential is on cpu and its inputs on meta.*\.to\('cpu'\)"
    ) as caught:
        qp.audit(model, torch.randn(3, 2, 4, device="meta"))
    assert caught.value.devices == ("meta", "cpu")
    assert same(before, state_of(model))
    with pytest.raises(InputError, match="its inputs on meta"):
        qp.calibrate(model, [torch.randn(3, 2, 4, device="meta")], existing="overwrite")
    with pytest.raises(InputError, match="its inputs on meta"):
        qp.compare(model, copy.deepcopy(model), [torch.randn(3, 2, 4, device="meta")])
    assert same(before, state_of(model))


def test_a_module_whose_exception_is_caught_does_not_confuse_the_rest():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError

    def forward(self, x):
        with contextlib.suppress(ValueError):
            self.fails(x)
        return self.fc(x) @ x.T

    model = Wrapped(forward, fails=Fails(), fc=nn.Linear(4, 4))
    qp.convert(model)
    assert [row.module for row in qp.audit(model, torch.randn(2, 4)).rows] == ["fc", ""]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_reported_with_nothing_to_paste():
    part = torch.jit.script(nn.Linear(4, 4))
    for model in (part, nn.Sequential(nn.ReLU(), part)):
        report = qp.audit(model, torch.randn(2, 4))
        assert reasons(report).popitem()[1] == (
            "Linear is a scripted module, whose code is fixed; quantize it before scripting"
        )
        assert report.to_paste == ""


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (nn.DataParallel(nn.Linear(4, 4)), ArgumentError, r"audit\(model\.module"),
        (nn.Linear, ArgumentTypeError, r"not its class: write audit\(Linear\(\.\.\.\)\)"),
        ("model", ArgumentTypeError, "not 'model'"),
    ],
    ids=["data-parallel", "class", "text"],
)
def test_what_is_not_a_model_of_its_own_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        qp.audit(given, torch.randn(2, 4))


@pytest.mark.parametrize("minimum", [-0.1, 95])
def test_a_minimum_is_a_share(minimum):
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        qp.audit(quantized(nn.Linear(4, 4)), torch.randn(2, 4), minimum=minimum)


def test_a_wrapper_that_runs_its_model_itself_hides_nothing():
    model = nn.DataParallel(nn.Linear(4, 4)).module
    qp.convert(model)
    report = qp.audit(model, torch.randn(2, 4))
    assert (report.share, report.opaque) == (1.0, ())


# --- the report --------------------------------------------------------------------------------------


def test_a_minimum_that_is_not_met_raises_with_the_report_and_the_largest_culprit():
    model = quantized(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].input_quantizer.disable()
    with pytest.raises(CheckError, match=r"50\.0%.*at least 95\.0%.*'1'.*switched off") as caught:
        qp.audit(model, torch.randn(2, 4), minimum=0.95)
    assert caught.value.report.share == 0.5
    assert qp.audit(model, torch.randn(2, 4), minimum=0.5).share == 0.5


def test_it_prints_as_a_table_and_as_json():
    model = quantized(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].input_quantizer.disable()
    report = qp.audit(model, torch.randn(2, 4))
    assert "50.0% of 64 multiply-accumulates" in str(report)
    data = json.loads(report.to_json())
    assert data["share"] == 0.5
    assert len(data["rows"]) == 2


def test_a_model_that_multiplies_nothing_has_a_share_of_zero():
    assert qp.audit(nn.Sequential(nn.ReLU()), torch.randn(2)).share == 0.0


def test_what_is_changed_in_place_is_not_a_quantized_operand_any_more():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = qp.TensorQuantizer()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            y = self.quantizer(x)
            scaled = torch.nn.functional.linear(y.mul_(2.0).relu_(), self.weight)
            y += x
            return scaled + torch.nn.functional.linear(y, self.weight)

    rows = qp.audit(Sum(), torch.randn(2, 4)).rows
    assert [row.operands[0][1] for row in rows] == ["quantizer", None]


def _in_a_view_of_it(q):
    q[:, 0].add_(0.3)
    return q


def _by_what_it_is_a_view_of(q):
    seen = q.view(2, 4)
    q.add_(0.3)
    return seen


def _as_the_place_for_a_result(q):
    torch.add(q, 0.3, out=q)
    return q


@pytest.mark.parametrize("change", [_in_a_view_of_it, _by_what_it_is_a_view_of, _as_the_place_for_a_result])
def test_what_is_changed_where_it_lies_in_memory_is_not_a_quantized_operand_any_more(change):
    model = Wrapped(
        lambda self, x: change(self.quantizer(x)) @ self.quantizer(x).t(), quantizer=qp.TensorQuantizer()
    )
    for inference in (False, True):
        with torch.inference_mode(inference):
            (row,) = qp.audit(model, torch.randn(2, 4)).rows
        assert row.operands == (("left", None), ("right", "quantizer"))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 2, 2), nn.Linear(6, 2)), (2, 3, 6)),
        (lambda: nn.LSTM(3, 4), (2, 1, 3)),
        (lambda: nn.MultiheadAttention(4, 2), (3, 2, 4)),
        (lambda: Wrapped(lambda self, x, *_: nn.functional.scaled_dot_product_attention(x, x, x)), (2, 3, 4)),
        (lambda: Wrapped(lambda self, x, *_: torch.einsum("bij,bkj->bik", x, x)), (2, 3, 4)),
    ],
)
def test_under_inference_mode_the_same_is_seen(build, shape):
    model, x = build(), torch.randn(shape)
    inputs = (x, x, x) if isinstance(model, (nn.MultiheadAttention, Wrapped)) else (x,)
    expected = qp.audit(model, tuple(inputs))
    with torch.inference_mode():
        found = qp.audit(model, tuple(t.clone() for t in inputs))
    assert found.macs == expected.macs > 0
    assert [row.operation for row in found.rows] == [row.operation for row in expected.rows]


# --- Weights that changed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_weights_that_changed_since_their_ranges_were_found_are_named(recipe, method):
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    x = torch.randn(4, 16)
    qp.calibrate(model, [x], method=method, weight_method=method)
    assert qp.audit(model, x).outgrown == ()
    model[0].weight.data += 0.2 * torch.randn(32, 4) @ torch.randn(4, 16)  # as PEFT merges an adapter
    report = qp.audit(model, x)
    assert [name for name, _ in report.outgrown] == ["0.weight_quantizer"]
    assert report.outgrown[0][1] > 4
    assert "0.weight_quantizer (" in " ".join(str(report).split())  # wherever the line breaks
    assert "qp.calibrate(model, data, existing='overwrite')" in " ".join(str(report).split())
    qp.calibrate(model, [x], method=method, weight_method=method, existing="overwrite")
    assert qp.audit(model, x).outgrown == ()


@pytest.mark.parametrize(("drift", "outgrown"), [(0.2, ()), (2.0, ("weight_quantizer",))])
def test_a_weight_that_its_range_holds_exactly_may_drift_within_a_step(drift, outgrown):
    with qp.quantize_modules():
        layer = nn.Conv1d(1, 8, 1)  # one element a channel
    x = torch.randn(2, 1, 5)
    qp.calibrate(layer, x)
    with torch.no_grad():
        layer.weight.mul_(1 + drift / 127)
    assert tuple(name for name, _ in qp.audit(layer, x).outgrown) == outgrown


def calls_of_an_audit(layers):
    """How many functions an audit of that many layers calls, with its table."""
    model, x = quantized(*(nn.Linear(3, 3) for _ in range(layers))).eval(), torch.randn(2, 3)
    str(qp.audit(model, x))
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event.endswith("call")

    sys.setprofile(count)
    try:
        str(qp.audit(model, x))
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_grows_with_the_layers_and_not_with_their_square():
    assert calls_of_an_audit(120) < 5 * calls_of_an_audit(30)


def test_what_is_written_into_memory_that_a_quantizers_result_lay_in_is_float():
    def run(self, x):
        quantizer = self.layer.input_quantizer
        kept, gone = quantizer(x), quantizer(x)
        del gone
        fresh = torch.randn(2, 3)  # in the memory of what is gone, as a rule
        view = kept.t()
        fresh.add_(1)
        return fresh @ view

    model = Wrapped(run, layer=quantized(nn.Linear(3, 3))[0])
    (row,) = qp.audit(model, torch.randn(4, 3)).rows
    assert row.operands == (("left", None), ("right", "layer.input_quantizer"))


def test_a_quantizers_result_whose_memory_is_exchanged_is_float_where_that_is_written():
    def run(self, x):
        x = self.layer.input_quantizer(x)
        x.set_(torch.randn(4, 3))
        return x @ x.t()

    model = Wrapped(run, layer=quantized(nn.Linear(3, 3))[0])
    (row,) = qp.audit(model, torch.randn(4, 3)).rows
    assert row.operands == (("left", None), ("right", None))


def test_a_weight_only_model_is_counted_by_its_weights():
    model = quantized(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2), recipe="int8-weight-only")
    report = qp.audit(model, IMAGES)
    assert report.layers_with_weights == (2, 2)
    title = "Sequential: weights of 2 of 2 layers quantized; inputs float, as the recipe says"
    assert str(report).splitlines()[0].strip() == title
    assert json.loads(report.to_json())["layers_with_weights"] == [2, 2]
    assert [row.weights for row in report.rows] == [("weight",), ("weight",)]


def test_weights_that_are_switched_off_or_of_float_layers_do_not_count():
    model = quantized(*(nn.Linear(4, 4) for _ in range(3)), recipe="int8-weight-only")
    model[1].weight_quantizer.disable()
    model.append(nn.Linear(4, 4))
    model.append(quantized(nn.Linear(4, 4)))
    report = qp.audit(model, torch.randn(2, 4))
    assert report.layers_with_weights == (3, 5)
    assert report.headline().startswith(
        "20.0% of 160 multiply-accumulates quantized; weights of 3 of 5 layers"
    )


def test_products_of_activations_have_no_weights():
    model = Wrapped(lambda self, x: self.product(x, x.mT), product=quantpatch.layers.MatMul())
    qp.convert(model)
    (row,) = qp.audit(model, torch.randn(2, 3)).rows
    assert row.weights == ()
    assert row.operands == (("x", "product.x_quantizer"), ("y", "product.y_quantizer"))


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", None])
def test_operands_have_the_names_that_their_layer_has_for_them(recipe):
    def roles(layer, inputs):
        model = quantized(layer, recipe=recipe) if recipe else layer
        return {tuple(role for role, _ in row.operands) for row in qp.audit(model, inputs).rows}

    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    assert roles(nn.Linear(4, 4), torch.randn(2, 4)) == {("input", "weight")}
    assert roles(nn.LSTM(4, 3, 2), packed) == {
        ("input", "weight_ih_l0"),
        ("input_l1", "weight_ih_l1"),
        ("hidden", "weight_hh_l0"),
        ("hidden", "weight_hh_l1"),
    }
    own = Wrapped(lambda self, x: self.layer(x) @ self.own, layer=nn.Linear(3, 3))
    own.own = nn.Parameter(torch.randn(3, 2))
    assert roles(own, torch.randn(2, 3)) == {("input", "weight"), ("input", "own")}


def test_no_hook_of_all_modules_is_left():
    qp.audit(nn.Linear(2, 2), torch.ones(1, 2))
    assert not nn.modules.module._has_any_global_hook()


def test_twice_as_many_layers_are_twice_the_work(monkeypatch):
    asked = []
    name_of = trace._Origins.name_of
    monkeypatch.setattr(
        trace._Origins, "name_of", lambda self, quantizer: (asked.append(1), name_of(self, quantizer))[1]
    )
    counts = []
    for layers in (20, 40):
        asked.clear()
        qp.audit(quantized(*(nn.Linear(4, 4) for _ in range(layers))), torch.randn(2, 4))
        counts.append(len(asked))
    assert counts[1] == 2 * counts[0]


class InAnotherThread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(self.first(x)))
        thread.start()
        thread.join()
        y: torch.Tensor = self.second(found[0])
        return y


def test_layers_that_run_in_another_thread_are_named() -> None:
    model = InAnotherThread()
    qp.convert(model)
    with pytest.warns(qp.QuantPatchWarning, match=r"another thread.*counted: first, first\.input_quantizer"):
        report = qp.audit(model, torch.randn(2, 4))
    assert [row.module for row in report.rows] == ["second"]
