"""Keeping secrets out of what is shown: presigned URLs are keys to the file they name."""

import re

MAX_SHOWN = 120


def without_secrets(text: str) -> str:
    """A URL, or what was meant as one, without user part, query and fragment, and not too long."""
    bare = re.split(r"[?#]", text, maxsplit=1)[0]
    shown = re.sub(r"(^|//)[^/]*@", r"\1", bare)
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."


def without_queries(text: str) -> str:
    """Text in which URLs may stand, whole or from their path on, without user parts and queries."""
    return re.sub(r"(?<=//)[^\s/]+@|(?<=[^\s?])\?[^\s'\"<>]+", "", text)


def one_line(text: str, limit: int = 200) -> str:
    """Text from outside as it may stand in a log: without line breaks, and not too long."""
    return " ".join(text.split())[:limit]
