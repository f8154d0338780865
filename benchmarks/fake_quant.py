"""Speed of fake quantization on one CPU thread, as ratios to ``clone()`` of the same tensor.

Run it with ``python -m benchmarks.fake_quant``. Times differ by tenfold with the allocator's page faults and
the neighbours' load, so everything in a row is timed interleaved, in one run, and compared by medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantpatch.fake_quant import fake_quantize, reduce_amax
from quantpatch.formats import BUILTIN_FORMATS, Integer

INT8 = Integer(8)
ROUNDS = 60


def interleaved_medians(functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each function; one call of each, in turn, ``rounds`` times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(3):
        for function in functions.values():
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            times[name].append(time.perf_counter() - start)
            del result
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _both_passes(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Any]:
    # Not .backward(): adding into .grad is no part of what is timed.
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(x), x, grad)


def _peers(x: Tensor, scale: Tensor, axis: int | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same computation by others: torch always, the rest where importable."""
    zero = torch.zeros_like(scale.flatten(), dtype=torch.int32)
    step = scale.flatten()

    def four_operations(x: Tensor) -> Tensor:
        return torch.clamp(torch.round(x / scale), -128, 127) * scale

    peers = {"four operations": four_operations}
    if axis is None:
        peers["torch.fake_quantize"] = lambda x: torch.fake_quantize_per_tensor_affine(
            x, step[0], zero[0], -128, 127
        )
    else:
        peers["torch.fake_quantize"] = lambda x: torch.fake_quantize_per_channel_affine(
            x, step, zero, axis, -128, 127
        )
    try:
        from modelopt.torch.quantization.tensor_quant import fake_tensor_quant
    except ImportError:
        pass
    else:
        amax = scale * 127
        peers["modelopt"] = lambda x: fake_tensor_quant(x, amax, None, 8)
    try:
        from torchao.quantization.quant_primitives import fake_quantize_affine
    except ImportError:
        pass
    else:
        block = tuple(x.shape) if axis is None else (1, *x.shape[1:])
        peers["torchao"] = lambda x: fake_quantize_affine(x, block, step, None, torch.int8, -128, 127)
    return peers


def rows() -> list[dict[str, Any]]:
    """One row a case: name, ours_ms, baseline_ms, ratio, aim (None: none was set), peers (name -> ratio)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        activation, weight = torch.randn(8, 64, 56, 56), torch.randn(512, 512, 3, 3)
        large = torch.randn(32, 64, 112, 112)
        table = _case("activation, fixed range", activation, reduce_amax(activation) * 0.9, None, (2.0, 1.6))
        table += _case("activation, dynamic range", activation, None, None, (3.0, 1.3))
        table += _case("weight per channel", weight, reduce_amax(weight, 0), 0, (2.3, 1.5))
        table += _case(
            "large activation, fixed range", large, reduce_amax(large) * 0.9, None, (None, None), 7
        )
        for name in ("fp8_e4m3", "int4_g128", "mxfp8_e4m3", "mxfp4", "nvfp4"):
            number_format = BUILTIN_FORMATS[name]
            times = interleaved_medians(
                {
                    "clone": weight.clone,
                    "ours": lambda f=number_format: fake_quantize(weight, None, f, axis=f.block_size and 1),
                },
                15,
            )
            table.append(_row(f"weight, {name}, dynamic: forward", times, "clone", 1, None))
    finally:
        torch.set_num_threads(threads)
    return table


def _case(
    name: str,
    x: Tensor,
    amax: Tensor | None,
    axis: int | None,
    aims: tuple[float | None, float | None],
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    scale = (reduce_amax(x, axis) if amax is None else amax) / INT8.max
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: fake_quantize(x, amax, INT8, axis=axis)
    }
    for peer, function in _peers(x, scale, axis).items():
        if amax is None:
            functions[peer] = lambda x, f=function: (x.detach().abs().amax(), f(x))[1]
        else:
            functions[peer] = function
    forward = interleaved_medians(
        {"clone": x.clone} | {n: lambda f=f: f(x) for n, f in functions.items()}, rounds
    )
    grad = torch.randn_like(x)
    both = interleaved_medians(
        {"clone": x.clone} | {n: _both_passes(f, x, grad) for n, f in functions.items()}, rounds
    )
    return [
        _row(f"{name}: forward", forward, "clone", 1, aims[0]),
        _row(f"{name}: forward and backward, to two clones", both, "clone", 2, aims[1]),
    ]


def _row(name: str, times: dict[str, float], baseline: str, count: int, aim: float | None) -> dict[str, Any]:
    base = count * times[baseline]
    return {
        "name": name,
        "ours_ms": times["ours"],
        "baseline_ms": base,
        "ratio": times["ours"] / base,
        "aim": aim,
        "peers": {n: t / base for n, t in times.items() if n not in (baseline, "ours")},
    }


def main() -> None:
    for row in rows():
        peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["peers"].items())
        aim = f"(aim {row['aim']})" if row["aim"] else ""
        print(
            f"{row['name']:68s} {row['ours_ms']:8.3f} ms  {row['ratio']:6.2f} {aim:10s} {peers}", flush=True
        )


if __name__ == "__main__":
    main()
