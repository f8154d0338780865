"""Checkpoints that do not fit the model, or are damaged: what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from checkpoints import calibrated, saved, states
from safetensors import safe_open
from safetensors.torch import save_file

import quantpatch as qp
from quantpatch.errors import CheckpointError


@pytest.fixture
def quantized_path(tmp_path):
    saved(calibrated(), tmp_path)
    return tmp_path


def rewrite(path, tensors=None, description=None, metadata=None):
    """Changes the tensors or the description of a checkpoint."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        kept = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        written = opened.metadata()
    if tensors:
        tensors(kept)
    if description:
        described = json.loads(written["quantpatch"])
        description(described)
        written["quantpatch"] = json.dumps(described)
    save_file(kept, file, metadata=written if metadata is None else metadata)


ATTENTION = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[f"{ATTENTION}.input_quantizer._amax"].fill_(torch.nan),
            "c_attn.input_quantizer: its range holds NaN",
        ),
        (
            lambda t: t[f"{ATTENTION}.weight_quantizer._amax"].neg_(),
            "c_attn.weight_quantizer: its range is negative",
        ),
        (
            lambda t: t.pop(f"{ATTENTION}.input_quantizer._amax"),
            "c_attn.input_quantizer: its range is missing",
        ),
        (
            lambda t: t.update({f"{ATTENTION}.weight_quantizer._amax": torch.ones(1, 5)}),
            r"c_attn.weight_quantizer: its range has the shape \(1, 5\), expected \(1, 96\)",
        ),
        (
            lambda t: t.update({f"{ATTENTION}.input_quantizer._amax": torch.ones((), dtype=torch.half)}),
            "its range is torch.float16, expected torch.float32",
        ),
    ],
)
def test_a_damaged_range_is_named(change, message, quantized_path):
    rewrite(quantized_path, tensors=change)
    with pytest.raises(CheckpointError, match=message):
        transformers.GPT2LMHeadModel.from_pretrained(quantized_path)


def test_a_plugin_that_is_missing_is_named(quantized_path):
    def change(description):
        description["plugins"].append({"name": "far", "distribution": "quantpatch-far", "version": "2.0"})
        description["layers"][ATTENTION]["replacement"] = "quantpatch_far.layers.QuantConv1D"

    rewrite(quantized_path, description=change)
    with pytest.raises(CheckpointError, match=r"'far' is not installed \(pip install quantpatch-far==2.0\)"):
        transformers.GPT2LMHeadModel.from_pretrained(quantized_path)


def test_another_architecture_is_named(quantized_path):
    config = transformers.GPT2Config.from_pretrained(quantized_path, n_layer=1)
    with pytest.raises(CheckpointError, match=r"transformer.h.1.attn.c_attn \(.*the model has no such layer"):
        transformers.GPT2LMHeadModel.from_pretrained(quantized_path, config=config)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "its files do not say how; another program"),
        ({"format": "pt", "quantpatch": "{"}, "its description cannot be read"),
        ({"format": "pt", "quantpatch": '{"layers": 1}'}, "its description cannot be read"),
    ],
)
def test_a_lost_or_damaged_description_is_named(metadata, message, quantized_path):
    rewrite(quantized_path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        transformers.GPT2LMHeadModel.from_pretrained(quantized_path)


def test_a_truncated_file_is_named(quantized_path):
    file = quantized_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        transformers.GPT2LMHeadModel.from_pretrained(quantized_path)


def test_a_range_that_no_quantizer_takes_is_reported_as_unexpected(tmp_path):
    model = calibrated()
    model.save_pretrained(tmp_path)
    with qp.quantize_modules(skip=["Linear"]):
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.input_quantizer._amax", "lm_head.weight_quantizer._amax"}
    assert set(states(again).values()) == {"calibrated"}
