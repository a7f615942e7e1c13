"""One long-lived thread for everything that touches the engine.

The server runs every request in a new thread and cancels it by raising an exception there
between two bytecodes. Thread-local state (grad mode, dynamo's configuration) would be lost
from request to request, and an exception thrown into library code leaks the library's locks.
So setup and requests run in this thread, and the thread that the server may interrupt only
waits. A cancel becomes a flag, which the work checks where stopping is safe.

The waiting side uses no lock of Python code for the same reason: an exception can strike
between acquiring and releasing. `SimpleQueue.put` and `lock.acquire` are single C calls.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from weights.serving.cancel import Cancelled, CheckCancelled

T = TypeVar("T")
WAKE_SECONDS = 0.05  # how often the waiting thread gives a cancel the chance to strike


class _Task(Generic[T]):
    def __init__(self, work: Callable[[CheckCancelled], T]) -> None:
        self.work = work
        self.cancelled = False
        self.finished = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.rest = threading.Lock()  # released by the worker to wake whoever waits
        self.rest.acquire()

    def check_cancelled(self) -> None:
        if self.cancelled:
            raise Cancelled

    def run(self) -> None:
        try:
            self.check_cancelled()
            self.result = self.work(self.check_cancelled)
        except BaseException as error:  # handed to the waiting thread
            self.error = error
        self.finished = True
        self.rest.release()


class EngineThread:
    """Runs one piece of work at a time, all of it in the same thread."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Task[object]] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still take work; it may be busy now."""
        return self._thread.is_alive()

    def call(self, work: Callable[[CheckCancelled], T]) -> T:
        """Run `work(check_cancelled)` in the engine thread and return its result.

        An exception raised in the *calling* thread while it waits (the server's cancel) sets
        the flag behind `check_cancelled`, waits until the work has come to rest, and is then
        raised again. An exception of the work itself is raised here as it is.
        """
        task = _Task(work)
        try:
            try:
                self._inbox.put(task)  # type: ignore[arg-type]
                self._wait(task)
            except BaseException:
                self._stop(task)
                raise
            if task.error is not None:
                raise task.error
            return task.result  # type: ignore[return-value]
        finally:
            task.error = None  # its traceback holds this task, and all tensors of the work

    def _serve(self) -> None:
        while True:
            task = self._inbox.get()
            if not task.finished:
                task.run()
            del task  # whose work holds the inputs of its request: a picture, an adapter

    def _wait(self, task: _Task[T]) -> None:
        while not task.finished:
            task.rest.acquire(timeout=WAKE_SECONDS)

    def _stop(self, task: _Task[T]) -> None:
        """Cancel and wait for the end, whatever else is thrown at this thread meanwhile.

        The task is queued again, as the exception may have struck before it was queued at
        all; the worker passes over one that has finished.
        """
        while not task.finished:
            try:
                task.cancelled = True
                self._inbox.put(task)  # type: ignore[arg-type]
                self._wait(task)
            except BaseException:  # noqa: S112  (another cancel; the first is raised in the end)
                continue
