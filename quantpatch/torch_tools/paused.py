"""Runs of a model over batches that wait at one module after the other, each until all have come so far.

What a module is given can be looked at, the module changed, and the runs go on through it as it is then: each
part of a model runs twice for each batch, however many modules there are to wait at, and what is held is what
runs need to go on; in a chain of modules that is what the next is given. A run is a thread, since the code
that calls modules cannot be left in the middle otherwise. Only one is ever at work.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import ctypes
import functools
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.torch_tools.forward import EnoughOfBatch, run_batch

#: Calls the module at which a run waits on copies of what it was given.
Call = Callable[[], None]


class _Dropped(BaseException):
    """Ends a run that nothing waits for any more."""


#: The run whose thread this is.
_here: contextvars.ContextVar[PausedRun | None] = contextvars.ContextVar("_here", default=None)


class PausedRuns:
    """Runs of a model, in a block that ends them.

    Args:
        model: The model.
        batches: What it is run on.
        stops: The modules to wait at. Each is waited at when a run enters it for the first time.
        folder: Where what runs hold is put while they wait; None: it stays in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        stops: Iterable[nn.Module],
        *,
        folder: Path | None = None,
    ) -> None:
        self._open = set(stops)
        self._hooks = contextlib.ExitStack()
        owned = [*model.modules(), *model.parameters(), *model.buffers()]
        shared = {id(thing): thing for thing in owned}
        in_memory = {_memory(thing) for thing in owned if isinstance(thing, Tensor)}
        self._runs: list[PausedRun] = []
        for number, batch in enumerate(batches):
            keeps = in_memory | {_memory(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
            away = None if folder is None else _Away(folder / str(number), keeps)
            self._runs.append(
                PausedRun(self, number, functools.partial(run_batch, model, batch), shared, away)
            )

    def __enter__(self) -> PausedRuns:
        for module in self._open:
            # Before other hooks, so that what it is called with is what was given.
            handle = module.register_forward_pre_hook(self._entered, with_kwargs=True, prepend=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        for run in self._runs:
            run.drop()

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = _here.get()
        if run is not None and run.of is self and module in self._open and not run.looks:
            run.wait(module, args, kwargs)

    def waiting_at(self, module: nn.Module) -> list[PausedRun]:
        """The runs that wait at a module, once all have gone on as far as they may."""
        for run in self._runs:
            while not run.is_over and run.at not in self._open:
                run.go_on()
        return [run for run in self._runs if run.at is module]

    def pass_(self, module: nn.Module) -> None:
        """Has no run wait at a module any more; those that do go on when others are asked for."""
        self._open.discard(module)


class PausedRun:
    """One run.

    Attributes:
        of: The runs that it is one of.
        number: Of its batch.
        at: The module at which it waits.
        is_over: Whether it has come to its end.
        looks: Whether a task is at work.
    """

    def __init__(
        self,
        of: PausedRuns,
        number: int,
        run: Callable[[], Any],
        shared: Mapping[int, Any],
        away: _Away | None,
    ) -> None:
        self.of, self.number = of, number
        self.at: nn.Module | None = None
        self.is_over = False
        self.looks = False
        self._run, self._shared, self._away = run, shared, away
        self._given: tuple[Any, Any] = ((), {})
        self._task: Callable[[Call], None] | None = None
        self._is_dropped = False
        self._error: BaseException | None = None
        self._goes, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Runs until it waits, or is over."""
        self._task = None
        self._resume()

    def look(self, task: Callable[[Call], None]) -> None:
        """Has a function be called where it waits, with what calls the module that it waits at.

        What the module gives is dropped, and what it is given stays as it is. It may raise ``EnoughOfBatch``.
        """
        self._task = task
        self._resume()

    def drop(self) -> None:
        """Ends it."""
        self._is_dropped = True
        if self._thread is not None:
            self._goes.release()
            self._thread.join()
            self._thread = None

    def _resume(self) -> None:
        if self._thread is None:
            around = contextvars.copy_context()
            inside = _settings()
            around.run(_here.set, self)
            self._thread = threading.Thread(target=around.run, args=(self._main, inside), daemon=True)
            self._thread.start()
        self._goes.release()
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def _main(self, inside: contextlib.AbstractContextManager[Any]) -> None:
        self._goes.acquire()
        try:
            if not self._is_dropped:
                with inside, contextlib.suppress(EnoughOfBatch):
                    self._run()
        except _Dropped:
            pass
        except BaseException as error:
            self._error = error
        self.at, self._given, self.is_over = None, ((), {}), True
        self._waits.release()

    def wait(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Is called in the run as it enters a module."""
        self.at, self._given = module, (args, kwargs)
        while True:
            if self._away is not None:
                self._away.put(self._given)
            self._waits.release()
            self._goes.acquire()
            if self._is_dropped:
                raise _Dropped
            if self._away is not None:
                self._away.fetch()
            if self._task is None:
                self.at, self._given = None, ((), {})
                return
            self.looks = True
            try:
                with contextlib.suppress(EnoughOfBatch):
                    self._task(self._call)
            except BaseException as error:
                self._error = error
                raise _Dropped from None
            finally:
                self.looks = False

    def _call(self) -> None:
        # Modules are not copied, and of results with gradients deepcopy knows nothing.
        leaves = [leaf for leaf in tree_leaves(self._given) if isinstance(leaf, Tensor)]
        results = {id(leaf): leaf.detach().clone() for leaf in leaves if leaf.grad_fn is not None}
        memo: Any = ChainMap(results, self._shared)  # type: ignore[arg-type]
        args, kwargs = copy.deepcopy(self._given, memo)
        assert self.at is not None
        self.at(*args, **kwargs)


@contextlib.contextmanager
def _all_of(several: Iterable[contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for each in several:
            stack.enter_context(each)
        yield


def _settings() -> contextlib.AbstractContextManager[None]:
    """A block with the settings of this thread that torch keeps for each, for use in another."""
    several: list[contextlib.AbstractContextManager[Any]] = [
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad(),
    ]
    if torch.get_default_device() != torch.device("cpu"):
        several.append(torch.get_default_device())
    several += [
        torch.autocast(kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return _all_of(several)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class _Away:
    """What a run holds while it waits, in a file.

    Args:
        file: The file.
        keeps: The memory that stays where it is, since others have it too.
    """

    def __init__(self, file: Path, keeps: set[int]) -> None:
        self._file, self._keeps = file, keeps
        self._storages: list[tuple[torch.UntypedStorage, int]] = []

    def put(self, given: Any) -> None:
        """Writes the memory of tensors, and frees it."""
        found: dict[int, torch.UntypedStorage] = {}
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor) and _memory(leaf) not in self._keeps:
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    storage = leaf.untyped_storage()
                    if storage.resizable() and storage.nbytes():
                        found[storage._cdata] = storage
        self._storages = [(storage, storage.nbytes()) for storage in found.values()]
        with self._file.open("wb") as file:
            for storage, _ in self._storages:
                there: torch.UntypedStorage = storage.cpu()  # type: ignore[no-untyped-call]  # not by NumPy, after which no storage can be resized
                file.write((ctypes.c_ubyte * there.nbytes()).from_address(there.data_ptr()))
        for storage, _ in self._storages:
            storage.resize_(0)

    def fetch(self) -> None:
        """Reads it again."""
        offset = 0
        for storage, size in self._storages:
            storage.resize_(size)
            read = torch.from_file(str(self._file), shared=False, size=offset + size, dtype=torch.uint8)
            _bytes_of(storage).copy_(read[offset:])
            offset += size
        self._storages = []


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
