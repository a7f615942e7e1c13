"""Importing the large libraries, quickly and without their remarks. Imports none of them itself."""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_libraries() -> Iterator[None]:
    """Import without warnings about optional packages, and without collecting garbage.

    Imports make 430,000 objects that stay. Looking through them took the collector 1.4 of 5 seconds
    here, 0.27 seconds now and then in requests, and 1.4 seconds at the end of the process (two
    cores of an EPYC). So it does not run meanwhile, and passes over them later. Where everything
    has been imported before, nothing changes for the collector.
    """
    disabled, collecting = logging.root.manager.disable, gc.isenabled()
    known = len(sys.modules)
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        if collecting:
            gc.enable()
        if len(sys.modules) > known:
            gc.freeze()


def without_progress_bars() -> None:
    """Have diffusers and transformers log errors alone, and draw no bars while they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()  # prompts.py says it itself where a prompt is cut
        library.disable_progress_bar()
