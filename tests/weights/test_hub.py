"""What is said while huggingface_hub works."""

import logging

import pytest

from weights.hub import hub_call

URL = "https://me:geheim@cdn.example/file?Signature=geheim&Expires=9"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (f"HTTP Error 429 thrown while requesting GET {URL}", ()),
        ('HTTP Request: %s %s "%s"', ("GET", URL, "HTTP/1.1 200 OK")),
        (f"Error while downloading from {URL}: timed out\nTrying to resume download...", ()),
    ],
)
@pytest.mark.parametrize("name", ["huggingface_hub.utils._http", "huggingface_hub.file_download"])
def test_urls_of_the_storage_are_logged_without_their_keys(caplog, name, message, arguments):
    """The library writes URLs into the message itself, or gives them as arguments."""
    with caplog.at_level(logging.INFO), hub_call("o/n", None):
        logging.getLogger(name).warning(message, *arguments)
    assert "https://cdn.example/file" in caplog.text
    assert "geheim" not in caplog.text
