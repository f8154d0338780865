"""Linear layers of which the weights alone are quantized: kernels read integers and compute in floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.export.program.capture import captured
from quantpatch.export.program.export import checked_operands
from quantpatch.export.program.passes import before_compiling
from quantpatch.numerics.formats import Blocked, Integer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def weights(size: int | None = None, bits: int = 4) -> qp.Recipe:
    """A recipe that quantizes weights alone: in blocks, or one range for each channel."""
    descriptor = qp.QuantDescriptor(num_bits=8, axis="channel", narrow_range=True)
    if size is not None:
        descriptor = qp.QuantDescriptor(format=Blocked(Integer(bits), size), dynamic=True)
    return qp.Recipe(name="weights", input=None, weight=descriptor)


FLOATS = qp.Recipe(name="floats", input=None, weight=qp.QuantDescriptor(format="fp8_e4m3", axis="channel"))


def linear(columns: int, features: int, recipe: qp.Recipe, kind: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        layer: Any = nn.Linear(columns, features)
    if not layer.weight_quantizer.descriptor.dynamic:
        qp.calibrate(layer, [torch.randn(1, columns)], progress=False)
    result: nn.Module = layer.to(kind)
    return result


def rewritten(model: nn.Module, x: Tensor, shapes: Any = None) -> tuple[Any, dict[str, str]]:
    found = checked_operands(model, (x,), {}, floats=True)
    program = captured(model, (x,), {}, found, dynamic_shapes=shapes, as_uint8=True).run_decompositions({})
    module: Any = program.module()
    reasons: dict[str, str] = {}
    before_compiling(module, reasons)
    return module, reasons


def off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [16, 48, 96])
def test_weights_of_channels_are_read_as_integers(kind: torch.dtype, columns: int) -> None:
    model, x = linear(columns, 7, weights(), kind), torch.randn(1, 2, columns).to(kind)
    module, reasons = rewritten(model, x)
    assert reasons == {}
    assert any("_weight_int8pack_mm" in str(node.target) for node in module.graph.nodes)
    with torch.no_grad():
        assert off(module(x), model(x)) < (1e-6 if kind == torch.float32 else 2**-7)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_weights_in_blocks_are_read_as_integers(size: int) -> None:
    model: Any = linear(512, 32, weights(size))
    with torch.no_grad():  # both ends of the codes, and a block of zeros
        model.weight[0, :size] = 0.0
        model.weight[1, 0], model.weight[1, 1] = -8.0, 8.0
    module, reasons = rewritten(model, x := torch.randn(2, 512).bfloat16())
    assert reasons == {}
    assert any("_weight_int4pack_mm_for_cpu" in str(node.target) for node in module.graph.nodes)
    with torch.no_grad():
        assert off(module(x), model(x)) < 2**-7


@pytest.mark.parametrize(
    ("columns", "features", "recipe", "shape", "why"),
    [
        (40, 8, weights(), (1, 40), "rows of a multiple of 16, and these are 40 long"),
        (64, 16, weights(16), (1, 64), "blocks of 32, 64, 128, 256, and these are of 16"),
        (64, 24, weights(32), (1, 64), "a multiple of 16 features of the result, and these are 24"),
        (64, 16, weights(32, bits=8), (1, 64), "takes those of 4 bits"),
        (64, 16, weights(32), (1, 3, 64), "it gets 3 rows, and kernels that read weights as integers pay at"),
    ],
)
def test_what_does_not_fit_a_kernel_stays_float_and_is_named(
    columns: int, features: int, recipe: qp.Recipe, shape: tuple[int, ...], why: str
) -> None:
    """The kernels check none of this: they read past the end."""
    model, x = linear(columns, features, recipe), torch.randn(shape).bfloat16()
    module, reasons = rewritten(model, x)
    assert why in reasons["weight_quantizer"]
    assert not any("pack_mm" in str(node.target) for node in module.graph.nodes)
    with torch.no_grad():
        assert off(module(x), model(x)) < 2**-8


def test_blocks_in_float32_and_any_number_of_rows_are_named() -> None:
    model = linear(64, 16, weights(32), torch.float32)
    _, reasons = rewritten(model, torch.randn(1, 64))
    assert "computes in bfloat16, and its input is torch.float32" in reasons["weight_quantizer"]
    _, reasons = rewritten(model, torch.randn(4, 64), ({0: torch.export.Dim("rows")},))
    assert "how many rows it gets is not fixed" in reasons["weight_quantizer"]


def test_compiled_they_are_in_the_report() -> None:
    first, second = linear(64, 32, weights()), linear(32, 16, weights(32))
    model = nn.Sequential(first, second, linear(16, 8, FLOATS))
    x = torch.randn(1, 64).bfloat16()
    lowered = qp.lower(model, x, latency=False, progress=False)
    assert lowered.report.integers == {
        "0": "linear of 8-bit weights alone, gives bfloat16",
        "1": "linear of 4-bit weights alone, gives bfloat16",
    }
    assert "fp8_e4m3 is not one of the integers" in lowered.report.skipped["2"]
    with torch.no_grad():
        assert off(lowered(x), model(x)) < 2**-6


def test_in_float32_the_compiler_makes_code_of_a_product_and_its_sum() -> None:
    """The kernel is slower than float there."""
    model, x = linear(40, 8, weights(), torch.float32), torch.randn(2, 40)
    lowered = qp.lower(model, x, latency=False, progress=False)
    assert lowered.report.integers == {"weight": "linear of 8-bit weights alone, gives float32"}
    with torch.no_grad():
        assert off(lowered(x), model(x)) < 1e-6
