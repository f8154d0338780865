"""Runs wait at modules, go on as these have become meanwhile, and leave nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantpatch.torch_tools.forward import EnoughOfBatch
from quantpatch.torch_tools.paused import PausedRuns


class Doubling(nn.Module):
    """Doubles what it is given, in place; counts calls, and keeps a list that it is handed."""

    calls = 0

    def forward(self, x: Tensor, cache: list[int]) -> Tensor:
        self.calls += 1
        cache.append(self.calls)
        return x.mul_(2)


class Chain(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Doubling() for _ in range(count))
        self.results: list[tuple[Tensor, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        cache: list[int] = []
        x = x + 0
        for block in self.blocks:
            x = block(x, cache)
        self.results.append((x, len(cache)))
        return x


def finished(runs: PausedRuns) -> None:
    assert runs.waiting_at(nn.Identity()) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_looked_at_leaves_the_run_as_it_was(tmp_path: Path, on_disk: bool) -> None:
    model = Chain(3)
    batches = [torch.tensor([1.0]), torch.tensor([10.0])]
    seen: list[Any] = []
    with PausedRuns(model, batches, model.blocks, folder=tmp_path if on_disk else None) as runs:
        for block in model.blocks:
            for run in runs.waiting_at(block):
                handle = block.register_forward_pre_hook(lambda _, args: seen.append(float(args[0])))
                run.look(lambda call: call())
                handle.remove()
            runs.pass_(block)
        finished(runs)
    assert seen == [1.0, 10.0, 2.0, 20.0, 4.0, 40.0]
    assert [(float(x), count) for x, count in model.results] == [(8.0, 3), (80.0, 3)]
    assert [block.calls for block in model.blocks] == [4, 4, 4]
    assert [float(batch) for batch in batches] == [1.0, 10.0]


def test_a_module_that_changes_while_it_is_waited_at_is_gone_through_as_it_has_become() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    with torch.no_grad(), PausedRuns(model, [torch.ones(1, 1)], model) as runs:
        assert len(runs.waiting_at(model[0])) == 1
        model[0].weight.fill_(5.0)
        runs.pass_(model[0])
        (run,) = runs.waiting_at(model[1])
        found: list[float] = []
        model[1].register_forward_pre_hook(lambda _, args: found.append(float(args[0])))
        run.look(lambda call: call())
        assert found == [5.0]


def test_an_error_in_a_run_reaches_who_asked_and_threads_end() -> None:
    before = threading.active_count()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    runs = PausedRuns(model, [torch.ones(1, 2), torch.ones(1, 2)], model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), runs:
        runs.waiting_at(model[0])
        assert threading.active_count() == before + 2
        runs.pass_(model[0])
        for run in runs.waiting_at(model[1]):
            run.look(lambda call: call())
    assert threading.active_count() == before
    assert not any(layer._forward_pre_hooks for layer in model)


def test_a_look_may_end_early() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def enough(call: Any) -> None:
        raise EnoughOfBatch

    with PausedRuns(model, [torch.ones(1, 2)], model) as runs:
        (run,) = runs.waiting_at(model[0])
        run.look(enough)
        runs.pass_(model[0])
        assert len(runs.waiting_at(model[1])) == 1


def test_runs_have_the_settings_of_the_thread_that_began_them() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append((torch.is_grad_enabled(), (x @ x).dtype))
            return x

    asked: list[Any] = []
    model = nn.Sequential(Asks())
    runs = PausedRuns(model, [torch.ones(2, 2)], [nn.Identity()])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), runs:
        finished(runs)
    assert asked == [(False, torch.bfloat16)]
