"""Importing the large libraries: what it changes in the process is as before in the end."""

import gc
import logging
import weakref

import pytest

from weights.serving.quiet import importing_libraries


@pytest.mark.parametrize("collecting", [True, False])
def test_the_log_and_the_collector_are_as_before(caplog, collecting: bool) -> None:
    was = gc.isenabled()
    (gc.enable if collecting else gc.disable)()

    def fail() -> None:
        with importing_libraries():
            logging.getLogger("a library").warning("an optional package is not there")
            assert not gc.isenabled()
            raise ImportError

    try:
        with pytest.raises(ImportError):
            fail()
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was else gc.disable)()
    logging.getLogger("a library").warning("a step failed")
    assert caplog.messages == ["a step failed"]


def test_without_imports_later_garbage_is_still_collected() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself = self

    garbage = weakref.ref(Loop())
    with importing_libraries():
        pass
    gc.collect()
    assert garbage() is None
