"""Repeat what may succeed later, within limits and until cancelled.

urllib3 has retries of its own, but they sleep without asking whether the request was cancelled,
and know nothing of a download that broke off and can go on where it stopped.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from weights.serving.cancel import CheckCancelled, never_cancelled
from weights.serving.errors import SourceUnavailableError

logger = logging.getLogger(__name__)

LONGEST_NAP = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often an unavailable source is asked again.

    Attributes:
        attempts: tries without any progress between them.
        backoff: seconds before the second try; doubles with each further one.
        longest_wait: seconds; a source that asks for a longer wait is given up.
        check_cancelled: called before each try, between naps and for each chunk; raises to give up.
    """

    attempts: int = 5
    backoff: float = 1.0
    longest_wait: float = 30.0
    check_cancelled: CheckCancelled = never_cancelled

    def pause(self, seconds: float) -> None:
        """Wait, asking all the while whether the request was cancelled."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check_cancelled()
            time.sleep(min(left, LONGEST_NAP))

    def run(self, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Repeat the action while its source is unavailable, and return its result.

        Args:
            progress: how far the action has come (bytes, say); a failed try that came further than
                any before it starts the count anew.
        """
        failures, best = 0, progress()
        while True:
            self.check_cancelled()
            try:
                return action()
            except SourceUnavailableError as error:
                reached = progress()
                failures = 1 if reached > best else failures + 1
                best = max(best, reached)
                wait = max(error.retry_after or 0.0, self.backoff * 2 ** (failures - 1))
                if failures >= self.attempts or wait > self.longest_wait:
                    raise
                logger.info("Trying again in %.1f s: %s", wait, error)
                self.pause(wait)
