"""Keeping what libraries say about themselves out of the user's log. Imports none of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_remarks() -> Iterator[None]:
    """Import the large libraries without their warnings about optional packages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def without_progress_bars() -> None:
    """Have diffusers and transformers log errors alone, and draw no bars while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()  # prompts.py says it itself where a prompt is cut
        library.disable_progress_bar()
