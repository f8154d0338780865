"""Changes after which a model must compute in float what it did before: made, and undone where it does not.

Whether a change is right depends on code that is not ours: a subclass may compute more than its base does, a
forward may read what was changed. So no list of known classes decides, but a run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from quantpatch.layers.quantizer import in_float
from quantpatch.torch_tools.forward import evaluating

# Rounding is off by a few units of the last place in every layer; a thousand come from something else.
_UNITS = 1e3
# No more than that in any type of number: of bfloat16 a thousand units are eight times the value.
_MOST = 0.1
# How many times what a unit of the last place, at the output of every layer, makes of the result.
_TIMES = 10.0


class ModelChange(Protocol):
    """A change to a model that can be made, undone, and made again."""

    def apply(self) -> None:
        """Changes the model."""

    def undo(self) -> None:
        """Puts back what was there before."""


def run_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Callable[[], Any]:
    """What runs a model on given arguments."""
    return lambda: model(*args, **dict(kwargs or {}))


def apply_if_same(
    model: nn.Module, run: Callable[[], Any], changes: Mapping[str, ModelChange]
) -> dict[str, str]:
    """Makes changes to a model, but for those after which it computes something else in float.

    A model that gives different values each time is compared with nothing.

    Args:
        model: The model; in eval mode and in float while it runs, and with the same random numbers each time.
        run: Runs it.
        changes: The changes, by name; none depends on another.

    Returns:
        How far off the results were with each change that was undone, as a clause to go after "with it".
    """
    if not changes:
        return {}
    return _Comparison(model, run).apply(changes)


class _Comparison:
    """What a model gave before, and what it gives with some of the changes."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self._model = model
        self._run = run
        self._before = self._results()
        self._noise = 0.0

    def apply(self, changes: Mapping[str, ModelChange]) -> dict[str, str]:
        for change in changes.values():
            change.apply()
        if not self._difference():
            return {}
        for change in changes.values():
            change.undo()
        never_the_same = self._difference()  # without any of them
        self._noise = self._of_rounding()
        wrong = {} if never_the_same else self._wrong(list(changes), changes)
        for name, change in changes.items():
            if name not in wrong:
                change.apply()
        if wrong and self._difference():  # each alone was right enough: several together are not
            for name, change in changes.items():
                if name not in wrong:
                    change.undo()
                    wrong[name] = (
                        "the model computed something else, where several such changes came together"
                    )
        return wrong

    def _wrong(self, names: Sequence[str], changes: Mapping[str, ModelChange]) -> dict[str, str]:
        """Those of the changes that are to blame, found by halves; none of them is made before or after."""
        for name in names:
            changes[name].apply()
        how = self._difference()
        for name in names:
            changes[name].undo()
        if not how or len(names) == 1:
            return dict.fromkeys(names, how) if how else {}
        half = len(names) // 2
        return self._wrong(names[:half], changes) | self._wrong(names[half:], changes)

    def _difference(self) -> str:
        """How what the model gives differs from before; empty if it does not."""
        try:
            now = self._results()
        except Exception as error:  # a model may raise what it likes
            return f"the model failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if len(now) != len(self._before):
            return f"the model gave {len(now)} tensors instead of {len(self._before)}"
        worst = max(map(_relative, now, self._before), default=0.0)
        if not worst or worst <= _TIMES * self._noise:
            return ""
        return f"the output of the model changed by {worst:.2g} of its size"

    def _of_rounding(self) -> float:
        """How far off the results are if every layer rounds otherwise: deep ones may amplify that a lot."""
        signs = torch.Generator().manual_seed(0)

        def shaken(module: nn.Module, args: Any, output: Any) -> Any:
            if module._modules or not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            sign = torch.randint(0, 2, output.shape, generator=signs).mul(2).sub(1).to(output)
            return output * (1 + torch.finfo(output.dtype).eps * sign)

        hook = register_module_forward_hook(shaken)
        try:
            return max(map(_relative, self._results(), self._before), default=0.0)
        finally:
            hook.remove()

    def _results(self) -> list[Tensor]:
        """The tensors that a run gives."""
        random = torch.random.fork_rng(devices=[])
        with in_float(self._model), evaluating(self._model), torch.no_grad(), random:
            results = self._run()
        leaves = pytree.tree_leaves(dict(results) if isinstance(results, Mapping) else results)
        plain = [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]
        parts = [torch.view_as_real(x) if x.is_complex() else x for x in plain]
        return [x.detach().clone() for x in parts if x.is_floating_point()]


def _relative(now: Tensor, before: Tensor) -> float:
    """The norm of the difference to that of what was; 0 if it is no more than rounding."""
    if now.shape != before.shape:
        return float("inf")
    if now.is_meta or not now.numel():
        return 0.0
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(now)):
        return float("inf")
    a, b = now[finite].double(), before[finite].double()
    off, size = float((a - b).norm()), float(b.norm())
    allowed = min(_MOST, _UNITS * torch.finfo(before.dtype).eps)
    if off <= allowed * size:
        return 0.0
    return off / size if size else float("inf")
