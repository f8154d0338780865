"""``python -m benchmarks.recipes [MODEL ...]``: what each built-in recipe costs and gives on real models.

The models and their scores are those of ``benchmarks.accuracy``, and the demo's network, which is trained
here on scikit-learn's handwritten digits. Writes ``docs/recipes.json``, of which ``docs/build.py`` makes the
table in ``docs/recipes.md``.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantpatch as qp
from benchmarks.accuracy import TASKS
from quantpatch.cli import demo

OUT = Path(__file__).resolve().parent.parent / "docs" / "recipes.json"
METHODS: Mapping[str, Sequence[str]] = {"calibrated": (), "gptq": ("gptq",)}


def digits(seed: int) -> tuple[nn.Module, Sequence[Any], Callable[[nn.Module], str], Mapping[str, Any]]:
    """The demo's network, trained."""
    train, test = demo.load_data()
    torch.manual_seed(seed)
    model = demo.build_model()
    demo.train(model, train, epochs=10, rate=0.01)
    model.eval()
    data = [images for images, _ in demo.batches(train, seed)]

    def score(model: nn.Module) -> str:
        return f"{demo.accuracy(model, test):.1%}"

    return model, data, score, {}


def real(
    name: str, seed: int
) -> tuple[nn.Module, Sequence[Any], Callable[[nn.Module], str], Mapping[str, Any]]:
    """A model of ``benchmarks.accuracy``."""
    task = TASKS[name](seed)
    return task.model, task.data, task.score, task.convert


def size(model: nn.Module) -> int:
    """Bytes of the file with packed integers."""
    with tempfile.TemporaryDirectory() as folder:
        return qp.save(model, Path(folder) / "model.safetensors", packed=True).bytes


def main() -> None:
    """Writes the table."""
    found: dict[str, Any] = json.loads(OUT.read_text()) if sys.argv[1:] else {}
    tasks: dict[str, Callable[[int], Any]] = {
        "digits": digits,
        **{name: functools.partial(real, name) for name in TASKS},
    }
    for name, build in tasks.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        model, data, score, options = build(0)
        rows: dict[str, Any] = {
            "float": {"calibrated": score(model), "bytes": sum(p.nbytes for p in model.state_dict().values())}
        }
        for recipe, (_, plugin) in qp.registry.recipes().items():
            if plugin != "quantpatch.builtin":
                continue
            row: dict[str, Any] = {}
            for label, methods in METHODS.items():
                quantized = copy.deepcopy(model)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", qp.QuantPatchWarning)
                    qp.convert(quantized, recipe, **options)
                    if methods:
                        qp.tune(quantized, data, method=list(methods), progress=False)
                    else:
                        qp.calibrate(quantized, data, progress=False, strict=False)
                        row["bytes"] = size(quantized)
                row[label] = score(quantized)
            rows[recipe] = row
            print(name, recipe, row, flush=True)
        found[name] = rows
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
