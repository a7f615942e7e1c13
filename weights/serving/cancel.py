"""How long work learns that its caller has gone."""

from collections.abc import Callable


class Cancelled(Exception):  # noqa: N818  (not an error: what was asked for happened)
    """The caller has cancelled the request."""


CheckCancelled = Callable[[], None]
"""Called where stopping is safe; raises Cancelled once the caller has cancelled."""


def never_cancelled() -> None:
    """Let the work go on: the default for callers that have nothing to cancel."""
