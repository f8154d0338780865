"""What layers compute through while a model is exported is theirs for the block and the thread alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.layers.lowering import Lowering, lowered, lowering


def minus_one(x: torch.Tensor) -> torch.Tensor:
    return x - 1


def test_a_quantizer_computes_through_what_is_in_force_inside_the_block_alone() -> None:
    one, other = qp.TensorQuantizer(), qp.TensorQuantizer()
    x = torch.linspace(-1, 1, 9)
    before, state = one(x), dict(vars(one))
    with lowered(Lowering({one: minus_one})):
        assert torch.equal(one(x), x - 1)
        assert torch.equal(other(x), before)
    assert torch.equal(one(x), before)
    assert vars(one) == state


def test_an_exception_leaves_nothing_behind() -> None:
    quantizer = qp.TensorQuantizer()
    with pytest.raises(KeyError), lowered(Lowering({quantizer: minus_one})):
        raise KeyError
    assert lowering() is None
    assert "forward" not in vars(quantizer)


def test_another_thread_computes_as_ever() -> None:
    quantizer = qp.TensorQuantizer()
    x = torch.linspace(-1, 1, 9)
    expected, found = quantizer(x), []
    with lowered(Lowering({quantizer: minus_one})):
        thread = threading.Thread(target=lambda: found.append(quantizer(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_an_inner_block_counts_until_it_ends() -> None:
    quantizer = qp.TensorQuantizer()
    x = torch.ones(3)
    with lowered(Lowering({quantizer: minus_one})):
        with lowered(Lowering({quantizer: lambda x: x + 5})):
            assert torch.equal(quantizer(x), x + 5)
        assert torch.equal(quantizer(x), x - 1)


def test_a_tracers_own_object_that_shares_the_state_of_a_quantizer_counts_as_it() -> None:
    quantizer = qp.TensorQuantizer()
    proxy = object.__new__(type("Proxy", (qp.TensorQuantizer,), {}))
    object.__setattr__(proxy, "__dict__", vars(quantizer))
    with lowered(Lowering({quantizer: minus_one})):
        assert torch.equal(proxy(torch.ones(3)), torch.zeros(3))


def test_a_recurrent_layer_runs_in_steps_inside_the_block() -> None:
    with qp.quantize_modules():
        layer = nn.LSTM(4, 3)
    x = torch.randn(5, 2, 4)
    steps: list[int] = []
    run = type(layer)._run_by_steps

    class Counting(type(layer)):  # type: ignore[misc]
        def _run_by_steps(self, *args: object) -> object:
            steps.append(1)
            return run(self, *args)

    object.__setattr__(layer, "__class__", Counting)
    expected = layer(x)[0]
    assert not steps
    with lowered(Lowering({}, [layer])):
        assert torch.allclose(layer(x)[0], expected, atol=1e-6)
    assert steps == [1]
