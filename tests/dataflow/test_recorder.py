"""What a run of a model computed is recorded: operators, values and modules; nothing is kept alive."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.dataflow import Dataflow, dataflow, recording


class Calling(nn.Module):
    """Runs a function on its quantized input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.quantizer = qp.TensorQuantizer()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.quantizer(x))


def recorded(function: Callable[[Tensor], Any]) -> Dataflow:
    model = Calling(function)
    x = torch.randn(4, 4)
    return dataflow(model, lambda: model(x))


def test_values_go_from_operator_to_operator() -> None:
    flow = recorded(lambda x: (x @ x).relu())
    names = [operator.name for operator in flow.operators]
    assert names == ["quantizer", "aten::mm", "aten::relu"]
    quantizer, product, relu = flow.operators
    assert product.inputs == (quantizer.outputs[0], quantizer.outputs[0])
    assert product.outputs[0].uses == [relu]
    assert relu.outputs[0].maker is relu
    assert relu.outputs[0].is_result
    assert relu.outputs[0].outputs_of == [""]
    assert [p.macs for p in product.products] == [64]
    assert product.products[0].operands[0] == ("left", quantizer.outputs[0])


def test_a_view_that_is_written_to_changes_what_it_is_a_view_of() -> None:
    def fill(x: Tensor) -> Tensor:
        x[0].add_(1)
        return x @ x

    flow = recorded(fill)
    (added,) = flow.named("add")
    (product,) = flow.named("mm")
    assert product.inputs[0].maker is added
    (before, after) = added.written[0]
    assert before.maker is flow.operators[0]
    assert after is product.inputs[0]


def test_what_an_operator_writes_into_by_keyword_is_its_result() -> None:
    flow = recorded(lambda x: torch.mm(x, x, out=torch.empty(4, 4)) * 2)
    (product,) = flow.named("mm")
    (scaled,) = flow.named("mul")
    assert scaled.inputs[0].maker is product
    assert scaled.args == (None, 2)


def test_keywords_that_are_no_tensors_are_kept() -> None:
    (added,) = recorded(lambda x: torch.add(x, x, alpha=-3)).named("add")
    assert added.kwargs == {"alpha": -3}


def test_no_tensor_is_kept_alive() -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(x: Tensor) -> Tensor:
        y = x * 2
        made.append(weakref.ref(y))
        del x
        z = y + 1
        del y
        gc.collect()
        assert made[0]() is None
        return z

    assert [o.name for o in recorded(watched).operators][1:] == ["aten::mul", "aten::add"]


def test_composed_operators_are_seen_in_parts_under_inference_mode_too() -> None:
    model = Calling(lambda x: F.linear(x, x))
    with torch.inference_mode(), recording(model) as recorder:
        model(torch.randn(4, 4))
    assert any(operator.name == "aten::mm" for operator in recorder.flow.operators)


def test_a_fast_path_is_taken_and_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    flow = dataflow(layer, lambda: layer(torch.randn(1, 3, 8)))
    assert [o.name for o in flow.operators if o.products] == ["aten::_transformer_encoder_layer_fwd"]


def test_what_another_thread_runs_meanwhile_is_not_noted() -> None:
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def run() -> Tensor:
        thread = threading.Thread(target=lambda: other(torch.randn(2, 4)))
        thread.start()
        thread.join()
        result: Tensor = model(torch.randn(2, 4))
        return result

    flow = dataflow(model, run)
    assert {operator.module for operator in flow.operators if operator.products} == {"0"}
    assert flow.calls == {"": 1, "0": 1}


def test_quantizers_that_are_off_are_known_by_what_they_were_given() -> None:
    model = Calling(lambda x: x @ x)
    model.quantizer.disable()
    x = torch.randn(4, 4)
    flow = dataflow(model, lambda: model(x))
    assert [operator.quantizer for operator in flow.operators] == [None]
    assert flow.quantized[model.quantizer] == [flow.operators[0].inputs[0]]


def test_a_parameter_that_is_changed_in_place_is_still_that_parameter() -> None:
    model = Calling(lambda x: model.weight.mul_(2) @ x)
    flow = dataflow(model, lambda: model(torch.randn(4, 4)))
    (product,) = flow.named("mm")
    assert product.inputs[0].parameter == "weight"
    assert product.inputs[0].is_constant
