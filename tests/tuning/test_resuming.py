"""A tuning that was interrupted leaves the model as it was, and is gone on with from what it has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import FileError
from quantpatch.tuning import GPTQ, Tuner, Tuning

METHODS: list[str | Tuner] = ["smoothquant", "gptq", "bias_correction"]


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)]
    made = nn.Sequential(*parts)
    with torch.no_grad():
        made[0][0].weight[1] = 20.0
    qp.convert(made, "w4a8")
    return made


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, 8) for _ in range(2)]


def state(made: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in made.state_dict().items() if value is not None}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True)


def interrupted(monkeypatch: pytest.MonkeyPatch, rounds: int, **options: Any) -> nn.Module:
    """A model whose tuning ended after some weights."""
    made, real, done = model(), GPTQ._round, []

    def stop(self: GPTQ, tuning: Tuning, weight: Any, seen: Any) -> None:
        if len(done) == rounds:
            raise KeyboardInterrupt
        done.append(weight.name)
        real(self, tuning, weight, seen)

    before = state(made)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GPTQ, "_round", stop)
        qp.tune(made, batches(), method=METHODS, calibration={"zero_points": True}, **options)
    assert_same(state(made), before)
    return made


def test_an_interrupted_tuning_goes_on_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model()
    wanted = qp.tune(whole, batches(), method=METHODS, calibration={"zero_points": True})
    made = interrupted(monkeypatch, 3, resume=tmp_path / "kept")
    # What SmoothQuant did, and three blocks of GPTQ.
    assert len(list((tmp_path / "kept").iterdir())) == 4
    rounded: list[str] = []
    real = GPTQ._round
    monkeypatch.setattr(
        GPTQ, "_round", lambda s, t, w, seen: (rounded.append(w.name), real(s, t, w, seen))[1]
    )
    report = qp.tune(
        made, batches(), method=METHODS, calibration={"zero_points": True}, resume=tmp_path / "kept"
    )
    assert rounded == ["1.3.weight", "2.1.weight", "2.3.weight"]
    assert_same(state(made), state(whole))
    assert [(step.method, list(step.tuned)) for step in report.steps] == [
        (step.method, list(step.tuned)) for step in wanted.steps
    ]
    qp.revert(made)
    assert not any("input_factor" in name for name in made.state_dict())


def test_what_is_finished_is_taken_from_the_folder_as_a_whole(tmp_path: Path) -> None:
    one, other = model(), model()
    report = qp.tune(one, batches(), method=METHODS, resume=tmp_path)
    again = qp.tune(other, batches(), method=METHODS, resume=tmp_path)
    assert_same(state(one), state(other))
    assert again.to_dicts() == report.to_dicts()


def test_a_folder_of_another_tuning_is_refused(tmp_path: Path) -> None:
    made = model()
    qp.tune(made, batches(), method="gptq", resume=tmp_path)
    with pytest.raises(FileError, match="of other methods, options, ranges or seed"):
        qp.tune(model(), batches(), method="gptq", damping=0.1, resume=tmp_path)
    with pytest.raises(FileError, match="of another model"):
        qp.tune(made, batches(), method="gptq", resume=tmp_path)


def test_a_damaged_file_is_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    qp.tune(model(), batches(), method="gptq", resume=tmp_path)
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-4])
    made = model()
    before = state(made)
    with pytest.raises(FileError, match="holds nothing that tune has kept"):
        qp.tune(made, batches(), method="gptq", resume=tmp_path)
    first.unlink()
    with pytest.raises(FileError, match="lacks some of its files"):
        qp.tune(made, batches(), method="gptq", resume=tmp_path)
    assert_same(state(made), before)
