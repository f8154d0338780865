"""save and load: what comes back is what was saved, and what cannot be loaded leaves the model as it was."""

from __future__ import annotations

import copy
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, CheckpointError, MissingExtraError
from quantpatch.export.checkpoint.packing import pack, unpack
from quantpatch.export.checkpoint.save_load import float_state_dict, load, save
from quantpatch.numerics.formats import BUILTIN_FORMATS, Float, Integer, NumberFormat

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file


class Net(nn.Module):
    """A convolution, a transposed one, an LSTM, attention, and a tied embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.ConvTranspose1d(width, width, 3, padding=1)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 20)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.table(tokens).transpose(1, 2)
        y = self.up(torch.relu(self.norm(self.conv(y)))).transpose(1, 2)
        y = self.rnn(y)[0]
        y = self.attention(y, y, y, need_weights=False)[0]
        return self.head(y)


TOKENS = torch.arange(24).reshape(2, 12) % 20


def trained(recipe: Any = "int8", build: Any = Net) -> nn.Module:
    torch.manual_seed(1)
    with qp.quantize_modules(recipe=recipe):
        model = build()
    model.eval()
    if any(not q.descriptor.dynamic for q in model.modules() if isinstance(q, qp.TensorQuantizer)):
        qp.calibrate(model, [TOKENS], progress=False)
    return model


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def ready(recipe: Any = "int8") -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = small().eval()
    if any(not q.descriptor.dynamic for q in model.modules() if isinstance(q, qp.TensorQuantizer)):
        qp.calibrate(model, [torch.randn(16, 6)], progress=False)
    return model


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [(n, type(m), id(m)) for n, m in model.named_modules()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": [
            (m.disabled, m.quantizing, m.descriptor)
            for m in model.modules()
            if isinstance(m, qp.TensorQuantizer)
        ],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    assert now["classes"] == before["classes"]
    assert now["flags"] == before["flags"]
    assert list(now["state"]) == list(before["state"])
    assert all(torch.equal(now["state"][k], v) for k, v in before["state"].items())


# --- coming back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", "int4", "int4-weight-only", "fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_outputs_come_back(recipe: str, packed: bool, tmp_path: Path) -> None:
    model = trained(recipe)
    save(model, tmp_path / "m.safetensors", packed=packed)
    back = load(Net, tmp_path / "m.safetensors").eval()
    assert torch.equal(back(TOKENS), model(TOKENS))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert back.head.weight is back.table.weight


@pytest.mark.parametrize("start", ["float", "quantized", "other recipe", "partly", "meta"])
def test_a_model_in_any_state_becomes_what_was_saved(start: str, tmp_path: Path) -> None:
    model = trained()
    model.conv.input_quantizer.disable()
    model.head.weight_quantizer.disable_quant()
    save(model, tmp_path / "m.safetensors")
    if start == "meta":
        with torch.device("meta"):
            other = Net()
    elif start == "float":
        other = Net()
    else:
        with qp.quantize_modules(
            recipe="int4" if start == "other recipe" else "int8",
            skip=["Linear"] if start == "partly" else [],
        ):
            other = Net()
    assert load(other, tmp_path / "m.safetensors") is other
    other.eval()
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.conv.input_quantizer.disabled
    assert not other.head.weight_quantizer.quantizing
    assert other.head.weight is other.table.weight
    assert not any(t.is_meta for t in other.state_dict().values())


def test_layers_that_the_file_has_float_are_reverted(tmp_path: Path) -> None:
    with qp.quantize_modules(skip=["Linear"]):
        model = nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2)).eval()
    qp.calibrate(model, [torch.randn(2, 4)], progress=False)
    save(model, tmp_path / "m.safetensors")
    with qp.quantize_modules():
        other = nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2)).eval()
    load(other, tmp_path / "m.safetensors")
    assert type(other[0]) is nn.Linear
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


def test_an_operand_that_the_file_leaves_float_loses_its_quantizer(tmp_path: Path) -> None:
    model = ready("int8-weight-only")
    save(model, tmp_path / "m.safetensors")
    other = ready("int8")
    load(other, tmp_path / "m.safetensors")
    assert list(other[0].quantizers()) == ["weight_quantizer"]


def test_an_uncalibrated_model_round_trips(tmp_path: Path) -> None:
    with qp.quantize_modules():
        model = small().eval()
    save(model, tmp_path / "m.safetensors")
    other = ready()
    load(other, tmp_path / "m.safetensors")
    assert other[0].input_quantizer.amax is None
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))


def test_dtype_of_the_model_is_kept_and_ranges_stay_float32(tmp_path: Path) -> None:
    model = ready().bfloat16()
    save(model, tmp_path / "m.safetensors", packed=True)
    with torch.device("meta"):
        other = small().bfloat16()
    load(other, tmp_path / "m.safetensors").eval()
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert other[0].weight.dtype == torch.bfloat16
    assert other[0].input_quantizer.amax.dtype == torch.float32
    assert torch.equal(other(x), model(x))


def test_shared_layers_and_single_quantizers(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.own = qp.TensorQuantizer(qp.QuantDescriptor(amax=3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(self.b(self.a(x)))

    with qp.quantize_modules():
        model = Shared().eval()
    qp.calibrate(model, [torch.randn(2, 4)], progress=False)
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(3, 4)
    other = load(Shared, tmp_path / "m.safetensors").eval()
    assert other.a is other.b
    assert torch.equal(other(x), model(x))


def test_parametrized_weights(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = small()
        nn.utils.parametrizations.weight_norm(model[0])
        return model

    model = build()
    qp.convert(model)
    qp.calibrate(model.eval(), [torch.randn(4, 6)], progress=False)
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(3, 6)
    quantized_already = build()
    qp.convert(quantized_already)
    for other in (build(), quantized_already):
        load(other, tmp_path / "m.safetensors").eval()
        assert torch.equal(other(x), model(x))
    qp.revert(other)
    save(other, tmp_path / "float.safetensors")
    assert type(load(model, tmp_path / "float.safetensors")[0]).__bases__ == (nn.Linear,)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("packed", [False, True])
def test_a_learned_range_past_zero(tmp_path: Path, packed: bool) -> None:
    learned = qp.QuantDescriptor(axis="channel", narrow_range=True, learn_amax=True)
    with qp.quantize_modules(recipe=qp.Recipe(name="learned", weight=learned)):
        model = small().eval()
    x = torch.randn(3, 6)
    qp.calibrate(model, [x], progress=False)
    with torch.no_grad():
        model[0].weight_quantizer.amax[0].neg_()
    save(model, tmp_path / "m.safetensors", packed=packed)
    assert torch.equal(load(small, tmp_path / "m.safetensors").eval()(x), model(x))


def test_training_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """Learned ranges and the optimizer's state are resumed exactly."""
    torch.manual_seed(3)
    recipe = qp.Recipe(
        name="learned",
        input=qp.QuantDescriptor(learn_amax=True),
        weight=qp.QuantDescriptor(axis="channel", narrow_range=True, learn_amax=True),
    )
    model = ready(recipe)
    x, y = torch.randn(32, 6), torch.randn(32, 3)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    steps(model, optimizer, 5)
    save(model, tmp_path / "m.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    expected = steps(model, optimizer, 5)

    resumed = load(small, tmp_path / "m.safetensors").train()
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt"))
    assert steps(resumed, optimizer, 5) == expected
    assert isinstance(resumed[0].input_quantizer.amax, nn.Parameter)


def test_loading_into_the_model_that_an_optimizer_holds_keeps_its_parameters(tmp_path: Path) -> None:
    recipe = qp.Recipe(name="learned", input=qp.QuantDescriptor(learn_amax=True))
    model = ready(recipe)
    save(model, tmp_path / "m.safetensors")
    held = list(model.parameters())
    with torch.no_grad():
        for parameter in held:
            parameter.mul_(1.5)
    load(model, tmp_path / "m.safetensors")
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_float_state_dict_loads_strictly_into_the_float_model() -> None:
    model = trained()
    other = Net()
    other.load_state_dict(float_state_dict(model))
    assert torch.equal(other.conv.weight, model.conv.weight)
    assert list(float_state_dict(Net())) == list(Net().state_dict())


def test_a_float_model_round_trips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small()
    save(model, tmp_path / "m.safetensors")
    other = load(ready(), tmp_path / "m.safetensors")
    assert type(other[0]) is nn.Linear
    assert torch.equal(other[0].weight, model[0].weight)


# --- packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("numel", [1, 6, 7])
def test_every_code_comes_back(bits: int, unsigned: bool, numel: int) -> None:
    element = Integer(bits, unsigned=unsigned)
    kind = torch.uint8 if unsigned else torch.int8
    codes = torch.randint(int(element.min), int(element.max) + 1, (numel,)).to(kind)
    codes[0] = int(element.min)
    data = pack(codes, bits)
    assert data.numel() == ((numel + 1) // 2 if bits <= 4 else numel)
    assert torch.equal(unpack(data, (numel,), element), codes)


@pytest.mark.parametrize(
    ("recipe", "least"), [("int8", 0.7), ("int4", 0.84), ("int4-weight-only", 0.82), ("w4a8", 0.84)]
)
def test_packing_saves_what_it_says(recipe: str, least: float, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 128))

    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = build().eval()
    x = torch.randn(8, 200)
    if recipe != "int4-weight-only":
        qp.calibrate(model, [x], progress=False)
    report = save(model, tmp_path / "m.safetensors", packed=True)
    assert report.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert report.saved > least
    assert report.packed == ("0.weight", "2.weight")
    assert re.search(r"weights packed +2, ", str(report))
    assert not any(
        tensor.dtype == torch.float32 and tensor.numel() > 600 for tensor in load_file(report.path).values()
    )
    back = load(build, report.path).eval()
    assert torch.equal(back(x), model(x))


def test_what_cannot_be_packed_is_said(tmp_path: Path) -> None:
    report = save(ready("fp8"), tmp_path / "m.safetensors", packed=True)
    assert report.packed == ()
    assert "only integers" in report.skipped["0.weight"]
    assert "0.weight is not packed" in str(report)


# --- what is refused ----------------------------------------------------------------------------------------


def altered(path: Path, change: Any) -> Path:
    """The file with another description or other tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["quantpatch"])
    tensors = load_file(path)
    change(description, tensors)
    other = path.with_name("altered.safetensors")
    save_file(tensors, other, metadata={"quantpatch": json.dumps(description)})
    return other


def set_range(value: float) -> Any:
    def change(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["0.weight_quantizer._amax"].view(-1)[1] = value

    return change


CHANGES = {
    "0.weight_quantizer: its range is negative": set_range(-1.0),
    "0.weight_quantizer: its range holds NaN or infinity": set_range(float("nan")),
    "0.weight_quantizer: its range is missing": lambda d, t: t.pop("0.weight_quantizer._amax"),
    "0.input_quantizer: its range has the shape (3,)": lambda d, t: t.update(
        {"0.input_quantizer._amax": torch.ones(3)}
    ),
    "0.weight_quantizer: its range has the shape (4, 1), expected (5, 1)": lambda d, t: t.update(
        {"0.weight_quantizer._amax": torch.ones(4, 1)}
    ),
    "0.weight: the file has the shape (5, 7), the model (5, 6)": lambda d, t: t.update(
        {"0.weight": torch.ones(5, 7)}
    ),
    "the file has no 2.bias": lambda d, t: t.pop("2.bias"),
    "the model has no 3.weight": lambda d, t: t.update({"3.weight": torch.ones(2)}),
    "written by quantpatch 9.0 in version 99": lambda d, t: d.update(file_version=99, quantpatch="9.0"),
    "2: the file has a torch.nn.modules.conv.Conv2d, the model a "
    "torch.nn.modules.linear.Linear": lambda d, t: d["layers"].update(
        {
            "2": {
                "replacement": "quantpatch.layers.conv.QuantConv2d",
                "float_class": "torch.nn.modules.conv.Conv2d",
            }
        }
    ),
    "7 (q.Q): the model has no such layer": lambda d, t: d["layers"].update(
        {"7": {"replacement": "q.Q", "float_class": "F"}}
    ),
    "offered by no plugin": lambda d, t: d["layers"]["2"].update({"replacement": "elsewhere.QuantLinear"}),
    "unknown format 'nibble'": lambda d, t: d["quantizers"]["0.input_quantizer"]["descriptor"].update(
        format="nibble"
    ),
    "its description is damaged": lambda d, t: d.pop("quantizers"),
    "9.x: in the file it is 0.input_quantizer; the model has no place for it": lambda d, t: d.update(
        shared={"9.x": "0.input_quantizer"}
    ),
    "no such quantizer": lambda d, t: d["quantizers"].update({"1.x": d["quantizers"]["0.input_quantizer"]}),
}


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_what_does_not_fit_is_named_and_the_model_untouched(message: str, kind: str, tmp_path: Path) -> None:
    save(ready(), tmp_path / "m.safetensors")
    file = altered(tmp_path / "m.safetensors", CHANGES[message])
    model = small() if kind == "float" else ready("int4")
    before = fingerprint(model)
    with pytest.raises(CheckpointError) as caught:
        load(model, file)
    assert message in str(caught.value)
    assert caught.value.path == str(file)
    assert caught.value.problems
    assert_untouched(model, before)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(ready(), path)
    path.write_bytes(path.read_bytes()[:keep])
    model = ready()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match="truncated"):
        load(model, path)
    assert_untouched(model, before)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(small(), tmp_path / "none.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"qp\.save did not write it"):
        load(small(), tmp_path / "plain.safetensors")
    torch.save(ready().state_dict(), tmp_path / "torch.pt")
    with pytest.raises(CheckpointError, match="torch.save wrote it.*LitModel.load_from_checkpoint"):
        load(small(), tmp_path / "torch.pt")
    header = json.dumps({"__metadata__": {"quantpatch": "[]"}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(small(), tmp_path / "odd.safetensors")


def test_another_architecture(tmp_path: Path) -> None:
    save(ready(), tmp_path / "m.safetensors")
    model = Net()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match="no such layer"):
        load(model, tmp_path / "m.safetensors")
    assert_untouched(model, before)


def test_batch_norm_that_is_folded_on_one_side_alone_is_reported(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()

    plain, folded = build(), build()
    qp.fold_batchnorm(folded)
    save(folded, tmp_path / "folded.safetensors")
    save(plain, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"1: if batch norm was folded .* write qp\.fold_batchnorm"):
        load(plain, tmp_path / "folded.safetensors")
    with pytest.raises(CheckpointError, match="1: if batch norm of the model was folded, load into one"):
        load(folded, tmp_path / "plain.safetensors")


def test_load_takes_the_model_first_or_what_builds_it(tmp_path: Path) -> None:
    save(small(), tmp_path / "m.safetensors")
    assert isinstance(load(small, tmp_path / "m.safetensors"), nn.Module)
    with pytest.raises(ArgumentTypeError, match=r"write load\(model, path\)"):
        load(tmp_path / "m.safetensors", small())
    for given in (3, lambda: 3):
        with pytest.raises(ArgumentTypeError, match="load takes a model"):
            load(given, tmp_path / "m.safetensors")


@attrs.frozen
class Thirds(NumberFormat):
    """Multiples of a third."""

    name = "thirds"
    bits = 8
    max = 10.0

    def round_(self, y: torch.Tensor) -> torch.Tensor:
        return y.mul_(3).round_().div_(3).clamp_(-10, 10)


def test_a_plugins_format_is_written_by_name_and_asked_for_again(plugin: Any, tmp_path: Path) -> None:
    from quantpatch.plugins.registry import registry

    recipe = qp.Recipe(name="thirds", input=qp.QuantDescriptor(format=Thirds()))
    with pytest.raises(CheckpointError, match="no plugin offers it"):
        save(ready(recipe), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    name = plugin("thirds-plugin", formats={"thirds": Thirds()})
    model = ready(recipe)
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(load(small, tmp_path / "m.safetensors")(x), model(x))
    registry.unregister(name)
    try:
        untouched = small()
        weights = {name: value.clone() for name, value in untouched.state_dict().items()}
        with pytest.raises(CheckpointError, match="the plugin 'thirds-plugin' is not installed") as caught:
            load(untouched, tmp_path / "m.safetensors")
        assert [type(layer) for layer in untouched] == [type(layer) for layer in small()]
        assert all(torch.equal(value, weights[name]) for name, value in untouched.state_dict().items())
        assert "unknown format 'thirds'" in str(caught.value)
    finally:
        plugin("thirds-plugin-again")
        import types

        registry.register(types.ModuleType("thirds_plugin"), name)


def test_no_code_of_the_file_is_imported(tmp_path: Path) -> None:
    save(ready(), tmp_path / "m.safetensors")

    def change(description: dict[str, Any], tensors: Any) -> None:
        description["layers"]["0"]["replacement"] = "antigravity.QuantLinear"

    with pytest.raises(CheckpointError):
        load(small(), altered(tmp_path / "m.safetensors", change))
    assert "antigravity" not in sys.modules


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save(ready(), path)
    before = path.read_bytes()

    def broken(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        save(ready("int4"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device"):
        save(model, tmp_path / "m.safetensors")

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(CheckpointError, match="get_extra_state"):
        save(Extra(2, 2), tmp_path / "m.safetensors")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"quantpatch\[safetensors\]"):
        save(small(), tmp_path / "m.safetensors")
    with pytest.raises(MissingExtraError, match=r"quantpatch\[safetensors\]"):
        load(small(), tmp_path / "m.safetensors")


def test_every_builtin_format_round_trips_as_fields(tmp_path: Path) -> None:
    model = nn.Sequential(
        *(qp.TensorQuantizer(qp.QuantDescriptor(format=format)) for format in BUILTIN_FORMATS.values())
    )
    save(model, tmp_path / "m.safetensors")
    other = copy.deepcopy(model)
    for quantizer in other:
        quantizer.descriptor = qp.QuantDescriptor(format=Float(4, 3))
    load(other, tmp_path / "m.safetensors")
    assert [q.format for q in other] == [q.format for q in model]
    assert [q.descriptor for q in other] == [q.descriptor for q in model]


class Counting(nn.Sequential):
    """Counts how often somebody goes through all of its modules."""

    walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.walks += 1
        return super().named_modules(*args, **kwargs)


def test_loading_looks_through_a_model_as_often_however_many_layers_it_has(tmp_path: Path) -> None:
    walks = []
    for layers in (2, 40):
        with qp.quantize_modules():
            model = Counting(*(nn.Linear(2, 2) for _ in range(layers)))
        qp.calibrate(model, [torch.randn(4, 2)], progress=False)
        save(model, tmp_path / "m.safetensors")
        again = Counting(*(nn.Linear(2, 2) for _ in range(layers)))
        load(again, tmp_path / "m.safetensors")
        walks.append(again.walks)
    assert walks[0] == walks[1]


def test_a_model_that_is_saved_while_it_is_calibrated_quantizes_when_it_is_loaded(tmp_path):
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(2, 2))
    with qp.calibrating(model):
        model(torch.randn(4, 2))
        qp.save(model, tmp_path / "model.safetensors")
    loaded = qp.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.safetensors")
    assert loaded[0].input_quantizer.quantizing
    model[0].input_quantizer.disable_quant()  # for good
    qp.save(model, tmp_path / "model.safetensors")
    assert not qp.load(model, tmp_path / "model.safetensors")[0].input_quantizer.quantizing
