"""What the cache keeps of a file: a record of its content and its origin, as JSON."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheRecord:
    """A file in the cache, and what is known of its origin.

    Attributes:
        path: relative to the cache, or absolute for a file that is kept elsewhere.
        evictable: whether the cache may remove it.
        source, revision: for the log; no secrets.
        lasting: whether its key can be used again after a day; a presigned URL cannot.
        settings: what was said beside the file about its use.
    """

    sha256: str
    size: int
    path: str
    source: str
    revision: str
    trigger_words: tuple[str, ...] = ()
    evictable: bool = True
    lasting: bool = True
    settings: str = ""


def read_record(path: Path) -> CacheRecord | None:
    """The record in a file; None if there is none, or it is damaged."""
    try:
        fields = json.loads(path.read_text())
        return CacheRecord(**{**fields, "trigger_words": tuple(fields["trigger_words"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        logger.warning("Ignored a damaged record in the cache: %s", path.name)
        return None


def write_record(path: Path, record: CacheRecord) -> None:
    """Put a record into a file, whole or not at all."""
    draft = path.with_suffix(f".{uuid4().hex}.draft")
    try:
        draft.write_text(json.dumps(asdict(record)))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
