"""Speed and memory of fake quantization on one CPU thread, beside the peers that are installed.

Run it with ``python -m benchmarks.fake_quant``. Times are ratios to ``clone()`` of the same tensor, memory is
in multiples of its size; everything in a row is timed interleaved, in one run, and compared by medians.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import FakeQuantize, peers
from benchmarks.timing import medians
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Integer
from quantpatch.numerics.ranges import reduce_amax

INT8 = Integer(8)
ROUNDS = 40
PEAK = "peak memory of both passes, to the input"


def _ours(amax: Tensor | None, axis: int | None) -> FakeQuantize:
    return lambda x: fake_quantize(x, amax, INT8, axis=axis)


def _both_passes(function: FakeQuantize, x: Tensor, grad: Tensor, *learned: Tensor) -> Callable[[], Any]:
    # Not .backward(): adding into .grad is no part of what is timed.
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(x), (x, *learned), grad)


def rows() -> list[dict[str, Any]]:
    """One row a case: name, ours_ms, baseline_ms, ratio, aim (None: none was set), peers (name -> ratio)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        activation, weight = torch.randn(8, 64, 56, 56), torch.randn(512, 512, 3, 3)
        large = torch.randn(32, 64, 112, 112)
        return [
            *_speed("activation, fixed range", activation, reduce_amax(activation), None, (2.0, 1.6)),
            *_speed("activation, dynamic range", activation, None, None, (3.0, 1.3)),
            *_speed("weight per channel", weight, reduce_amax(weight, axis=0), 0, (2.3, 1.5)),
            *_speed("large activation, fixed range", large, reduce_amax(large), None, (None, None), 5),
            *_learned("activation, learned range", activation, None),
            *_learned("weight per channel, learned ranges", weight, 0),
            *_clipping("activation", activation, None),
            *_clipping("weight per channel", weight, 0),
            *_formats(weight),
            *_memory("activation, fixed range", activation, reduce_amax(activation), None),
            *_memory(
                "activation, 1 % outside", activation, _range_with_outside(activation, None, 0.01), None
            ),
            *_memory("weight per channel", weight, reduce_amax(weight, axis=0), 0),
        ]
    finally:
        torch.set_num_threads(threads)


# --- Speed ------------------------------------------------------------------------------------------------


def _speed(
    name: str,
    x: Tensor,
    amax: Tensor | None,
    axis: int | None,
    aims: tuple[float | None, float | None],
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    scale = (reduce_amax(x, axis=axis) if amax is None else amax) / INT8.max
    others, missing = peers(scale, axis, tuple(x.shape))
    functions = {"ours": _ours(amax, axis)}
    for peer, function in others.items():
        if amax is None:
            functions[peer] = partial(_with_its_range, function)
        else:
            functions[peer] = function
    forward = {n: partial(f, x) for n, f in functions.items()}
    grad = torch.randn_like(x)
    both = {n: _both_passes(f, x, grad) for n, f in functions.items()}
    return [
        _row(f"{name}: forward", medians({"clone": x.clone, **forward}, rounds), 1, aims[0], missing),
        _row(
            f"{name}: forward and backward, to two clones",
            medians({"clone": x.clone, **both}, rounds),
            2,
            aims[1],
            missing,
        ),
    ]


def _with_its_range(function: FakeQuantize, x: Tensor) -> Tensor:
    """What a peer has to do besides where the range is that of the tensor."""
    x.detach().abs().amax()
    return function(x)


def _learned(name: str, x: Tensor, axis: int | None) -> list[dict[str, Any]]:
    """Both passes, with a gradient for the range as well."""
    amax = reduce_amax(x, axis=axis).requires_grad_()
    scale = (amax.detach() / INT8.max).requires_grad_()
    others, missing = peers(scale, axis, tuple(x.shape))
    grad = torch.randn_like(x)
    functions = {"ours": (_ours(amax, axis), amax), **{n: (f, scale) for n, f in others.items()}}
    both = {n: _both_passes(f, x, grad, learned) for n, (f, learned) in functions.items()}
    times = medians({"clone": x.clone, **both}, ROUNDS)
    peak = {n: peak_bytes(f, x, learned) / x.nbytes for n, (f, learned) in functions.items()}
    return [
        _row(f"{name}: forward and backward, to two clones", times, 2, 2.5, missing),
        _memory_row(f"{name}: {PEAK}", peak, 2.1, missing),
    ]


def _range_with_outside(x: Tensor, axis: int | None, share: float) -> Tensor:
    """A range outside of which this share of the values lies, of each channel's if there are channels."""
    values = x.abs().flatten() if axis is None else x.abs().movedim(axis, 0).flatten(1)
    inside = round(values.shape[-1] * (1 - share))
    amax = values.kthvalue(inside, dim=-1).values
    return amax if axis is None else amax.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _clipping(name: str, x: Tensor, axis: int | None) -> list[dict[str, Any]]:
    """Both passes where more and more lies outside the range."""
    table = []
    grad = torch.randn_like(x)
    for share in (0.0, 0.0001, 0.001, 0.01, 0.1):
        amax = _range_with_outside(x, axis, share)
        others, _ = peers(amax / INT8.max, axis, tuple(x.shape))
        theirs = "torch.fake_quantize"
        runs = {
            "clone": x.clone,
            "ours": _both_passes(_ours(amax, axis), x, grad),
            theirs: _both_passes(others[theirs], x, grad),
        }
        table.append(
            _row(f"{name}, {share:.2%} outside: both, to two clones", medians(runs, 15), 2, None, {})
        )
    return table


def _formats(x: Tensor) -> list[dict[str, Any]]:
    table = []
    for name in ("fp8_e4m3", "int4_g128", "mxfp8_e4m3", "mxfp4", "nvfp4"):
        number_format = BUILTIN_FORMATS[name]
        axis = None if number_format.block_size is None else 1
        runs: dict[str, Callable[[], Any]] = {
            "clone": x.clone,
            "ours": partial(fake_quantize, x, None, number_format, axis=axis),
        }
        table.append(_row(f"weight, {name}, dynamic: forward", medians(runs, 15), 1, None, {}))
    return table


def _row(
    name: str, times: dict[str, float], clones: int, aim: float | None, missing: dict[str, str]
) -> dict[str, Any]:
    base = clones * times["clone"]
    others = {n: t / base for n, t in times.items() if n not in ("clone", "ours")}
    return {
        "name": name,
        "ours_ms": times["ours"],
        "baseline_ms": base,
        "ratio": times["ours"] / base,
        "aim": aim,
        "peers": {**others, **missing},
    }


# --- Memory -----------------------------------------------------------------------------------------------


def _memory(name: str, x: Tensor, amax: Tensor, axis: int | None) -> list[dict[str, Any]]:
    others, missing = peers(amax / INT8.max, axis, tuple(x.shape))
    functions = {"ours": _ours(amax, axis), **others}
    saved = {n: saved_bytes(f, x) / x.numel() for n, f in functions.items()}
    peak = {n: peak_bytes(f, x) / x.nbytes for n, f in functions.items()}
    # The results of both passes; and where something is outside, which has to be kept, a byte for that.
    most = 2.0 + bool((x.abs() > amax).any()) / x.element_size()
    return [
        _memory_row(f"{name}: bytes saved for backward, an element", saved, 1.0, missing),
        _memory_row(f"{name}: {PEAK}", peak, most, missing),
    ]


def _memory_row(name: str, values: dict[str, float], aim: float, missing: dict[str, str]) -> dict[str, Any]:
    ratio = values.pop("ours")
    peers = {**values, **missing}
    return {"name": name, "ours_ms": None, "baseline_ms": None, "ratio": ratio, "aim": aim, "peers": peers}


def saved_bytes(function: FakeQuantize, x: Tensor) -> int:
    """Bytes of memory that the graph of one call keeps alive; the input's too, if it is kept."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = function(x)
    del result
    return sum(kept.values())


def peak_bytes(function: FakeQuantize, x: Tensor, *learned: Tensor) -> int:
    """Most bytes that both passes held at once beside their inputs, by the allocator's own account."""
    run = _both_passes(function, x, torch.randn_like(x), *learned)
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    for row in rows():
        others = ", ".join(
            f"{n} {v:.2f}" if isinstance(v, float) else f"{n}: {v}" for n, v in row["peers"].items()
        )
        aim = f"(aim {row['aim']})" if row["aim"] else ""
        time = "" if row["ours_ms"] is None else f"{row['ours_ms']:.3f} ms"
        print(f"{row['name']:68s} {time:>11s} {row['ratio']:6.2f} {aim:10s} {others}", flush=True)


if __name__ == "__main__":
    main()
