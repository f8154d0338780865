"""What every quantized layer owes its float class, for each keyword and padding mode of torch's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from layer_cases import CASES, Case, floats, leaves
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from quantpatch import builtin
from quantpatch.descriptor import CHANNEL, QuantDescriptor, Recipe
from quantpatch.layers import QuantizedLayer
from quantpatch.quantizer import TensorQuantizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:Lazy modules are a new feature",
    "ignore:Using padding='same' with even kernel lengths",
    "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning",  # torch.compile's
)

NAMES = sorted({case.name for case in CASES})
# One case of each class, the richest one: what does not depend on the arguments is tried on these.
RICH = {
    "LSTM": "packed-state",
    "GRU": "deep",
    "RNN": "deep",
    "MultiheadAttention": "widths",
    "Embedding": "norm",
}
ONE = [next(c for c in CASES if c.name == name and c.label == RICH.get(name, c.label)) for name in NAMES]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_class = pytest.mark.parametrize("case", ONE, ids=lambda case: case.name)


def run(layer: Any, data: tuple[Any, ...], case: Case) -> Any:
    torch.manual_seed(7)  # for dropout
    return layer(*data, **case.call)


def quantizers(layer: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, TensorQuantizer)}


def disable(layer: nn.Module) -> nn.Module:
    for quantizer in quantizers(layer).values():
        quantizer.disable()
    return layer


def calibrate(layer: nn.Module, case: Case) -> None:
    for quantizer in quantizers(layer).values():
        quantizer.enable_calib()
    run(layer, case.data(), case)
    for quantizer in quantizers(layer).values():
        quantizer.disable_calib()
        if quantizer.calibrator is not None and quantizer.calibrator.saw_data:
            quantizer.load_calib_amax()
        quantizer.calibrator = None


def assert_same(ours: Any, theirs: Any) -> None:
    mine, others = list(leaves(ours)), list(leaves(theirs))
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def with_gradients(layer: nn.Module, case: Case) -> tuple[Any, list[Tensor]]:
    data = case.data()
    inputs = list({id(t): t.requires_grad_() for t in floats(data)}.values())
    output = run(layer, data, case)
    sum(t.double().square().sum() for t in floats(output)).backward()
    parameters = [p for name, p in layer.named_parameters() if not name.endswith("_amax")]
    return output, [t.grad for t in (*inputs, *parameters)]


def test_every_registered_layer_has_cases():
    assert {name for names in builtin.FAMILIES.values() for name in names} == set(NAMES)


@every_case
def test_disabled_is_bit_exact(case):
    layer, quantized = case.pair()
    disable(quantized)
    ours, our_gradients = with_gradients(quantized, case)
    theirs, their_gradients = with_gradients(layer, case)
    assert_same(ours, theirs)
    assert [g is None for g in our_gradients] == [g is None for g in their_gradients]
    assert_same([g for g in our_gradients if g is not None], [g for g in their_gradients if g is not None])
    with torch.no_grad():
        # A whole encoder layer in one C++ kernel is the one thing that a layer with quantizers does not do.
        torch.backends.mha.set_fastpath_enabled(case.name != "TransformerEncoder")
        try:
            ours = run(quantized.eval(), case.data(), case)
            theirs = run(layer.eval(), case.data(), case)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert_same(ours, theirs)


@every_case
def test_state_dict(case):
    layer, quantized = case.pair()  # float -> quantized, strictly, before calibration
    state = layer.state_dict()
    assert list(quantized.state_dict()) == list(state)
    calibrate(quantized, case)
    extra = {k for k in quantized.state_dict() if k not in state}
    known = {f"{name}._amax" for name, q in quantizers(quantized).items() if q.amax is not None}
    assert extra == known
    assert all(q.amax is not None for name, q in quantizers(quantized).items() if "hidden" not in name)
    quantized.load_state_dict(state, strict=True)  # and after
    other = case.make(case.quant_class)
    other.load_state_dict(quantized.state_dict(), strict=True)
    assert_same(run(other, case.data(), case), run(quantized, case.data(), case))


def coarse(x: Tensor, amax: Tensor) -> Tensor:
    """Three levels: -amax, 0, amax."""
    amax = amax.to(torch.float32)
    return ((x.float() / amax).round().clamp(-1, 1) * amax).to(x.dtype)


COARSE = QuantDescriptor(num_bits=2, narrow_range=True)
COARSE_RECIPE = Recipe(
    name="coarse", input=COARSE, weight=QuantDescriptor(num_bits=2, narrow_range=True, axis=CHANNEL)
)


def with_coarse_ranges(quantized: Any) -> Any:
    """Two bits, and a range for each quantizer (of weights: for each channel) that no other one has."""
    quantized.add_quantizers(COARSE_RECIPE)
    axes = quantized.weight_axes()
    for position, (name, quantizer) in enumerate(quantized.quantizers().items()):
        operand = name.removesuffix("_quantizer")
        if operand not in axes:
            quantizer.amax = 0.5 + 0.1 * position
            continue
        weight = getattr(quantized, operand)
        axis = 1 if "Transpose" in type(quantized).__name__ else 0
        assert axes[operand] == axis
        shape = [weight.shape[axis] if d == axis else 1 for d in range(weight.dim())]
        scale = 0.4 + 0.05 * position
        quantizer.amax = (
            scale * weight.detach().abs().max().float() * torch.linspace(0.5, 1, shape[axis]).view(shape)
        )
    return quantized


def reference(case: Case, layer: Any, quantized: Any, data: tuple[Any, ...]) -> Any:
    """The float layer on operands that were quantized by hand."""
    layer = copy.deepcopy(layer)
    if getattr(layer, "max_norm", None) is not None:
        run(layer, data, case)  # renormalizes rows of the table, which quantization comes after
        layer.max_norm = None
    with torch.no_grad():
        for name in quantized.weight_axes():
            weight = layer.out_proj.weight if name == "out_proj_weight" else getattr(layer, name)
            weight.copy_(coarse(weight, quantized.quantizer(name).amax))
    arguments = list(data)
    for position, name in enumerate(quantized.inputs):
        amax = quantized.quantizer(name).amax
        x = arguments[position]
        arguments[position] = (
            x._replace(data=coarse(x.data, amax)) if isinstance(x, PackedSequence) else coarse(x, amax)
        )
    if quantized.quantizer("hidden") is not None and len(data) > 1:
        state, amax = data[1], quantized.quantizer("hidden").amax
        arguments[1] = (
            coarse(state, amax) if isinstance(state, Tensor) else (coarse(state[0], amax), state[1])
        )
    return run(layer, tuple(arguments), case)


# What a float layer cannot be given from outside; test_recurrent.py and test_attention.py compute these.
INSIDE = ("input_l1", "input_l2", "q", "k", "v", "probabilities", "out_proj_input")


@every_case
def test_every_operand_is_quantized(case):
    if case.name == "TransformerEncoder":
        pytest.skip("has no operands of its own")
    layer, quantized = case.pair()
    with_coarse_ranges(quantized)
    plain = run(layer, case.data(), case)
    for name, quantizer in quantized.quantizers().items():  # each of them matters
        disable(quantized)
        quantizer.enable()
        changed = floats(run(quantized, case.data(), case))[0]
        # Without a state a cell multiplies zeros.
        is_unused = "Cell" in case.name and len(case.data()) == 1 and ("hidden" in name or "hh" in name)
        assert torch.equal(changed, floats(plain)[0]) == is_unused, name
    for quantizer in quantized.quantizers().values():
        quantizer.enable()
    for name in INSIDE:
        if quantized.quantizer(name) is not None:
            quantized.quantizer(name).disable()
    ours = run(quantized, case.data(), case)
    for a, b in zip(floats(ours), floats(reference(case, layer, quantized, case.data())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


@every_case
def test_gradients_reach_every_operand(case):
    _, quantized = case.pair()
    calibrate(quantized, case)
    _, gradients = with_gradients(quantized, case)
    unused = case.name == "Embedding" or "unbatched" in case.label
    unused |= "Cell" in case.name and len(case.data()) == 1  # no state, so the weight for it has none
    for gradient in gradients:
        assert gradient is not None
        assert gradient.isfinite().all()
    if not unused and "norm" not in case.label.lower() and "InstanceNorm" not in case.name:
        assert all(g.abs().sum() > 0 for g in gradients if g.numel() > 8)


@each_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case, dtype):
    layer, quantized = case.pair()
    calibrate(quantized, case)
    before = {name: q.amax.clone() for name, q in quantizers(quantized).items() if q.amax is not None}
    quantized.half() if dtype == torch.float16 else quantized.to(dtype)
    for name, quantizer in quantizers(quantized).items():
        if name in before:
            assert quantizer.amax.dtype == torch.float32
            assert torch.equal(quantizer.amax, before[name])

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, PackedSequence):
            return value._replace(data=value.data.to(dtype))
        return tuple(cast(v) for v in value)

    data = cast(case.data())
    try:
        plain = run(layer.to(dtype), data, case)
    except (NotImplementedError, RuntimeError) as error:
        if "not implemented" not in str(error):
            raise
        pytest.skip(f"torch has no such kernel: {error}")
    for a, b in zip(floats(run(quantized, data, case)), floats(plain), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.2, atol=0.15, equal_nan=True)
    if getattr(layer, "max_norm", None) is None:  # renormalizing twice in half precision is not once
        assert_same(run(disable(quantized), data, case), plain)


@each_class
def test_copies_and_files(case):
    _, quantized = case.pair()
    calibrate(quantized, case)
    quantized.eval()
    with torch.no_grad():
        expected = run(quantized, case.data(), case)
        file = io.BytesIO()
        torch.save(quantized.state_dict(), file)
        file.seek(0)
        loaded = case.make(case.quant_class).eval()
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        copies = [copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), loaded]
        for twin in copies:
            assert type(twin) is type(quantized)
            assert_same(run(twin, case.data(), case), expected)
        ours = {id(t) for t in quantized.state_dict(keep_vars=True).values()}
        for twin in copies:  # nothing is shared
            assert not ours & {id(t) for t in twin.state_dict(keep_vars=True).values()}


@each_class
def test_meta_device_then_filled(case):
    _, quantized = case.pair()
    calibrate(quantized, case)
    if case.name.startswith("Lazy"):
        pytest.skip("a lazy layer has no shapes before its first input")
    if case.name == "TransformerEncoder":
        shell = copy.deepcopy(quantized).to("meta")
    else:
        shell = case.quant_class(
            *case.args, **{**case.kwargs, **({} if "Pool" in case.name else {"device": "meta"})}
        )
        assert all(t.is_meta for t in shell.state_dict().values())
    shell.to_empty(device="cpu")
    shell.load_state_dict(quantized.state_dict(), strict=True)
    assert_same(run(shell.eval(), case.data(), case), run(quantized.eval(), case.data(), case))
    # A range that is known survives to_empty, which leaves nothing else.
    filled = copy.deepcopy(quantized)
    filled.to_empty(device="cpu")
    for name, quantizer in quantizers(filled).items():
        if quantizer.amax is not None:
            assert torch.equal(quantizer.amax, quantizers(quantized)[name].amax)
    # assign=True takes the tensors of the checkpoint themselves.
    assigned = copy.deepcopy(quantized).to("meta")
    assigned.load_state_dict(
        {k: v.clone() for k, v in quantized.state_dict().items()}, strict=True, assign=True
    )
    assert_same(run(assigned.eval(), case.data(), case), run(quantized.eval(), case.data(), case))


@each_class
def test_class(case):
    assert inspect.signature(case.quant_class) == inspect.signature(case.float_class)
    assert issubclass(case.quant_class, case.float_class)
    assert issubclass(case.quant_class, QuantizedLayer)
    assert case.quant_class.__doc__
    if case.name == "TransformerEncoder":
        return  # it draws none; its layers do
    torch.manual_seed(0)
    case.make(case.float_class)
    after = torch.rand(1)
    torch.manual_seed(0)
    case.make(case.quant_class)
    assert torch.equal(torch.rand(1), after)  # as many random numbers were drawn
    layer, quantized = case.make(case.float_class), case.make(case.quant_class)
    assert_same(list(quantized.parameters()), list(layer.parameters()))


def frozen(module: nn.Module) -> dict[str, Any]:
    """All that modules hold, apart from what quantizers keep for speed."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        for key, value in vars(m).items():
            if key in ("_kept", "_compared"):
                continue
            same = tuple(value.items()) if isinstance(value, dict) else value
            found[f"{name}.{key}"] = (
                id(value),
                tuple((k, id(v)) for k, v in same) if isinstance(value, dict) else 0,
            )
    return found


@each_class
def test_forward_leaves_the_layer_alone(case):
    _, quantized = case.pair()
    calibrate(quantized, case)
    run(quantized, case.data(), case)
    before = frozen(quantized)
    for training in (True, False):
        for module in quantized.modules():
            module.__dict__["training"] = training
        run(quantized, case.data(), case)
        with torch.no_grad():
            run(quantized, case.data(), case)
    for module in quantized.modules():
        module.__dict__["training"] = True
    assert frozen(quantized) == before


@each_class
def test_threads_share_a_layer(case):
    if getattr(case.make(case.quant_class), "max_norm", None) is not None:
        pytest.skip("torch itself writes to the table in forward")
    _, quantized = case.pair()
    calibrate(quantized, case)
    quantized.eval()
    data = [case.data(seed) for seed in range(4)]
    with torch.no_grad():
        expected = [quantized(*d, **case.call) for d in data]
    quantized.train().eval()
    found: list[Any] = [None] * len(data)
    start = threading.Barrier(len(data))

    def work(position: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(5):
                found[position] = quantized(*data[position], **case.call)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(floats(ours), floats(theirs), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@each_class
def test_gradient_checkpointing(case):
    if case.name.startswith("EmbeddingBag") or getattr(case.make(case.float_class), "max_norm", None):
        pytest.skip("torch's own layer changes its table or takes no gradient to its input")
    _, quantized = case.pair()
    calibrate(quantized, case)
    _, plain = with_gradients(quantized, case)
    quantized.zero_grad()
    inner = quantized.forward
    quantized.__dict__["forward"] = lambda *args, **kwargs: checkpoint(
        inner, *args, use_reentrant=False, **kwargs
    )
    _, again = with_gradients(quantized, case)
    assert_same(again, plain)


@each_class
def test_hooks_see_what_torch_shows_them(case):
    layer, quantized = case.pair()
    disable(quantized)
    seen: list[Any] = []
    for module in (layer, quantized):
        module.register_forward_pre_hook(lambda m, args: seen.append(args))
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        run(module, case.data(), case)
    assert len(seen) == 4
    assert_same(seen[2], seen[0])
    assert_same(seen[3], seen[1])


COMPILED = [
    case
    for case in CASES
    if case.id in ("Linear-plain", "Conv2d-circular", "ConvTranspose1d-size",
                   "MultiheadAttention-masks-fused", "LSTMCell-state", "Embedding-plain", "AvgPool2d-plain")
]  # fmt: skip


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)
def test_compile_without_graph_break(case):
    torch._dynamo.reset()
    _, quantized = case.pair()
    calibrate(quantized, case)
    backend = "aot_eager" if case.name in ("Linear", "Conv2d") else "eager"  # the former traces gradients too
    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    for training in (True, False):
        quantized.train(training)
        for a, b in zip(
            floats(compiled(*case.data(), **case.call)),
            floats(quantized(*case.data(), **case.call)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", COMPILED[::2], ids=lambda case: case.id)
def test_export(case):
    _, quantized = case.pair()
    calibrate(quantized, case)
    quantized.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        for strict in (False, True):
            program = torch.export.export(quantized, case.data(), case.call, strict=strict)
            ours = program.module()(*case.data(), **case.call)
            for a, b in zip(floats(ours), floats(quantized(*case.data(), **case.call)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
