"""The conformance kit finds what it is there to find: for each check a layer that breaks it."""

from __future__ import annotations

import attrs
import broken_layers
import pytest
import torch

import quantpatch
from quantpatch import Entry, Example
from quantpatch.errors import ArgumentTypeError, CheckError, UnknownNameError
from quantpatch.testing import CHECKS, NotApplicable, Subject, assert_layer_conforms, run_check, trials

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning"  # torch.compile's
)

FAST = [name for name, check in CHECKS.items() if not check.traces]

# What is seen of the layer that breaks each check.
SEEN = {
    "replaced": "it raised",
    "signature": "it takes (*args, **kwargs), the float class (in_features:",
    "initial": "more or fewer random numbers",
    "disabled": "disabled, its output in training mode is not the float layer's: ",
    "operands": "no tensor passed through input_quantizer",
    "gradients": "input 0 gets no gradient",
    "hooks": "hooks of the quantized layer ran, expected 2",
    "unchanged": "forward changes last",
    "threads": "threads that share it get other results",
    "checkpointing": "the gradient of input 0 is another under checkpointing",
    "state_dict": "its state_dict has ['scale'] besides the ranges",
    "pickled": "it raised",
    "copied": "copied, it shares weight",
    "weights_only": "it raised UnpicklingError",
    "half": "it is not the float layer: dtype torch.float32, expected torch.float16",
    "bfloat16": "it is not the float layer: dtype torch.float32, expected torch.bfloat16",
    "meta": "it raised RuntimeError: Tensor.item() cannot be called on meta tensors",
    "reverted": "broken_layers.Scaled is not what it was: is_quantized",
    "converted": "it raised AttributeError",
    "compiled": "it raised Unsupported",
    "exported": "it raised",
    "onnx": "cannot be traced for ONNX",
}


def scaled() -> broken_layers.Scaled:
    return broken_layers.Scaled(6, 4)


def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(3, 6),)


def subject(replacement: type) -> Subject:
    entry = Entry(broken_layers, "Scaled", replacement)
    return Subject(entry, Example(entry.dotted, scaled, inputs), ())


@pytest.fixture(autouse=True)
def _scaled_is_what_it_was():
    yield
    if "is_quantized" in vars(broken_layers.Scaled):
        del broken_layers.Scaled.is_quantized


def broken(check: str) -> type:
    return getattr(broken_layers, check.title().replace("_", ""))


@pytest.mark.parametrize("check", SEEN)
def test_a_layer_that_breaks_a_rule_is_found_with_what_to_change(check):
    with pytest.raises(CheckError) as caught:
        run_check(check, subject(broken(check)))
    message = str(caught.value)
    assert SEEN[check] in message
    assert CHECKS[check].advice in message
    assert f"check {check!r}" in message
    assert "broken_layers.Scaled ->" in message
    assert caught.value.checks == (check,)
    assert caught.value.entry.dotted == "broken_layers.Scaled"


def test_every_check_is_tried_on_a_layer_that_breaks_it():
    assert list(SEEN) == sorted(CHECKS, key=list(SEEN).index)
    assert len({check.advice for check in CHECKS.values()}) > 15


def test_a_quantizer_whose_result_is_dropped_is_found():
    with pytest.raises(CheckError, match="the same whether input_quantizer is enabled or not"):
        run_check("operands", subject(broken_layers.Unused))


def test_a_good_layer_passes_every_check():
    passed = assert_layer_conforms(
        (broken_layers, "Scaled", broken_layers.Good), scaled, inputs, plugins=[], keywords={}
    )
    assert passed == tuple(CHECKS)


def test_the_assertion_lists_every_check_that_fails():
    with pytest.raises(CheckError) as caught:
        assert_layer_conforms(
            (broken_layers, "Scaled", broken_layers.StateDict), scaled, inputs, checks=FAST, plugins=[]
        )
    assert "initial" in caught.value.checks
    assert "state_dict" in caught.value.checks
    assert f"{len(caught.value.checks)} of {len(FAST)} checks failed" in str(caught.value)


def test_a_check_to_skip_is_not_made():
    entry = (broken_layers, "Scaled", broken_layers.Signature)
    passed = assert_layer_conforms(
        entry,
        scaled,
        inputs,
        checks=["signature", "copied"],
        skip_checks={"signature": "it is old"},
        plugins=[],
    )
    assert passed == ("copied",)


@pytest.mark.parametrize("where", ["checks", "skip_checks"])
def test_a_misspelled_check_is_an_error_that_shows_the_right_one(where):
    given = {"checks": ["pickeld"]} if where == "checks" else {"skip_checks": {"pickeld": "because"}}
    with pytest.raises(UnknownNameError, match="unknown check 'pickeld'. Did you mean 'pickled'"):
        assert_layer_conforms((broken_layers, "Scaled", broken_layers.Good), scaled, inputs, **given)


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (lambda: 3, inputs, "build() of the example gave 3, expected the layer"),
        (lambda: torch.nn.Linear(6, 4), inputs, "has to call broken_layers.Scaled itself and return it"),
        (scaled, lambda: torch.randn(3, 6), "inputs() of the example gave Tensor, expected a tuple"),
    ],
)
def test_a_wrong_example_is_reported(build, given, message):
    entry = Entry(broken_layers, "Scaled", broken_layers.Good)
    with pytest.raises(CheckError) as caught:
        run_check("copied", Subject(entry, Example(entry.dotted, build, given), ()))
    assert message in str(caught.value)


def test_an_example_takes_functions():
    with pytest.raises(ArgumentTypeError, match="build of the example for pkg.Name is .*Write: build=lambda"):
        Example("pkg.Name", scaled(), inputs)


def test_what_the_float_layer_cannot_do_is_not_asked_of_the_quantized_one():
    entry = Entry("torch.nn", "AvgPool3d", "quantpatch.layers.pooling:QuantAvgPool3d")
    example = Example(entry.dotted, lambda: torch.nn.AvgPool3d(2), lambda: (torch.randn(1, 2, 4, 4, 4),))
    with pytest.raises(NotApplicable, match="the float layer cannot either"):
        run_check("half", Subject(entry, example, ()))


# --- What there is to try of installed plugins ----------------------------------------------------


def result(trial):
    """What came of a trial: a message, or an empty string."""
    try:
        trial.run()
    except (CheckError, NotApplicable) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(found):
    return {(trial.target, trial.check): result(trial) for trial in found}


ENTRY = Entry(broken_layers, "Scaled", broken_layers.Good)
EXAMPLE = Example(ENTRY.dotted, scaled, inputs)


def test_every_example_of_a_plugin_is_tried_on_every_check(plugin):
    name = plugin("mylib", entries=[ENTRY], examples=[EXAMPLE, attrs.evolve(EXAMPLE, label="again")])
    found = trials([name])
    assert {trial.target for trial in found} == {"broken_layers.Scaled", "broken_layers.Scaled [again]"}
    assert len(found) == 2 * len(CHECKS)
    assert len({trial.name for trial in found}) == len(found)
    assert set(run([trial for trial in found if trial.check in ("copied", "signature")]).values()) == {""}


def test_an_entry_without_an_example_fails_and_the_report_says_how_to_write_one(plugin):
    (failure,) = run(trials([plugin("mylib", entries=[ENTRY])])).values()
    assert "broken_layers.Scaled -> broken_layers:Good has no example" in failure
    assert "def quantpatch_examples():" in failure
    assert "from broken_layers import Scaled" in failure


def test_an_example_for_no_entry_fails_and_shows_the_right_name(plugin):
    name = plugin(
        "mylib", entries=[ENTRY], examples=[EXAMPLE, Example("broken_layers.Scald", scaled, inputs)]
    )
    found = [trial for trial in trials([name]) if trial.check == "examples"]
    assert "Did you mean 'broken_layers.Scaled'" in next(iter(run(found).values()))


def test_two_examples_with_one_label_fail(plugin):
    results = run(trials([plugin("mylib", entries=[ENTRY], examples=[EXAMPLE, EXAMPLE])]))
    assert results["broken_layers.Scaled", "examples"].endswith("several examples labelled ''")


def test_an_entry_for_a_package_that_is_not_installed_is_skipped_by_name(plugin):
    absent = Entry("no_such_package.layers", "Thing", "no_such_plugin:QuantThing")
    results = run(trials([plugin("mylib", entries=[absent])]))
    assert results == {
        ("no_such_package.layers.Thing", "examples"): "NotApplicable: no_such_package, which "
        "no_such_package.layers.Thing is part of, is not installed"
    }


@pytest.mark.parametrize("returned", [3, [EXAMPLE, "broken_layers.Scaled"], "text"])
def test_a_hook_that_returns_something_else_fails_as_its_plugin(plugin, returned):
    results = run(trials([plugin("mylib", entries=[ENTRY], examples=returned)]))
    (failure,) = results.values()
    assert "plugin 'mylib' returned" in failure
    assert "expected Example(target, build, inputs)" in failure


def test_an_unknown_plugin_is_an_error():
    with pytest.raises(UnknownNameError, match="Did you mean 'quantpatch.builtin'"):
        trials(["quantpatch.buildin"])


def test_blocked_plugins_are_left_out_and_failing_ones_fail(plugin, monkeypatch):
    plugin("mylib", entries=[ENTRY], examples=[EXAMPLE])
    plugin("other", entries=lambda: 1 / 0)
    monkeypatch.setenv("QUANTPATCH_PLUGINS", "other")
    found = [trial for trial in trials() if trial.plugin != "quantpatch.builtin"]
    (failure,) = run(found).values()
    assert "failed in its hook quantpatch_entries" in failure
    assert quantpatch.registry.plugins()


def test_an_optional_entry_for_a_class_that_is_not_there_is_skipped_by_name(plugin):
    entries = [
        Entry(broken_layers, "Gone", broken_layers.Good, optional=True),
        Entry("torch.nn.no_such_module", "Gone", "no_such_plugin:QuantGone", optional=True),
    ]
    results = run(trials([plugin("mylib", entries=entries)]))
    assert list(results.values()) == [
        "NotApplicable: the broken_layers that is installed has no broken_layers.Gone",
        "NotApplicable: the torch that is installed has no torch.nn.no_such_module.Gone",
    ]


def test_an_entry_for_a_function_is_skipped_since_the_checks_are_on_layers(plugin):
    entry = Entry("torch.nn.functional", "relu", torch.nn.functional.relu6)
    results = run(trials([plugin("mylib", entries=[entry])]))
    assert results == {
        ("torch.nn.functional.relu", "examples"): "NotApplicable: torch.nn.functional.relu is a function, "
        "and the checks are on layers"
    }
