"""What becomes of a quantized layer: copied, saved, cast, moved, converted and taken back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from quantpatch.errors import ConversionError
from quantpatch.export.checkpoint.save_load import float_state_dict
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.quantize.convert import convert, revert
from quantpatch.quantize.scope import quantize_modules
from quantpatch.testing.checks import check, demand_close, demand_equal, or_float_neither
from quantpatch.testing.subject import Broken, NotApplicable, Subject, disable, floats, parameters, tensors
from quantpatch.torch_tools.fast_paths import without_fast_paths

# --- Copies and files -----------------------------------------------------------------------------


@check(
    "Register nothing with a tensor but TensorQuantizers, whose ranges no float checkpoint has to have: no "
    "buffer, no parameter, no float layer as a child"
)
def state_dict(subject: Subject) -> None:
    """Checkpoints of the float layer load strictly, before and after calibration; ranges load too."""
    layer, quantized = subject.fresh_float(), subject.fresh_quantized()
    state = layer.state_dict()
    if list(float_state_dict(quantized)) != list(state):
        extra = [key for key in float_state_dict(quantized) if key not in state]
        missing = [key for key in state if key not in quantized.state_dict()]
        raise Broken(f"its state_dict has {extra} besides the ranges and lacks {missing}")
    quantized.load_state_dict(state, strict=True)
    subject.calibrate(quantized)
    extra = [key for key in float_state_dict(quantized) if key not in state]
    if extra:
        raise Broken(f"after calibration its state_dict has {extra} besides the ranges")
    quantized.load_state_dict(state, strict=True)
    other = subject.fresh_quantized()
    other.load_state_dict(quantized.state_dict(), strict=True)
    demand_equal(
        subject.run(other), subject.run(quantized), "loaded with its ranges, it computes other values"
    )


def _demand_twin(subject: Subject, make: Callable[[Any], Any], how: str) -> None:
    _, quantized = subject.calibrated()
    twin = make(quantized.eval())
    if type(twin) is not type(quantized):
        raise Broken(f"{how}, it is {type(twin).__qualname__}, expected {type(quantized).__qualname__}")
    held = {id(t) for t in quantized.state_dict(keep_vars=True).values()}
    shared = [name for name, t in twin.state_dict(keep_vars=True).items() if id(t) in held]
    if shared:
        raise Broken(f"{how}, it shares {', '.join(shared)} with the original")
    with torch.no_grad():
        demand_equal(subject.run(twin), subject.run(quantized), f"{how}, it computes other values")


@check(
    "Put the class at the top level of a module, and hold no lambda, closure, lock or handle: what cannot be "
    "pickled is made when it is needed"
)
def pickled(subject: Subject) -> None:
    """It can be pickled."""
    _demand_twin(subject, lambda layer: pickle.loads(pickle.dumps(layer)), "pickled")


@check("Hold nothing that points back at the layer or cannot be copied; define no __deepcopy__ of your own")
def copied(subject: Subject) -> None:
    """It can be copied with ``copy.deepcopy``."""
    _demand_twin(subject, copy.deepcopy, "copied")


@check(
    "Let get_extra_state and state_dict hold tensors, numbers and strings only, which torch.load reads with "
    "weights_only=True"
)
def weights_only(subject: Subject) -> None:
    """Its checkpoint can be read without running code from the file."""

    def through_a_file(layer: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded = subject.fresh_quantized().eval()
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        return loaded

    _demand_twin(subject, through_a_file, "loaded from a file")


# --- Types and devices ----------------------------------------------------------------------------


def _demand_dtype(subject: Subject, dtype: torch.dtype) -> None:
    layer, quantized = (module.eval() for module in subject.calibrated())
    known = {n: q.amax.clone() for n, q in named_quantizers(quantized).items() if q.amax is not None}

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    data = tree_map(cast, subject.data())
    keywords = tree_map(cast, dict(subject.example.keywords))
    cast_subject = attrs.evolve(subject, example=attrs.evolve(subject.example, keywords=keywords))
    with without_fast_paths(), torch.no_grad():
        exact = subject.run(copy.deepcopy(quantized))
        quantized.to(dtype)
        for name, before in known.items():
            after = named_quantizers(quantized)[name].amax
            if after is None or after.dtype != torch.float32 or not torch.equal(after, before):
                raise Broken(f"the range of {name} became {after}, expected {before} in float32")
        off = disable(copy.deepcopy(quantized))
        try:
            ours, plain = cast_subject.run(quantized, data), cast_subject.run(off, data)
        except Exception as error:
            or_float_neither(subject, error, lambda layer: cast_subject.run(layer.to(dtype), data))
        theirs = cast_subject.run(layer.to(dtype), data)
    demand_equal(plain, theirs, f"disabled, in {dtype}, it is not the float layer")
    for position, (a, b) in enumerate(zip(tensors(ours), tensors(theirs), strict=True)):
        if a.dtype != b.dtype:
            raise Broken(f"in {dtype} its output {position} is {a.dtype}, that of the float layer {b.dtype}")
    as_float = [tensor.float() for tensor in floats(ours)]
    demand_close(as_float, [t.float() for t in floats(exact)], f"in {dtype} it computes something else", 0.1)


@check("Keep ranges in TensorQuantizers, which keep them in float32, and create tensors of the input's dtype")
def half(subject: Subject) -> None:
    """It works in float16; its ranges stay float32."""
    _demand_dtype(subject, torch.float16)


@check("Keep ranges in TensorQuantizers, which keep them in float32, and create tensors of the input's dtype")
def bfloat16(subject: Subject) -> None:
    """It works in bfloat16; its ranges stay float32."""
    _demand_dtype(subject, torch.bfloat16)


@check(
    "Read no value of a weight while building (item(), min(), if weight.any() …), and register no buffer "
    "that is not saved: on the meta device there are shapes only"
)
def meta(subject: Subject) -> None:
    """It can be built on the meta device and filled from a checkpoint."""
    _, quantized = subject.calibrated()
    state = quantized.state_dict()

    def filled(layer: nn.Module, state: dict[str, Any]) -> nn.Module:
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            raise NotApplicable("a lazy layer has no shapes before its first input")
        there = [name for name, tensor in layer.state_dict().items() if not tensor.is_meta]
        if there:
            raise Broken(f"on the meta device its {', '.join(there)} is not on it")
        layer.to_empty(device="cpu").load_state_dict(state, strict=True)
        return layer

    def attempt(layer: nn.Module) -> nn.Module:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = subject.example.build()
        return filled(built, layer.state_dict())

    try:
        with quantize_modules(**subject.options), torch.device("meta"):
            shell = subject.example.build()
        shell = filled(shell, state)
    except NotApplicable:
        raise
    except Exception as error:
        or_float_neither(subject, error, attempt)
    demand_equal(subject.run(shell.eval()), subject.run(quantized.eval()), "filled, it computes other values")
    emptied = copy.deepcopy(quantized).to_empty(device="cpu")
    for name, quantizer in named_quantizers(quantized).items():
        amax = named_quantizers(emptied)[name].amax
        if quantizer.amax is not None and not (amax is not None and torch.equal(amax, quantizer.amax)):
            raise Broken(f"to_empty() loses the range of {name}")
    assigned = copy.deepcopy(quantized).to("meta")
    assigned.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True, assign=True)
    demand_equal(subject.run(assigned.eval()), subject.run(quantized), "assigned, it computes other values")


# --- Blocks and models ----------------------------------------------------------------------------


@check("Change nothing of the float class or of torch when the layer is imported, built or run")
def reverted(subject: Subject) -> None:
    """After the block the target is what it was, and comes out float."""
    target = subject.target
    subject.replacement  # noqa: B018  (its import is not the block's doing)
    before = dict(vars(target))
    subject.run(subject.fresh_quantized())
    after = dict(vars(target))
    changed = [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]
    changed = [key for key in changed if key != "__slotnames__"]  # Python's own note on copied classes
    if changed or list(before) != [key for key in after if key in before]:
        raise Broken(f"{subject.entry.dotted} is not what it was: {', '.join(sorted(changed))}")
    layer = subject.build()
    if isinstance(layer, subject.replacement) or named_quantizers(layer):
        raise Broken(f"outside the block it comes out as {type(layer).__qualname__}")


@check(
    "Make the replacement a quantpatch.QuantizedLayer, and let add_quantizers add all that a quantized layer "
    "has and the float one has not: convert() calls it on layers that exist, whose __init__ ran long ago"
)
def converted(subject: Subject) -> None:
    """A float layer can be converted where it stands, computes what one built in a block does, and back."""
    if "Lazy" in subject.target.__name__ and type(subject.fresh_float()) is not subject.target:
        raise NotApplicable("a lazy layer becomes another class at its first input")
    layer, built = subject.pair()
    plain = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    identities = {name: id(parameter) for name, parameter in layer.named_parameters()}
    float_class, held = type(layer), set(vars(layer))
    for again in (False, True):
        try:
            convert(layer, **subject.options)
        except ConversionError as error:
            raise Broken(str(error)) from error
        if type(layer) is not subject.replacement:
            raise Broken(f"convert() made it {type(layer).__qualname__}")
        if identities != {name: id(parameter) for name, parameter in parameters(layer)}:
            raise Broken("convert() exchanged its parameters")
        names = sorted(set(named_quantizers(built)) ^ set(named_quantizers(layer)))
        if names:
            raise Broken(f"converted and built in a block differ in {', '.join(names)}")
        if again:  # running it may change its state
            demand_equal(subject.run(layer), subject.run(built), "converted, it is not what a block builds")
        revert(layer)
        if type(layer) is not float_class:
            raise Broken(f"reverted, it is {type(layer).__qualname__}, expected {float_class.__qualname__}")
        more = sorted(set(vars(layer)) - held)
        if more or named_quantizers(layer):
            raise Broken(f"reverted, it still has {', '.join(more) or 'quantizers'}")
        if not again:
            demand_equal(layer.state_dict(), plain, "converted and reverted, its weights are others")
    revert(built)
    if type(built) is not float_class or named_quantizers(built):
        raise Broken(f"built in a block and reverted, it is {type(built).__qualname__}")
