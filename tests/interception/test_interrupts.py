"""An interrupt at any instruction of entering or leaving a block is healed by the next one at the latest."""

from __future__ import annotations

import gc
import signal
import sys
import threading

import pytest
from torch import nn

import quantpatch as qp
from quantpatch.interception.slots import lock

ENTRY = ("not_imported_by_anybody", "Thing", "not_imported_by_anybody:QuantThing")


class Interrupt(BaseException):
    pass


@pytest.fixture(autouse=True)
def _an_entry_that_waits(plugin):
    plugin(entries=[ENTRY])  # so that blocks have an item on sys.meta_path
    with qp.quantize_modules():
        pass


def state():
    inits = [(cls, vars(cls).get("__init__")) for cls in vars(nn).values() if isinstance(cls, type)]
    return inits, list(sys.meta_path)


def by_with_statement():
    with qp.quantize_modules():
        nn.Linear(1, 1)


def nested():
    with qp.quantize_modules(), qp.quantize_modules(skip=["Linear"]):
        pass


def by_decorator():
    qp.quantize_modules()(lambda: None)()


def with_custom_entry():
    with qp.quantize_modules(custom=[(nn, "ReLU", QuantReLU)]):
        pass


class QuantReLU(nn.ReLU):
    pass


def interrupted_at(step, function):
    """Runs it, with an exception in place of one of the library's instructions; False if it has fewer."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if "/quantpatch/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == step:
                sys.settrace(None)
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return count >= step


def release_the_lock():
    """Between a with statement's body and the release of its lock no signal can come in; tracing can."""
    while lock._is_owned():
        lock.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("function", "stride"),
    [(by_with_statement, 101), (nested, 1009), (by_decorator, 103), (with_custom_entry, 1511)],
)
def test_every_instruction(function, stride):
    function()
    before, step = state(), 1 + len(function.__name__)
    while interrupted_at(step, function):
        release_the_lock()
        with qp.quantize_modules():
            assert isinstance(nn.Linear(1, 1), qp.QuantizedLayer)
        assert type(nn.Linear(1, 1)) is nn.Linear, f"a block is open after an interrupt at step {step}"
        assert state() == before, f"a hook is left after an interrupt at step {step}"
        step += stride  # every single one takes minutes; another start and stride try others
    assert step > 500


@pytest.mark.parametrize("end", ["start", "stop"])
def test_every_instruction_of_starting_and_stopping(end):
    before, step, done = state(), 1, False
    while not done:
        scope = qp.quantize_modules()
        if end == "stop":
            scope.start()
        done = not interrupted_at(step, getattr(scope, end))
        release_the_lock()
        if scope._started is not None:
            scope.stop()
        with qp.quantize_modules():
            pass
        assert type(nn.Linear(1, 1)) is nn.Linear, f"a block is open after an interrupt at step {step}"
        assert state() == before, f"a hook is left after an interrupt at step {step}"
        step += 103


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_a_signal_handler_may_open_blocks_of_its_own_while_others_open_and_close(recwarn):
    before, wrong = state(), []

    def ring(*_):
        with qp.quantize_modules(skip=["Linear"]):
            if not isinstance(nn.Conv1d(1, 1, 1), qp.QuantizedLayer):
                wrong.append("inside")

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    earlier = signal.signal(signal.SIGALRM, ring)
    try:
        for number in range(150):
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + number % 30 * 2e-5)
            for _ in range(4):
                with qp.quantize_modules():
                    if not isinstance(nn.Linear(1, 1), qp.QuantizedLayer):
                        wrong.append(number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert not wrong
    assert state() == before
    assert not [str(w.message) for w in recwarn if "replaced the __init__" in str(w.message)]


def test_a_handler_that_opens_a_block_at_every_instruction_of_another():
    """As if a signal came at many of them whose handler opens a block, builds a layer and closes it."""
    before, wrong, count = state(), [], [0]
    busy = False

    def trace(frame, event, argument):
        nonlocal busy
        if busy or "/quantpatch/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count[0] += 1
        if event == "opcode" and count[0] % 11 == 0:
            busy = True
            with qp.quantize_modules():
                if not isinstance(nn.Linear(1, 1), qp.QuantizedLayer):
                    wrong.append((frame.f_code.co_name, frame.f_lineno))
            busy = False
        return trace

    scope = qp.quantize_modules()
    sys.settrace(trace)
    try:
        with scope:
            pass
    finally:
        sys.settrace(None)
    assert not wrong
    assert state() == before


def test_a_with_statement_that_is_dropped_closes_its_block():
    scope = qp.quantize_modules()
    leave = scope.__exit__
    assert scope.__enter__() is scope
    assert type(nn.Linear(1, 1)) is not nn.Linear
    del leave  # as Python drops it when nothing calls it
    gc.collect()
    assert type(nn.Linear(1, 1)) is nn.Linear
