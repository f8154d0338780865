"""What every quantized layer owes its float class, one function a rule.

A check raises ``Broken`` with what it saw; what to change is said once, beside the check's name.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from quantpatch.errors import ConversionError
from quantpatch.models import convert, revert
from quantpatch.quantizer import TensorQuantizer, named_quantizers
from quantpatch.scope import quantize_modules
from quantpatch.testing.subject import (
    Broken,
    NotApplicable,
    Subject,
    differ,
    disable,
    floats,
    parameters,
    tensors,
)

__all__ = ["CHECKS", "Check", "check"]

Function = Callable[[Subject], None]


@attrs.frozen
class Check:
    """A rule.

    Attributes:
        name: Its name.
        function: Raises ``Broken`` if it does not hold, ``NotApplicable`` if it says nothing here.
        advice: What to change in the layer's code.
        traces: Whether it compiles or exports the layer, which takes seconds.
    """

    name: str
    function: Function
    advice: str
    traces: bool


#: Every check by name, in the order they are made.
CHECKS: dict[str, Check] = {}


def check(advice: str, *, traces: bool = False) -> Callable[[Function], Function]:
    """Registers a check under its function's name."""

    def add(function: Function) -> Function:
        CHECKS[function.__name__] = Check(function.__name__, function, advice, traces)
        return function

    return add


@contextmanager
def in_the_open() -> Iterator[None]:
    """A block without torch's C++ kernels for whole transformer layers, which round in their own way."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def demand_equal(ours: Any, theirs: Any, what: str) -> None:
    """Raises ``Broken`` unless two outputs are the same bit for bit."""
    difference = differ(ours, theirs)
    if difference:
        raise Broken(f"{what}: {difference}")


def or_float_neither(subject: Subject, error: Exception, attempt: Callable[[nn.Module], Any]) -> None:
    """Raises ``NotApplicable`` if the float layer fails as well, else the error again."""
    try:
        attempt(subject.fresh_float())
    except Exception as same:
        raise NotApplicable(f"the float layer cannot either: {type(same).__name__}: {same}") from same
    raise error


# --- The class ------------------------------------------------------------------------------------


@check(
    "Write a subclass of the float class, with QuantizedLayer first, at the top level of a module: "
    "class QuantMyLayer(quantpatch.QuantizedLayer, MyLayer)"
)
def replaced(subject: Subject) -> None:
    """A block replaces the target by a subclass that can be found by its name."""
    replacement, target = subject.replacement, subject.target
    subject.fresh_quantized()
    if not issubclass(replacement, target):
        raise Broken(f"{replacement.__qualname__} is no subclass of {subject.entry.dotted}")
    if pickle.loads(pickle.dumps(replacement)) is not replacement:
        raise Broken(f"{replacement.__module__}.{replacement.__qualname__} is another object")


@check(
    "Define no __init__, and the mixin takes the float class's arguments; a layer that needs one takes "
    "exactly those, and calls super().__init__ with them"
)
def signature(subject: Subject) -> None:
    """It is called as the float class is."""
    ours, theirs = inspect.signature(subject.replacement), inspect.signature(subject.target)
    if ours != theirs:
        raise Broken(f"it takes {ours}, the float class {theirs}")


@check(
    "Leave the initialization to the float class: call super().__init__, draw no random numbers of your own, "
    "and change no weight after it"
)
def initial(subject: Subject) -> None:
    """It starts with the weights that the float layer would have, and draws as many random numbers."""
    layer = subject.fresh_float()
    after = torch.rand(1)
    quantized = subject.fresh_quantized()
    if not torch.equal(torch.rand(1), after):
        raise Broken("it draws more or fewer random numbers than the float layer")
    demand_equal(quantized.state_dict(), layer.state_dict(), "its weights are others")


# --- Computing ------------------------------------------------------------------------------------


@check(
    "Compute with the float class's own forward (leave forward to the mixin, or call super().forward), and "
    "let operands pass a quantizer and nothing else: no cast, no contiguous(), no detach()"
)
def disabled(subject: Subject) -> None:
    """With all quantizers disabled it computes what the float layer does, gradients included, bit for bit."""
    for training in (True, False):
        where = "in training mode" if training else "in eval mode"
        layer, quantized = (module.train(training) for module in subject.pair())
        disable(quantized)
        with in_the_open():
            with torch.no_grad():
                ours, theirs = subject.run(quantized), subject.run(layer)
            demand_equal(ours, theirs, f"disabled, its output {where} is not the float layer's")
            try:
                output, gradients = subject.with_gradients(quantized)
            except NotApplicable:
                continue
            expected, float_gradients = subject.with_gradients(layer)
        demand_equal(output, expected, f"disabled, its output {where} is not the float layer's")
        for name, gradient in float_gradients.items():
            own = gradients.get(name)
            if (own is None) != (gradient is None):
                raise Broken(f"disabled, the gradient of {name} {where} is {own}, expected {gradient}")
            demand_equal(own, gradient, f"disabled, the gradient of {name} {where} is not the float layer's")


@check(
    "Name every activation in `inputs`, every weight in `weights`, and every call inside forward in "
    "`operations`; hand each operand through quantize_operand (or its quantizer) where forward uses it. An "
    "operand that the example does not use wants other inputs"
)
def operands(subject: Subject) -> None:
    """Every quantizer sees a tensor, and what comes out of it is used."""
    _, quantized = subject.calibrated()
    found = named_quantizers(quantized)
    if not found:
        raise Broken("it has no quantizer at all")
    seen: set[nn.Module] = set()
    handles = [q.register_forward_hook(lambda q, args, output: seen.add(q)) for q in found.values()]
    subject.run(quantized)
    for handle in handles:
        handle.remove()
    unseen = [name for name, quantizer in found.items() if quantizer not in seen]
    if unseen:
        raise Broken(f"no tensor passed through {', '.join(unseen)}")
    with torch.no_grad():
        plain = subject.run(disable(quantized.eval()))
        for name, quantizer in found.items():
            if quantizer.amax is not None:
                quantizer.amax = quantizer.amax * 0.25  # coarse enough to change any output
            disable(quantized, but=[quantizer])
            if not differ(subject.run(quantized), plain):
                raise Broken(f"the output is the same whether {name} is enabled or not")


@check(
    "Put nothing between an operand and the product that cuts the graph: no detach(), no .data, no "
    "torch.no_grad(), no in-place change"
)
def gradients(subject: Subject) -> None:
    """Gradients reach every input and parameter that the float layer's reach, and are finite."""
    layer, quantized = subject.calibrated()
    with in_the_open():
        _, ours = subject.with_gradients(quantized)
        _, theirs = subject.with_gradients(layer)
    for name, expected in theirs.items():
        gradient = ours.get(name)
        if expected is None:
            continue
        if gradient is None:
            raise Broken(f"{name} gets no gradient")
        if not gradient.isfinite().all():
            raise Broken(f"the gradient of {name} is not finite")
        if expected.abs().sum() > 1e-3 and expected.numel() > 8 and not gradient.abs().sum() > 0:
            raise Broken(f"the gradient of {name} is zero everywhere")


@check("Let forward call float_class.forward with the arguments as they came; the mixin's does")
def hooks(subject: Subject) -> None:
    """Forward hooks see the inputs and outputs that those of the float layer see."""
    layer, quantized = subject.pair()
    disable(quantized)
    seen: list[Any] = []
    for module in (layer, quantized):
        module.register_forward_pre_hook(lambda m, args: seen.append(args))
        module.register_forward_hook(lambda m, args, output: seen.append(output))
        subject.run(module)
    if len(seen) != 4:
        raise Broken(f"{len(seen) - 2} hooks of the quantized layer ran, expected 2")
    for what, ours, theirs in (("input", seen[2], seen[0]), ("output", seen[3], seen[1])):
        demand_equal(ours, theirs, f"a hook sees another {what}")


@check(
    "Keep what belongs to one call in local variables: forward may set no attribute, swap no weight and "
    "register nothing, since threads share layers"
)
def unchanged(subject: Subject) -> None:
    """Running it leaves its attributes, parameters and modules what they were."""
    layer, quantized = subject.calibrated()
    changed = _changed_by_running(subject, quantized) - _changed_by_running(subject, layer)
    if changed:
        raise Broken(f"forward changes {', '.join(sorted(changed))}")


def _changed_by_running(subject: Subject, layer: nn.Module) -> set[str]:
    subject.run(layer)
    before = _held(layer)
    for training in (True, False):
        for module in layer.modules():
            module.__dict__["training"] = training
        subject.run(layer)
        with torch.no_grad():
            subject.run(layer)
    for module in layer.modules():
        module.__dict__["training"] = True
    after = _held(layer)
    return {key for key in before.keys() | after.keys() if not _is_same(before.get(key), after.get(key))}


def _held(module: nn.Module) -> dict[str, list[Any]]:
    """All that modules hold, with what is in their dictionaries, but for what quantizers keep for speed."""
    found: dict[str, list[Any]] = {}
    for name, m in module.named_modules():
        for key, value in vars(m).items():
            if isinstance(m, TensorQuantizer) and key in ("_kept", "_compared"):
                continue
            within = [*value.keys(), *value.values()] if isinstance(value, dict) else []
            found[f"{name}.{key}".lstrip(".")] = [value, *within]
    return found


def _is_same(before: list[Any] | None, after: list[Any] | None) -> bool:
    if before is None or after is None or len(before) != len(after):
        return False
    return all(a is b for a, b in zip(before, after, strict=True))


@check("Keep what belongs to one call in local variables; put no weight or flag on the layer while it runs")
def threads(subject: Subject) -> None:
    """Several threads can use it at once."""
    _, quantized = subject.calibrated()
    quantized.eval()
    data = [subject.data(seed) for seed in range(4)]
    keywords = subject.example.keywords
    with torch.no_grad():
        expected = [quantized(*d, **keywords) for d in data]
    quantized.train().eval()
    found: list[Any] = [None] * len(data)
    start = threading.Barrier(len(data))

    def work(position: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(5):
                found[position] = quantized(*data[position], **keywords)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(data))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for ours, theirs in zip(found, expected, strict=True):
        demand_close(ours, theirs, "threads that share it get other results", 1e-5)


def demand_close(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Raises ``Broken`` if outputs are further apart than a share of the expected one's norm."""
    mine, others = floats(ours), floats(theirs)
    if len(mine) != len(others):
        raise Broken(f"{what}: {len(mine)} tensors, expected {len(others)}")
    for a, b in zip(mine, others, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Broken(f"{what}: {a.dtype} of shape {tuple(a.shape)}, expected {b.dtype}, {tuple(b.shape)}")
        ours_, theirs_ = a.double().nan_to_num(), b.double().nan_to_num()
        distance, norm = (ours_ - theirs_).norm().item(), theirs_.norm().item()
        if not distance <= tolerance * max(norm, 1e-3):
            raise Broken(f"{what}: they differ by {distance:.3g}, where the expected norm is {norm:.3g}")


@check("Compute the same when forward runs a second time: draw no random numbers, keep nothing of the first")
def checkpointing(subject: Subject) -> None:
    """Gradient checkpointing, which runs forward again, gives the same gradients."""
    _, quantized = subject.calibrated()
    twin = copy.deepcopy(quantized)
    _, plain = subject.with_gradients(quantized)
    inner = twin.forward
    twin.__dict__["forward"] = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    _, again = subject.with_gradients(twin)
    for name, gradient in plain.items():
        demand_equal(again.get(name), gradient, f"the gradient of {name} is another under checkpointing")


# --- Copies and files -----------------------------------------------------------------------------


@check(
    "Register nothing with a tensor but TensorQuantizers, which have none until their range is known: no "
    "buffer, no parameter, no float layer as a child"
)
def state_dict(subject: Subject) -> None:
    """Checkpoints of the float layer load strictly, before and after calibration; ranges load too."""
    layer, quantized = subject.fresh_float(), subject.fresh_quantized()
    state = layer.state_dict()
    if list(quantized.state_dict()) != list(state):
        extra = [key for key in quantized.state_dict() if key not in state]
        missing = [key for key in state if key not in quantized.state_dict()]
        raise Broken(f"before calibration its state_dict has {extra} besides and lacks {missing}")
    quantized.load_state_dict(state, strict=True)
    subject.calibrate(quantized)
    ranges = {f"{n}._amax" for n, q in named_quantizers(quantized).items() if q.amax is not None}
    extra = sorted(set(quantized.state_dict()) - set(state) - ranges)
    if extra:
        raise Broken(f"after calibration its state_dict has {extra} besides the ranges")
    quantized.load_state_dict(state, strict=True)
    other = subject.fresh_quantized()
    other.load_state_dict(quantized.state_dict(), strict=True)
    demand_equal(subject.run(other), subject.run(quantized), "loaded with its ranges, it computes others")


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
    with in_the_open(), torch.no_grad():
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
