"""What other libraries make of the same models and data, for ``make bench-accuracy``.

Each is asked for the bits and groups of a setting of ours, by its own methods. Linear layers are quantized,
and convolutions; embeddings and the products of attention stay float, as with ours.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

#: Gets a float model, which it may change, batches, and what runs a model on one; gives a quantized model.
Peer = Callable[[nn.Module, Sequence[Any], Callable[[nn.Module, Any], Any]], nn.Module]


def modelopt(config: str, algorithm: Any = None) -> Peer:
    """ModelOpt, by one of its configurations."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module:
        mtq: Any = importlib.import_module("modelopt.torch.quantization")
        settings = copy.deepcopy(getattr(mtq, config))
        if algorithm is not None:
            settings["algorithm"] = algorithm

        def loop(model: nn.Module) -> None:
            for batch in data:
                run(model, batch)

        found: nn.Module = mtq.quantize(model, settings, loop)
        return found

    return quantize


def torchao(bits: int, group: int) -> Peer:
    """Torchao's weights in groups, rounded to the nearest."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module:
        api: Any = importlib.import_module("torchao.quantization")
        granularity: Any = importlib.import_module("torchao.quantization.granularity")
        torch: Any = importlib.import_module("torch")
        kind = getattr(torch, f"int{bits}")
        api.quantize_(model, api.IntxWeightOnlyConfig(kind, granularity.PerGroup(group)))
        return model

    return quantize


def neural_compressor(config: str, **options: Any) -> Peer:
    """Intel's neural-compressor, by one of its configurations."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module:
        api: Any = importlib.import_module("neural_compressor.torch.quantization")
        prepared = api.prepare(model, getattr(api, config)(**options))
        for batch in data:
            run(prepared, batch)
        found: nn.Module = api.convert(prepared)
        return found

    return quantize


def brevitas_weights(bits: int, group: int | None, *, gptq: bool) -> Peer:
    """Brevitas' weights, in groups or by channel, with its GPTQ."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module:
        qnn: Any = importlib.import_module("brevitas.nn")
        graph: Any = importlib.import_module("brevitas.graph.quantize")
        if group is None:
            kind = importlib.import_module("brevitas.quant").Int8WeightPerChannelFloat
            options = {"weight_quant": kind, "weight_bit_width": bits}
        else:
            quants: Any = importlib.import_module("brevitas_examples.common.generative.quantizers")
            options = {
                "weight_quant": quants.IntWeightSymmetricGroupQuant,
                "weight_bit_width": bits,
                "weight_group_size": group,
            }
        layers = {nn.Linear: (qnn.QuantLinear, options), nn.Conv2d: (qnn.QuantConv2d, options)}
        model = graph.layerwise_quantize(model, compute_layer_map=layers)
        if gptq:
            mode: Any = importlib.import_module("brevitas.graph.gptq").gptq_mode
            with mode(model, use_quant_activations=False, act_order=True) as at_work:
                for _ in range(at_work.num_layers):
                    for batch in data:
                        run(at_work.model, batch)
                    at_work.update()
        return model

    return quantize


def brevitas_int8(*, equalize: bool, correct: bool) -> Peer:
    """Brevitas' 8-bit flow for convolutional models, with equalisation and bias correction."""

    def quantize(model: nn.Module, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]) -> nn.Module:
        graph: Any = importlib.import_module("brevitas.graph.quantize")
        calibrate: Any = importlib.import_module("brevitas.graph.calibrate")
        model = graph.preprocess_for_quantize(
            model, equalize_iters=20 if equalize else 0, equalize_merge_bias=equalize
        )
        model = graph.quantize(model)
        with calibrate.calibration_mode(model):
            for batch in data:
                run(model, batch)
        if correct:
            with calibrate.bias_correction_mode(model):
                for batch in data:
                    run(model, batch)
        return model

    return quantize


#: By model and setting, and by what the table calls them.
PEERS: Mapping[tuple[str, str], Mapping[str, Peer]] = {
    ("minilm", "W8A8"): {
        "ModelOpt, max": modelopt("INT8_DEFAULT_CFG"),
        "ModelOpt, SmoothQuant": modelopt("INT8_SMOOTHQUANT_CFG"),
    },
    ("minilm", "W4 in groups of 128"): {
        "torchao, nearest": torchao(4, 128),
        "ModelOpt, nearest": modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
        "ModelOpt, AWQ": modelopt("INT4_AWQ_CFG"),
        "ModelOpt, GPTQ": modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq"}),
        "neural-compressor, GPTQ": neural_compressor(
            "GPTQConfig", bits=4, group_size=128, use_sym=True, act_order=True, static_groups=True
        ),
        "Brevitas, GPTQ": brevitas_weights(4, 128, gptq=True),
    },
    ("minilm", "W4 per channel"): {"Brevitas, GPTQ": brevitas_weights(4, None, gptq=True)},
    ("efficientnet", "W8A8 per channel"): {
        "ModelOpt, max": modelopt("INT8_DEFAULT_CFG"),
        "ModelOpt, SmoothQuant": modelopt("INT8_SMOOTHQUANT_CFG"),
    },
    ("efficientnet", "W8A8 per tensor"): {
        "Brevitas, nearest": brevitas_int8(equalize=False, correct=False),
        "Brevitas, equalisation and bias correction": brevitas_int8(equalize=True, correct=True),
    },
}
