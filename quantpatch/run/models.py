"""The models that a script runs: configured, calibrated in their first calls, audited in the next one.

A model is a module with quantizers that is called while no other module is running. Nothing is run
twice and nothing is kept alive: the audit records the script's own call. Calls inside compiled code
cannot be seen; the calls that are looked at run without ``torch.compile``.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from quantpatch.analysis.audit.coverage import report_of
from quantpatch.analysis.audit.trace import tracing
from quantpatch.errors import ArgumentError, QuantPatchError
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.page.page import write_page
from quantpatch.page.seen import seeing
from quantpatch.quantize.calibration import Calibration
from quantpatch.quantize.configure import configure
from quantpatch.quantize.rules import Rules
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import uncompiled

#: More models than are worth reading about: a script that calls its layers one by one has many.
MOST_AUDITS = 20


class WatchedModels:
    """Watches the calls of all modules of the process.

    Args:
        calibrate: How many calls of each model calibrate it; 0: none.
        calibration: How these do so: keywords of ``Calibration``, such as the method.
        audit: Whether to audit the call after these.
        page: Where to write a page about the first model; None for none. Those of others are beside it.
        rules: What is to be configured by name before the first call.
        operations: What becomes of the operations inside forwards before that, or before their ranges are
            loaded: gets the model.
    """

    def __init__(
        self,
        calibrate: int,
        calibration: Mapping[str, Any] = MappingProxyType({"existing": "keep"}),
        *,
        audit: bool,
        page: Path | None = None,
        rules: Rules = (),
        operations: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._rules = rules
        self._operations = operations
        self._calibrate = calibrate
        self._calibration = calibration
        self._audit = audit
        self._page = page
        self._local = threading.local()
        self._watched: weakref.WeakKeyDictionary[nn.Module, _Model | None] = weakref.WeakKeyDictionary()
        self._all: list[_Model] = []
        self._hooks = (
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        )
        self._loaded_by = nn.Module.load_state_dict
        self._loading = None if operations is None else _with_operations_first(operations)
        if self._loading is not None:
            nn.Module.load_state_dict = self._loading  # type: ignore[method-assign]

    def close(self) -> None:
        """Stops watching; calibrations that are not over are given up."""
        if nn.Module.load_state_dict is self._loading:  # not what others have made of it since
            nn.Module.load_state_dict = self._loaded_by  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        for model in self._all:
            model.give_up()

    def notes(self) -> tuple[str, ...]:
        """What is to be reported of the models, by name."""
        found = [note for model in self._all for note in model.all_notes()]
        left = len(self._all) - MOST_AUDITS
        if (self._audit or self._page) and left > 0:
            found.append(f"{left} more models ran than are audited: {self._all[-1].name} was the last")
        return tuple(found)

    def audits(self) -> tuple[str, ...]:
        """The audit of each model that ran."""
        return tuple(model.audit for model in self._all if model.audit)

    # --- each call of any module -----------------------------------------------------------------

    def _stack(self) -> list[nn.Module]:
        stack: list[nn.Module] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    def _entered(self, module: nn.Module, args: Any) -> None:
        stack = self._stack()
        if torch.compiler.is_compiling() or (not stack and _in_backward()):
            return
        stack.append(module)
        if len(stack) == 1:
            if module not in self._watched:
                before = type(_unwrapped(module))
                self._watched[module] = self._model(module)
                if type(_unwrapped(module)) is not before:  # this call runs the forward of its class before
                    if (model := self._watched[module]) is not None:
                        model.note(
                            f"in the first call the operations in {before.__name__}.forward were float"
                        )
                    return
            if (model := self._watched[module]) is not None:
                model.begin()

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        if module in stack:
            while stack.pop() is not module:
                pass
        if not stack and not _in_backward() and (model := self._watched.get(module)) is not None:
            model.end(sys.exc_info()[1])

    def _model(self, module: nn.Module) -> _Model | None:
        runner, problem = _unwrapped(module), ""
        if self._operations is not None and not isinstance(runner, TensorQuantizer):
            try:
                self._operations(runner)
            except QuantPatchError as error:
                problem = f"its operations were not quantized: {error}"
        if isinstance(runner, TensorQuantizer) or not named_quantizers(runner):
            return None
        same = sum(type(runner).__name__ == model.kind for model in self._all)
        name = type(runner).__name__ + (f" ({same + 1})" if same else "")
        few, count, page = len(self._all) < MOST_AUDITS, len(self._all), self._page
        if page is not None and count:
            page = page.with_stem(f"{page.stem}-{count + 1}")
        model = _Model(
            runner,
            name,
            self._calibrate,
            self._calibration,
            audit=self._audit and few,
            page=page if few else None,
        )
        self._all.append(model)
        if problem:
            model.note(problem)
        if self._rules:
            try:
                configure(runner, self._rules)
            except ArgumentError as error:
                model.note(f"the rules of the recipe were not applied: {error}")
        return model


def _with_operations_first(quantize_operations: Callable[[nn.Module], None]) -> Callable[..., Any]:
    """``load_state_dict``, before which a model gets the operations that a state has ranges of."""
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(model: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, Mapping):
            quantizers = {str(key).rpartition(".")[0] for key in state_dict if "_quantizer." in str(key)}
            if quantizers - dict(model.named_modules()).keys():
                with contextlib.suppress(QuantPatchError):  # reported when it runs
                    quantize_operations(_unwrapped(model))
        return load(model, state_dict, *args, **kwargs)

    return load_state_dict


def _in_backward() -> bool:
    """Whether autograd is running here, as when checkpointed parts of a model are computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel and DistributedDataParallel wrap."""
    wrappers = (nn.DataParallel, nn.DistributedDataParallel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif (inner := uncompiled(module)) is not module:
            module = inner
        else:
            return module


class _Model:
    """One model: in its first calls it calibrates, in the next it is audited, then it is left alone."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        calibrate: int,
        calibration: Mapping[str, Any],
        *,
        audit: bool,
        page: Path | None,
    ) -> None:
        self.name = name
        self.kind = type(model).__name__
        self.audit = ""
        self._notes: list[str] = []
        self._wanted = calibrate
        self._calibration = calibration
        self._audited = audit or page is not None
        self._prints, self._page = audit, page
        self._calls = 0
        self._lock = threading.Lock()
        self._caller: int | None = None  # the thread whose call is looked at
        self._handled: BaseException | None = None  # what the script was handling when the call began
        self._life: Generator[None, None, None] | None = self._lived(model)

    def _lived(self, model: nn.Module) -> Generator[None, None, None]:
        """Goes on where a call begins and where it ends."""
        by_itself = any(q.calibrating for q in named_quantizers(model).values())
        if self._wanted and not by_itself:
            with Calibration(model, **self._calibration, strict=False, passive=True) as calibration:
                while calibration.quantizers and self._calls < self._wanted:
                    with _Eager():
                        yield
                    self._calls += 1
                    if self._calls < self._wanted:
                        yield
            if calibration.quantizers:
                self._note_of(calibration)
                with in_float(model):  # what backward computes again has to be what it was
                    yield
        if self._wanted and not self._calls:
            self.note("nothing to calibrate: its quantizers are dynamic, off, or have ranges")
            self._wanted = 0
        if self._audited:
            while any(q.calibrating for q in named_quantizers(model).values()):  # by the script itself
                yield  # until this call is over
                yield  # until the next one begins
            with contextlib.ExitStack() as looking:
                seen = {} if self._page is None else looking.enter_context(seeing(model))
                looking.enter_context(_Eager())
                trace = looking.enter_context(tracing(model))
                yield
            coverage = report_of(model, trace)
            if self._prints:
                self.audit = str(coverage).rstrip()
            if self._page is not None:
                write_page(self._page, model, coverage, seen, calls=shlex.join(sys.argv))
                self.note(f"its page is {self._page}")

    def _note_of(self, calibration: Calibration) -> None:
        report, count = calibration.report, len(calibration.quantizers)
        assert report is not None
        if report.problem:
            self.note(f"{report.problem}. They take the range of each tensor")
        self.note(f"{len(report.calibrated)} of {count} quantizers calibrated in {self._calls} calls")

    def note(self, note: str) -> None:
        """Adds something to report."""
        self._notes.append(note)

    def begin(self) -> None:
        """A call begins."""
        with self._lock:
            if self._life is None or self._caller is not None:
                return
            self._caller = threading.get_ident()
            self._handled = sys.exc_info()[1]
            self._go_on(None)

    def end(self, error: BaseException | None) -> None:
        """A call is over, or ``error`` came out of it."""
        with self._lock:
            if self._life is not None and self._caller == threading.get_ident():
                self._go_on(error if error is not self._handled else None)
                self._caller = self._handled = None

    def _go_on(self, error: BaseException | None) -> None:
        assert self._life is not None
        try:
            if error is None:
                next(self._life)
            else:
                self._life.throw(error)
        except StopIteration:
            self._life = None
        except Exception as raised:
            self._life = None
            doing = "calibration" if self._calls < self._wanted else "audit"
            self.note(f"{doing} given up, since a call failed: {type(raised).__name__}: {raised}")

    def give_up(self) -> None:
        """Ends what is going on."""
        life, self._life = self._life, None
        if life is not None:
            life.close()

    def all_notes(self) -> list[str]:
        """What is to be reported of it."""
        notes = list(self._notes)
        if self._life is not None and self._calls < self._wanted:
            notes.append(
                f"ran {self._calls} of the {self._wanted} calls that calibrate it: no range was set, and it "
                f"stayed float. Write a smaller --calibrate"
            )
        elif self._life is not None and self._audited:
            notes.append("not audited: every call that it ran calibrated it")
        return [f"{self.name}: {note}" for note in notes]


class _Eager:
    """A block in which nothing is compiled: a setting of the process, which threads that need it share."""

    _lock = threading.Lock()
    _users = 0
    _stance: contextlib.AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # Without Dynamo nothing can be compiled, and importing it takes a second.
            if not _Eager._users and "torch._dynamo" in sys.modules:
                _Eager._stance = torch.compiler.set_stance("force_eager")
                _Eager._stance.__enter__()
            _Eager._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _Eager._users -= 1
            if not _Eager._users and _Eager._stance is not None:
                stance, _Eager._stance = _Eager._stance, None
                stance.__exit__(None, None, None)
