"""``quant_modules``: what is replaced, and that nothing is left of it."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import nn
from torch.nn import Linear

import quantpatch
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules
from quantpatch.errors import EntryError

REPLACED = [
    *(f"{kind}{d}d" for kind in ("Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool") for d in (1, 2, 3)),
    *("Linear", "LSTM", "LSTMCell"),
]
partial_conv = functools.partial(nn.Conv2d, 3, 4, 1)


def build(name):
    return getattr(nn, name)(*((2,) if "Pool" in name else (3, 4) if name[0] == "L" else (3, 4, 1)))


class MyLinear(quant_nn.QuantLinear):
    pass


class MyBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("name", REPLACED)
def test_layers_come_out_quantized_until_deactivate(name):
    quant_modules.initialize()
    assert type(build(name)) is getattr(quant_nn, f"Quant{name}")
    quant_modules.deactivate()
    assert type(build(name)) is getattr(nn, name)


def test_names_imported_earlier_and_other_threads():
    quant_modules.initialize()
    built = []
    thread = threading.Thread(target=lambda: built.append(Linear(2, 2)))
    thread.start()
    thread.join()
    built += [Linear(2, 2), partial_conv(), nn.TransformerEncoderLayer(4, 1, 8).linear1]
    assert all(isinstance(layer, (quant_nn.QuantLinear, quant_nn.QuantConv2d)) for layer in built)
    quant_modules.deactivate()
    assert type(Linear(2, 2)) is nn.Linear
    assert type(partial_conv()) is nn.Conv2d


def test_only_the_toolkits_layers_are_replaced():
    quant_modules.initialize()
    for layer in (nn.ReLU(), nn.GRU(2, 2), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Embedding(2, 2)):
        assert type(layer).__module__.startswith("torch.nn")


def test_a_plain_block_of_quantpatch_is_not_concerned():
    with quantpatch.quantize_modules():
        assert type(nn.Linear(2, 2)) is quantpatch.layers.QuantLinear


def test_float_modules_and_custom_ones():
    custom = [(nn, "BatchNorm2d", MyBatchNorm), (nn, "Linear", MyLinear)]
    quant_modules.initialize(float_module_list=["Conv2d", "Linear"], custom_quant_modules=custom)
    assert type(nn.Conv2d(3, 4, 1)) is nn.Conv2d
    assert type(nn.Conv1d(3, 4, 1)) is quant_nn.QuantConv1d
    assert type(nn.Linear(2, 2)) is MyLinear
    assert type(nn.BatchNorm2d(2)) is MyBatchNorm


def test_a_second_initialize_forgets_nothing():
    quant_modules.initialize(
        custom_quant_modules=[(nn, "BatchNorm2d", MyBatchNorm), (nn, "Linear", MyLinear)]
    )
    quant_modules.initialize()
    quant_modules.initialize(float_module_list=["Conv2d"])
    assert type(nn.Linear(2, 2)) is MyLinear
    assert type(nn.BatchNorm2d(2)) is MyBatchNorm
    assert type(nn.Conv2d(3, 4, 1)) is nn.Conv2d
    assert type(nn.Conv1d(3, 4, 1)) is quant_nn.QuantConv1d
    quant_modules.deactivate()
    for layer in (nn.Linear(2, 2), nn.BatchNorm2d(2), nn.Conv1d(3, 4, 1)):
        assert type(layer).__module__.startswith("torch.nn")
    quant_modules.initialize()
    assert type(nn.Linear(2, 2)) is quant_nn.QuantLinear  # the custom one went with deactivate


def test_deactivate_is_harmless_at_any_time():
    quant_modules.deactivate()
    quant_modules.initialize()
    quant_modules.deactivate()
    quant_modules.deactivate()
    assert type(nn.Linear(2, 2)) is nn.Linear


@pytest.mark.parametrize(
    "custom", [(nn, "NoSuchLayer", MyLinear), (nn, "Linear", "no class"), (nn, "ReLU", print)]
)
def test_a_bad_entry_changes_nothing(custom):
    quant_modules.initialize(float_module_list=["Conv2d"])
    with pytest.raises((AttributeError, EntryError)):
        quant_modules.initialize(custom_quant_modules=[custom])
    assert type(nn.Conv2d(3, 4, 1)) is nn.Conv2d
    assert type(nn.Linear(2, 2)) is quant_nn.QuantLinear


def test_the_helper_class():
    helper = quant_modules.QuantModuleReplacementHelper()
    helper.prepare_state(float_module_list=["Linear"], custom_map=[(nn, "BatchNorm2d", MyBatchNorm)])
    assert (nn, "Conv2d", quant_nn.QuantConv2d) in helper.quant_map
    assert (nn, "BatchNorm2d", MyBatchNorm) in helper.quant_map
    assert (nn, "Conv2d", nn.Conv2d) in helper.orginal_func_map
    assert len(helper.quant_map) == len(helper.orginal_func_map) == len(REPLACED)
    assert all(entry.mod_name != "Linear" for entry in helper.quant_map)
    assert type(nn.BatchNorm2d(2)) is nn.BatchNorm2d  # nothing applies yet
    helper.apply_quant_modules()
    assert type(nn.BatchNorm2d(2)) is MyBatchNorm
    helper.restore_float_modules()
    assert type(nn.BatchNorm2d(2)) is nn.BatchNorm2d
    assert helper.quant_map == helper.orginal_func_map == set()


def test_functions_can_be_replaced_too():
    quant_modules.initialize(custom_quant_modules=[(torch.nn.functional, "relu", lambda x: x * 0 + 7)])
    assert torch.nn.functional.relu(torch.ones(1)).item() == 7
    quant_modules.deactivate()
    assert torch.nn.functional.relu(torch.ones(1)).item() == 1
