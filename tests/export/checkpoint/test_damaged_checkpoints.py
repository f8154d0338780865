"""Files that nobody vouches for: load does what they say, or raises CheckpointError and leaves the model."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import quantpatch as qp
from quantpatch.errors import CheckpointError, QuantPatchError
from quantpatch.layers import QuantLinear

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import save_file


class Net(nn.Module):
    """Layers with operands of many kinds; two of them share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 6)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.rnn(self.table(tokens))[0]))


TOKENS = torch.arange(6).reshape(2, 3)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors of a file that loads."""
    path = tmp_path_factory.mktemp("valid") / "m.safetensors"
    torch.manual_seed(0)
    with qp.quantize_modules(include=["Embedding"]):
        model = Net().eval()
    qp.configure(model, {"rnn": "int4"})
    qp.calibrate(model, [TOKENS], progress=False)
    qp.save(model, path, packed=True)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["quantpatch"]), tensors


def converted(model: nn.Module) -> nn.Module:
    qp.convert(model)
    return model


def written(path: Path, description: Any, tensors: dict[str, torch.Tensor]) -> Path:
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(tensors, path, metadata={"quantpatch": text})
    return path


def seen(model: nn.Module) -> Any:
    """All that loading could change."""
    return (
        [
            (name, type(m), id(m), list(m._modules), list(m._forward_hooks))
            for name, m in model.named_modules()
        ],
        {name: str(value.tolist()) for name, value in model.state_dict().items()},  # NaN is NaN
        [
            (q.disabled, q.quantizing, q.descriptor)
            for q in model.modules()
            if isinstance(q, qp.TensorQuantizer)
        ],
    )


def refused(path: Path, model: nn.Module) -> str:
    before = seen(model)
    with pytest.raises(CheckpointError) as caught:
        qp.load(model, path)
    assert seen(model) == before
    return str(caught.value)


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be changed in a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, inner in items for path in paths_in(inner, (*here, key)))]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([10**400, float("nan"), float("inf"), -1.5, 1e300, {}, [], [[]], {"kind": "blocked"}])
    | st.sampled_from(
        ["", "int8", "nibble", "0", "head", "head.weight", "rnn.hidden_l0_quantizer", "\x1b[2J"]
    )
    | st.sampled_from(["torch.nn.modules.linear.Linear", "quantpatch.layers.linear.QuantLinear", "os.system"])
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_description_is_loaded_as_it_says_or_refused(data, valid, tmp_path) -> None:
    description, tensors = copy.deepcopy(valid[0]), dict(valid[1])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(paths_in(description), key=str)[1:] or [()]))
        if not path:
            continue
        owner = description
        for key in path[:-1]:
            owner = owner[key]
        how = data.draw(st.sampled_from(["change", "drop", "rename"]))
        if how == "change":
            owner[path[-1]] = data.draw(SCALARS)
        elif how == "drop" or isinstance(owner, list):
            del owner[path[-1]]
        else:
            owner[
                data.draw(st.text(max_size=4) | st.sampled_from(["head.weight", "head.forward", "act.x"]))
            ] = owner.pop(path[-1])
    file = written(tmp_path / "m.safetensors", description, tensors)
    model = Net().eval()
    before = seen(model)
    try:
        qp.load(model, file)
    except CheckpointError:
        assert seen(model) == before
        return
    # What was taken is what is saved again.
    again = tmp_path / "again.safetensors"
    qp.save(model, again)
    with safe_open(again, "pt") as saved:
        now = json.loads(saved.metadata()["quantpatch"])
    assert set(now["quantizers"]) == set(description["quantizers"])
    for name, quantizer in description["quantizers"].items():
        assert {key: quantizer[key] for key in ("disabled", "quantizing", "known")} == {
            key: now["quantizers"][name][key] for key in ("disabled", "quantizing", "known")
        }
    for name, layer in description["layers"].items():
        known = {key: layer[key] for key in ("replacement", "float_class")}
        assert now["layers"][name] == {**known, "operations": layer.get("operations", [])}
    with contextlib.suppress(QuantPatchError):  # an axis that no activation has
        model(TOKENS)


NAMES = [
    "head.weight",
    "head.bias",
    "head.forward",
    "head.__class__",
    "head.x",
    "head.hidden_quantizer",
    "act",
    ".",
    "x",
    "act.input_quantizer",
    "head..input_quantizer",
    "head.input_quantizer.input_quantizer",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["quantizers", "shared"])
def test_a_name_that_no_layer_has_an_operand_for_is_refused(name, kind, valid, tmp_path) -> None:
    description = copy.deepcopy(valid[0])
    first = "head.input_quantizer"
    extra = {**description["quantizers"][first], "known": False}
    description[kind][name] = extra if kind == "quantizers" else first
    file = written(tmp_path / "m.safetensors", description, valid[1])
    assert "the model has no" in refused(file, Net())
    with qp.quantize_modules(include=["Embedding"]):
        quantized = Net()
    assert "the model has no" in refused(file, quantized)


def test_quantizers_of_layers_that_the_file_has_float_are_refused(valid, tmp_path) -> None:
    file = written(tmp_path / "m.safetensors", {**valid[0], "layers": {}}, valid[1])
    assert "head.input_quantizer: the model has no such quantizer" in refused(file, Net())
    with qp.quantize_modules(include=["Embedding"]):
        quantized = Net()
    assert "head.input_quantizer: the model has no such quantizer" in refused(file, quantized)


def test_a_layer_that_is_shared_in_the_file_alone_is_refused(tmp_path) -> None:
    """Its second name would stay float."""

    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = self.one if shared else nn.Linear(3, 3)

    model = converted(Twice(shared=True))
    qp.save(model, tmp_path / "m.safetensors")
    assert "two.input_quantizer: in the file it is one.input_quantizer" in refused(
        tmp_path / "m.safetensors", Twice(shared=False)
    )
    assert qp.load(Twice(shared=True), tmp_path / "m.safetensors").two.input_quantizer is not None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("quantizers", "head.input_quantizer", "disabled"), "false", "'disabled' of head.input_quantizer"),
        (("quantizers", "head.input_quantizer", "known"), 1, "expected true or false"),
        (("quantizers", "head.input_quantizer", "descriptor"), [], "expected an object"),
        (("quantizers", "head.input_quantizer", "descriptor", "narrow_range"), {}, "expected True or False"),
        (("quantizers", "head.input_quantizer", "descriptor", "amax"), 10**400, "a positive finite number"),
        (("quantizers", "head.input_quantizer", "descriptor", "bits"), 8, "no descriptor has bits"),
        (
            ("quantizers", "head.input_quantizer", "descriptor", "format"),
            {"kind": "integer", "bits": 8, "unsigned": "yes"},
            "unsigned of an integer format is True or False",
        ),
        (
            ("quantizers", "head.input_quantizer", "descriptor", "format"),
            {"kind": "float", "exponent_bits": 4.0, "mantissa_bits": 3},
            "there is no format",
        ),
        (
            ("quantizers", "head.input_quantizer", "descriptor", "format"),
            {"kind": "blocked", "block_size": 2, "element": {"kind": "blocked", "block_size": 2}},
            "blocks in its blocks",
        ),
        (("quantizers", "rnn.weight_ih_l0_quantizer", "descriptor", "axis"), 7, "its axis 7 is not one of"),
        (("packed", "rnn.weight_ih_l0", "shape"), [float("inf"), 4], "item 0 of 'shape' of rnn.weight_ih_l0"),
        (("packed", "rnn.weight_ih_l0", "shape"), [4, 12], "do not fit"),
        (("packed", "rnn.weight_ih_l0", "dtype"), "load", "one that no weight has"),
        (("layers", "head", "replacement"), ["QuantLinear"], "expected text"),
        (("shared",), {"head.x": 3}, "expected text"),
        (("file_version",), True, "which version"),
        (("plugins",), [{"name": 3}], "expected text"),
    ],
)  # fmt: skip
def test_what_is_of_a_wrong_type_is_named(path, value, message, valid, tmp_path) -> None:
    description = copy.deepcopy(valid[0])
    owner = description
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    assert message in refused(written(tmp_path / "m.safetensors", description, valid[1]), Net())


def test_a_description_nested_beyond_measure(valid, tmp_path) -> None:
    for text in (
        "[" * 200_000,
        json.dumps(valid[0]).replace('"axis": 0', '"axis": ' + "[" * 900 + "]" * 900),
    ):
        refused(written(tmp_path / "m.safetensors", text, valid[1]), Net())


def test_tensors_of_another_kind(valid, tmp_path) -> None:
    tensors = {**valid[1], "head.bias": valid[1]["head.bias"].to(torch.complex64)}
    message = refused(written(tmp_path / "m.safetensors", valid[0], tensors), Net())
    assert "head.bias: the file has torch.complex64, the model torch.float32" in message
    tensors = {**valid[1], "head.input_quantizer._amax": torch.ones(1, dtype=torch.int32)}
    assert "its range is torch.int32" in refused(
        written(tmp_path / "m.safetensors", valid[0], tensors), Net()
    )


def test_a_range_that_is_said_not_to_be_known(valid, tmp_path) -> None:
    description = copy.deepcopy(valid[0])
    description["quantizers"]["head.input_quantizer"]["known"] = False
    assert "says is not known" in refused(written(tmp_path / "m.safetensors", description, valid[1]), Net())
    tensors = {**valid[1], "head.input_quantizer._amax": torch.tensor(torch.nan)}
    model = qp.load(Net(), written(tmp_path / "m.safetensors", description, tensors))
    assert model.head.input_quantizer.amax is None


def test_names_are_shown_short_and_without_control_characters(valid, tmp_path) -> None:
    description = copy.deepcopy(valid[0])
    extra = {**description["quantizers"]["head.input_quantizer"], "known": False}
    description["quantizers"]["\x1b[31m" + "x" * 1_000_000] = extra
    description["layers"]["head"]["replacement"] = "\x07" * 1_000_000
    description["quantizers"]["head.input_quantizer"]["descriptor"]["format"] = "y" * 1_000_000
    message = refused(written(tmp_path / "m.safetensors", description, valid[1]), Net())
    assert len(message) < 4_000
    assert message.replace("\n", "").isprintable()


# --- classes ------------------------------------------------------------------------------------------------


def named(path: Path, name: str) -> Path:
    """A file of one linear layer whose class has a name."""
    qp.save(converted(nn.Sequential(nn.Linear(2, 2))), path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["quantpatch"])
    description["layers"]["0"]["replacement"] = name
    return written(path, description, tensors)


def test_no_module_is_imported_or_asked_for_attributes(tmp_path, monkeypatch) -> None:
    asked = []

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "lazy_module_of_the_test", Lazy("lazy_module_of_the_test"))
    before = set(sys.modules)
    names = ("lazy_module_of_the_test.Quant", "torch._inductor.config.x", "antigravity.Quant", "quantpatch.x")
    for name in names:
        file = named(tmp_path / "m.safetensors", name)
        assert "Import what defines it first" in refused(file, nn.Sequential(nn.Linear(2, 2)))
    assert asked == []
    assert set(sys.modules) == before


def test_a_class_that_exists_is_found_wherever_it_was_defined(tmp_path) -> None:
    class QuantHere(qp.QuantizedLayer, nn.Linear):
        pass

    with qp.quantize_modules(custom=[(nn, "Linear", QuantHere)]):
        model = nn.Sequential(nn.Linear(2, 2))
    qp.save(model, tmp_path / "m.safetensors")
    assert type(qp.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.safetensors")[0]) is QuantHere


def test_a_class_for_other_layers_is_refused(tmp_path) -> None:
    file = named(tmp_path / "m.safetensors", "quantpatch.layers.conv.QuantConv2d")
    assert "offered by no plugin for a torch.nn.modules.linear.Linear" in refused(
        file, nn.Sequential(nn.Linear(2, 2))
    )
    assert QuantLinear.float_class is nn.Linear


# --- costs, and what is left when the model's own code fails ---------------------------------------------


def test_invented_quantizers_cost_no_more_than_others(tmp_path) -> None:
    """Within a factor that a quadratic share would break by far: 4,000 took a minute."""
    qp.save(converted(nn.Sequential(nn.Linear(2, 2))), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["quantpatch"])
    for i in range(4000):
        description["quantizers"][f"0.x{i}_quantizer"] = description["quantizers"]["0.input_quantizer"]
    file = written(tmp_path / "m.safetensors", description, tensors)
    start = time.perf_counter()
    refused(file, nn.Sequential(nn.Linear(2, 2)))
    assert time.perf_counter() - start < 10


def test_what_the_models_own_code_raises_leaves_the_layers_as_they_were(tmp_path) -> None:
    qp.save(converted(nn.Sequential(nn.Linear(2, 2))), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(2, 2))

    def fails(*args: Any) -> None:
        raise KeyError("mine")

    model.register_load_state_dict_pre_hook(fails)
    before = [(type(m), list(m._modules), dict(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(CheckpointError, match="failed in the model's own code"):
        qp.load(model, tmp_path / "m.safetensors")
    assert [(type(m), list(m._modules), dict(m._forward_pre_hooks)) for m in model.modules()] == before


def test_a_class_that_a_tracer_made_of_a_layers_class_is_not_taken_for_it(tmp_path) -> None:
    """As torch.export makes one of each layer's class, of the same name, with modules of its own."""
    names = {"__module__": QuantLinear.__module__, "__qualname__": QuantLinear.__qualname__}
    made = type("QuantLinear", (QuantLinear,), {**names, "_modules": property(lambda self: {})})
    qp.save(converted(nn.Sequential(nn.Linear(2, 2))), tmp_path / "m.safetensors")
    model = qp.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.safetensors")
    assert type(model[0]) is QuantLinear is not made
