"""A whole model of transformers under torch.compile: one graph, the same values, the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import quantpatch as qp

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.randint(0, 49, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("training", [True, False])
def test_a_llama_is_one_graph_that_equals_eager(training):
    config = transformers.LlamaConfig(
        vocab_size=49, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with qp.quantize_modules(operations="products"):
        model = transformers.LlamaForCausalLM(config)
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    assert qp.audit(model, IDS).share == 1.0
    model.train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager" if training else "eager")
    arguments = {"input_ids": IDS.flip(0), "labels": IDS.flip(0)}
    with torch.set_grad_enabled(training):
        wanted, ours = model(**arguments), compiled(**arguments)
    torch.testing.assert_close(ours.logits, wanted.logits)
    torch.testing.assert_close(ours.loss, wanted.loss)
    if not training:
        return
    steps = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for step, loss in zip(steps, (wanted.loss, ours.loss), strict=True):
        loss.backward()
        step.step()
    for (name, theirs), mine in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad.any(), name
        torch.testing.assert_close(mine, theirs, msg=name)
