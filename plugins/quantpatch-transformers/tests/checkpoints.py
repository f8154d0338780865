"""Calibrated models, saved and loaded, and what is compared of two."""

from __future__ import annotations

import torch
from architectures import MODELS

import quantpatch as qp
from quantpatch_transformers import make_savable


def output(model, name="gpt2"):
    with torch.no_grad():
        return model(**MODELS[name].inputs)[0]


def calibrated(name="gpt2", operations=None, recipe=None):
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    qp.convert(model, recipe=recipe, operations=operations)
    qp.calibrate(model, [MODELS[name].inputs], progress=False)
    return model


def saved(model, path):
    make_savable(model)
    model.save_pretrained(path)
    return model


def loaded(cls, path, **options):
    model, info = cls.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def states(model):
    return {name: quantizer.state for name, quantizer in quantizers(model).items()}


def quantizers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, qp.TensorQuantizer)}


def assert_same(model, other, name="gpt2"):
    assert states(model) == states(other)
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    assert torch.equal(output(model, name), output(other, name))
