"""Fake quantization on a CUDA device: memory traffic a second, to that of a plain copy.

``python -m benchmarks gpu`` where there is a GPU. A forward pass moves the tensor in and the result out; with
a gradient also a byte an element, which the backward pass reads beside the gradient in and out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from quantpatch.numerics import gradients
from quantpatch.numerics.backends import Backend, inductor
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS
from quantpatch.numerics.qparams import QParams

__all__ = ["rows"]

SHAPE = (64, 64, 112, 112)


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median time on the device."""
    for _ in range(5):
        run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    leaf, upstream = x.clone().requires_grad_(), torch.ones_like(x)

    def run() -> None:
        torch.autograd.grad(function(leaf), leaf, upstream)

    return run


def _plain_operations(x: Tensor, q: QParams) -> Backend:
    """Stands in for the choice of a backend: a mock would take time of its own."""
    return inductor


def rows() -> list[dict[str, Any]]:
    """A row for each format, dtype, range and direction; the ratio is to a copy of the same traffic."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return []
    device = torch.cuda.get_device_name()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SHAPE, device="cuda", dtype=dtype)
        copy = torch.empty_like(x)
        copied = milliseconds(partial(copy.copy_, x))
        size = x.element_size()
        ranges = {
            "fixed": (torch.tensor(3.0, device="cuda"), None),
            "dynamic": (None, None),
            "per channel": (torch.full((1, SHAPE[1], 1, 1), 3.0, device="cuda"), 1),
        }
        for name in ("int8", "fp8_e4m3"):
            for kind, (amax, axis) in ranges.items():

                def function(
                    t: Tensor, amax: Any = amax, name: str = name, axis: int | None = axis
                ) -> Tensor:
                    return fake_quantize(t, amax, BUILTIN_FORMATS[name], axis=axis)

                forward = 2 * size + (size if amax is None else 0)
                backward = 0 if amax is None else 2 * size + 2
                runs: dict[str, tuple[Callable[[], Any], int]] = {
                    "forward": (partial(function, x), forward),
                    "forward and backward": (both_ways(function, x), forward + backward),
                }
                for direction, (run, traffic) in runs.items():
                    ours = milliseconds(run)
                    baseline = copied * traffic / (2 * size)
                    with mock.patch.object(gradients, "select", _plain_operations):
                        plain = milliseconds(run)
                    what = f"{device}: {name}, {str(dtype)[6:]}, {kind}, {direction}"
                    rate = x.numel() * traffic / ours / 1e6
                    found.append(
                        {
                            "name": f"{what}: {rate:.0f} GB/s",
                            "ours_ms": ours,
                            "baseline_ms": baseline,
                            "ratio": ours / baseline,
                            "aim": 1.2,
                            "peers": {"plain operations": plain / baseline},
                        }
                    )
    return found


if __name__ == "__main__":
    for row in rows():
        print(f"{row['name']:90} {row['ours_ms']:8.3f} ms  {row['ratio']:.2f} copies", row["peers"])
