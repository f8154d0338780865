"""What a quantized layer is, and what it computes."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantpatch.export.checkpoint.save_load import float_state_dict
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.testing.checks import check, demand_close, demand_equal
from quantpatch.testing.subject import Broken, NotApplicable, Subject, differ, disable
from quantpatch.torch_tools.fast_paths import without_fast_paths

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
        raise Broken(f"{replacement.__qualname__} is not a subclass of {subject.entry.dotted}")
    if pickle.loads(pickle.dumps(replacement)) is not replacement:
        raise Broken(f"{replacement.__module__}.{replacement.__qualname__} is another object")


@check(
    "Define no __init__, and the mixin takes the float class's arguments; a layer that needs one takes "
    "exactly those, and calls super().__init__ with them"
)
def signature(subject: Subject) -> None:
    """It is called as the float class is."""
    ours, theirs = inspect.signature(subject.replacement), inspect.signature(subject.target)
    # Annotations are another matter: torch 2.8 adds some to nn.Module's once it has compiled something.
    if _called(ours) != _called(theirs):
        raise Broken(f"it takes {ours}, the float class {theirs}")


def _called(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


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
    demand_equal(float_state_dict(quantized), layer.state_dict(), "its weights differ")


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
        with without_fast_paths():
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
    "operand that the example does not use needs other inputs"
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
    with without_fast_paths():
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
    """All that modules hold, with what is in their dictionaries."""
    found: dict[str, list[Any]] = {}
    for name, m in module.named_modules():
        for key, value in vars(m).items():
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


@check("Compute the same when forward runs a second time: draw no random numbers, keep nothing of the first")
def checkpointing(subject: Subject) -> None:
    """Gradient checkpointing, which runs forward again, gives the same gradients."""
    _, quantized = subject.calibrated()
    twin = copy.deepcopy(quantized)
    _, plain = subject.with_gradients(quantized)
    inner = twin.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # torch 2.8 looks at the arguments for their device, and fails at packed sequences.
        return checkpoint(partial(inner, *args, **kwargs), use_reentrant=False)

    twin.__dict__["forward"] = forward
    _, again = subject.with_gradients(twin)
    for name, gradient in plain.items():
        demand_equal(again.get(name), gradient, f"the gradient of {name} is another under checkpointing")
