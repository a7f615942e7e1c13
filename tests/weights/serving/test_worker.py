"""The engine thread: results, errors, and exceptions thrown into the waiting thread."""

import ctypes
import gc
import threading
import time
import weakref
from functools import partial
from queue import SimpleQueue

import pytest

from weights.serving.worker import EngineThread


class Interrupt(BaseException):
    """Stands for the server's cancel."""


def throw(thread: threading.Thread) -> None:
    """Raise Interrupt in a thread between two bytecodes, as the server does."""
    assert thread.ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt)
    )


def test_all_work_runs_in_one_thread() -> None:
    engine = EngineThread()
    seen = {engine.call(lambda _: threading.get_ident()) for _ in range(4)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_errors_of_the_work_reach_the_caller_and_the_thread_goes_on() -> None:
    engine = EngineThread()
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda _: 1 / 0)
    assert engine.call(lambda _: "fine") == "fine"


def test_failed_work_lets_go_of_what_it_held() -> None:
    engine, held = EngineThread(), []

    class Activations:
        pass

    def work(_) -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise MemoryError

    gc.disable()  # a cycle would live until some later collection
    try:
        with pytest.raises(MemoryError):
            engine.call(work)
        engine.call(lambda _: None)
        assert held[0]() is None
    finally:
        gc.enable()


def test_work_that_is_done_is_not_kept_until_the_next() -> None:
    class Inputs:
        pass

    engine, inputs = EngineThread(), Inputs()
    engine.call(partial(lambda inputs, _: None, inputs))
    held, inputs = weakref.ref(inputs), None
    deadline = time.monotonic() + 5
    while held() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_cancel_waits_until_the_work_has_come_to_rest() -> None:
    engine = EngineThread()
    events: list[str] = []

    def work(check_cancelled) -> None:
        events.append("started")
        try:
            while True:
                check_cancelled()
                time.sleep(0.001)
        finally:
            time.sleep(0.1)
            events.append("at rest")

    def serve() -> None:
        try:
            engine.call(work)
        except Interrupt:
            events.append("cancelled")

    thread = threading.Thread(target=serve)
    thread.start()
    while not events:
        time.sleep(0.001)
    throw(thread)
    time.sleep(0.06)
    throw(thread)  # a second cancel while the first is waiting
    thread.join(5)
    assert events == ["started", "at rest", "cancelled"]
    assert engine.call(lambda _: "fine") == "fine"


def test_a_cancel_before_the_work_is_queued_ends_the_wait(monkeypatch) -> None:
    struck = []

    class Inbox(SimpleQueue):
        def put(self, task) -> None:
            if not struck:
                struck.append(task)
                raise Interrupt
            super().put(task)

    monkeypatch.setattr("weights.serving.worker.SimpleQueue", Inbox)
    engine, ended = EngineThread(), threading.Event()

    def serve() -> None:
        with pytest.raises(Interrupt):
            engine.call(lambda _: None)
        ended.set()

    threading.Thread(target=serve, daemon=True).start()
    assert ended.wait(5)
    assert engine.call(lambda _: "fine") == "fine"


def test_a_cancel_at_any_moment_leaves_a_thread_that_serves() -> None:
    engine = EngineThread()
    running = [0]
    overlaps = []

    def work(check_cancelled) -> None:
        running[0] += 1
        overlaps.append(running[0] > 1)
        try:
            for _ in range(20):
                check_cancelled()
        finally:
            running[0] -= 1

    def serve(ready: threading.Event) -> None:
        try:
            ready.set()
            engine.call(work)
        except Interrupt:
            overlaps.append(running[0] > 0)

    for attempt in range(300):
        ready = threading.Event()
        thread = threading.Thread(target=serve, args=(ready,))
        thread.start()
        ready.wait()
        time.sleep(attempt % 10 * 2e-5)
        throw(thread)
        thread.join(5)
        assert not thread.is_alive()
    assert not any(overlaps)
    assert engine.call(lambda _: "fine") == "fine"
