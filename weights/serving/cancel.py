"""How long work learns that its caller has gone, and how to wait for work that cannot ask."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from math import inf
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1


class Cancelled(Exception):  # noqa: N818  (not an error: what was asked for happened)
    """The caller has cancelled the request."""


CheckCancelled = Callable[[], None]
"""Called where stopping is safe; raises Cancelled once the caller has cancelled."""


def never_cancelled() -> None:
    """Let the work go on: the default for callers that have nothing to cancel."""


def cancellable(
    work: Callable[[], T],
    check_cancelled: CheckCancelled,
    seconds: float = inf,
    discard: Callable[[T], object] = lambda _: None,
) -> T:
    """Do work in a thread of its own, and stop waiting for it if the caller has gone.

    For work that sleeps or reads where nobody can wake it. It goes on alone until it ends.

    Args:
        seconds: the longest to wait.
        discard: called with a result for which nobody waits any more.

    Raises:
        TimeoutError: the work takes longer than `seconds`.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    def drop(late: Future[T]) -> None:
        if late.exception() is None:
            discard(late.result())

    threading.Thread(target=run, name="cancellable", daemon=True).start()
    end = time.monotonic() + seconds
    try:
        while not done.done():
            check_cancelled()
            if time.monotonic() > end:
                raise TimeoutError
            wait([done], POLL_SECONDS)
    except BaseException:
        done.add_done_callback(drop)
        raise
    return done.result()
