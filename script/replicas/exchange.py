"""What the front sends to a replica: a request for a prediction, and what was read in it."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from lora.sources import parse_reference
from weights.serving.errors import ReferenceFormatError

HOP_BY_HOP = {"connection", "content-length", "date", "expect", "host", "transfer-encoding"}


@dataclass(frozen=True)
class Call:
    """A request for a prediction.

    request: the method, path, headers and content that are sent to Cog's server.
    identifier: of the prediction. inputs: as the caller sent them. webhook: where its end is told.
    adapters: what the weights must contain; empty for none, or where a reference cannot be read.
    ticket: tells this call from others, also from those for a prediction of the same id.
    """

    request: tuple[str, str, dict[str, str], bytes]
    identifier: str
    asynchronous: bool
    inputs: Any
    webhook: str
    adapters: str
    ticket: str = field(default_factory=lambda: secrets.token_hex(8))


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are not about one connection alone."""
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}


def read_call(method: str, path: str, headers: Mapping[str, str], content: bytes) -> Call:
    """Read a request to /predictions or /predictions/ID.

    A prediction without an id gets one here, so that it can be cancelled while it waits. A
    synchronous one without a seed gets a seed, so that a second try generates the same picture.
    What is no JSON object is passed on as it is; Cog's server says what is wrong with it.
    """
    asynchronous = headers.get("prefer", "").strip() == "respond-async"  # as Cog's server compares
    try:
        sent = from_json(content, allow_inf_nan=False)
    except ValueError:
        sent = None
    body = sent if isinstance(sent, dict) else {}
    inputs, adapters = body.get("input"), ""
    if isinstance(inputs, dict):
        adapters = adapters_of(inputs)
        seed = inputs.get("seed", -1)
        if not asynchronous and isinstance(seed, int | float) and seed < 0 and seed % 1 == 0:
            body["input"] = {**inputs, "seed": secrets.randbits(32)}
    named = path.split("/")[2:]
    if not named and body.get("id") is None:
        body["id"] = f"pred_{secrets.token_hex(8)}"
    identifier = named[0] if named else body["id"]
    events = body.get("webhook_events_filter")
    told = not isinstance(events, list) or "completed" in events
    content = content if sent is not body else json.dumps(body).encode()
    return Call(
        request=(method, path, end_to_end(headers), content),
        identifier=str(identifier),
        asynchronous=asynchronous,
        inputs=inputs,
        webhook=str(body.get("webhook") or "") if told else "",
        adapters=adapters,
    )


def adapters_of(inputs: Mapping[str, Any]) -> str:
    """An identifier of the set of adapters that inputs name, however their links are spelt.

    It is a hash: links may hold secrets, and Ray writes the identifier to its logs. Empty if there
    is no adapter, and if a reference cannot be read, for which any replica has the message.
    """
    names = "replicate_weights", "extra_lora"
    main, extra = (str(inputs.get(name) or "").strip() for name in names)
    texts = {main or os.environ.get("COG_WEIGHTS", ""), extra} - {""}
    try:
        keys = {parse_reference(text, allow_local_paths=True).key for text in texts}
    except ReferenceFormatError:
        return ""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16] if keys else ""
