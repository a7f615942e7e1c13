"""Steps of a long measurement, each with a time limit; one that fails or hangs costs no other.

The parent measures nothing. It starts a worker process, which does the steps in order and writes
what it finds as lines of JSON. A step that is over its limit gets an exception. A worker that dies,
or does not react to that, is replaced by one that goes on behind the step that broke it.
"""

import itertools
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BROKEN = 3  # exit status of a worker that has recorded why it cannot go on
LEAST_SECONDS = 6.0  # not worth starting a step for less
POLL_SECONDS = 0.2


class OutOfTime(BaseException):
    """A step has used up its time. A step that takes every Exception for a result ends too."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: for the results and the command line.
        seconds: its limit.
        work: does it; takes what the steps of a worker share.
        base: whether all later steps need it in their process.
        anew: whether it begins a process of its own, and does there what the base steps do.
        again: environment variables to try it once more with, if it fails.
    """

    name: str
    seconds: float
    work: Callable[[Any], None]
    base: bool = False
    anew: bool = False
    again: Mapping[str, str] = field(default_factory=dict)


class Results:
    """A file of JSON lines, one for each result, written as they come."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, **values: Any) -> None:
        """Append a line."""
        line = json.dumps({"at": round(time.time(), 1), "step": step, **values}, default=str)
        with self._file.open("a") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Every line so far."""
        text = self._file.read_text() if self._file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps of these names, with the base steps that they need; all if there are no names.

    Raises:
        ValueError: there is no step of a name.
    """
    if unknown := set(only) - {step.name for step in steps}:
        names = ", ".join(step.name for step in steps)
        raise ValueError(f"no such step: {', '.join(sorted(unknown))}; there are {names}")
    wanted = [step for step in steps if not only or step.name in only]
    last = steps.index(wanted[-1])
    return [step for step in steps if step in wanted or (step.base and steps.index(step) < last)]


def do(
    steps: Sequence[Step], shared: Any, results: Results, until: float, pace: float = 1.0
) -> int:
    """Do steps in this process; return its exit status.

    Args:
        steps: in this order.
        shared: what each step's work is called with; `usable()` says whether others can go on.
        results: where errors and the seconds of each step go.
        until: when everything must end, as time.time() counts.
        pace: factor on the limits.
    """
    for step in steps:
        if (left := until - time.time()) < LEAST_SECONDS:
            results.add(step.name, skipped="no time left")
            continue
        limit = min(step.seconds * pace, left)
        results.add(step.name, begins=round(limit, 1))
        start = time.perf_counter()
        try:
            with _alarm(limit):
                step.work(shared)
        except BaseException as error:
            logger.exception("%s failed", step.name)
            results.add(step.name, error=f"{type(error).__name__}: {error}"[:600])
            if step.base or step.anew or not shared.usable():
                return BROKEN
        results.add(step.name, took=round(time.perf_counter() - start, 2))
    return 0


def supervise(
    steps: Sequence[Step],
    start: Callable[[Sequence[str], Mapping[str, str]], "subprocess.Popen[bytes]"],
    results: Results,
    until: float,
    pace: float = 1.0,
    grace: float = 25.0,
) -> None:
    """Start workers until every step has had its turn, or the time is up.

    Args:
        steps: in this order.
        start: starts a worker, in a process group of its own, for the steps of these names, with
            these environment variables added.
        results: what the workers write too.
        until, pace: as in `do`.
        grace: seconds after a limit, after which a worker is taken to hang.
    """
    left, extra = list(steps), dict[str, str]()
    while left and until - time.time() > LEAST_SECONDS:
        now = left[:1] + list(itertools.takewhile(lambda step: not step.anew, left[1:]))
        if not now[0].anew:
            now = [*(s for s in steps if s.base and s not in left), *now]
        process = start([step.name for step in now], extra)
        broken = _watch(process, now, results, until, lambda step: step.seconds * pace + grace)
        undone = now[now.index(broken) + 1 :] if broken else []
        left = [*undone, *(step for step in left if step not in now)]
        if broken and broken.again and not broken.again.items() <= extra.items():
            extra |= broken.again
            left = [broken, *left]
        elif broken and broken.base:
            break
    for step in left:
        results.add(step.name, skipped="not begun")


def _watch(
    process: "subprocess.Popen[bytes]",
    steps: Sequence[Step],
    results: Results,
    until: float,
    patience: Callable[[Step], float],
) -> Step | None:
    """Wait for a worker; return the step that broke it, if one did."""
    by_name = {step.name: step for step in steps}
    current, began, known = steps[0], time.time(), len(results.rows())
    hangs = False
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            for row in results.rows()[known:]:
                if "begins" in row:
                    current, began = by_name[row["step"]], row["at"]
            hangs = time.time() > min(began + patience(current), until + LEAST_SECONDS)
            if hangs:
                break
    finally:
        with suppress(ProcessLookupError):  # and what it has started
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if hangs:
        results.add(current.name, error=f"killed after {time.time() - began:.0f} s")
    elif status not in (0, BROKEN):
        results.add(current.name, error=f"the worker ended with {status}")
    return current if status else None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when the seconds are over."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
