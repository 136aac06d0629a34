"""Why a reading is refused, in words for people that are never longer than a line or two; and its payload, as quarantine keeps it.

A payload is kept as text. Where it is not UTF-8, it is `base64:` and its bytes; where personal fields were treated, `redacted:` and JSON
(`core.privacy`). A payload that itself begins with one of these is kept as `base64:`, so what stands there means one thing.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from edge_agent.contract.errors import Reason

BASE64, REDACTED = "base64:", "redacted:"
DETAIL_CHARACTERS_MAX = 300
_VALUE_CHARACTERS_MAX = 80


@dataclass(frozen=True, slots=True)
class Reject:
    """Why one reading was refused. `index` counts payloads (from `Decoder`) or table rows (from `validate`).

    `field`: the one whose value `detail` shows; empty: none in particular.
    """

    index: int
    reason: Reason
    detail: str
    field: str = ""


def reject(index: int, reason: Reason, detail: str, field: str = "") -> Reject:
    """A reject whose detail is valid, short text whatever the sensor sent."""
    return Reject(index, reason, detail.encode(errors="backslashreplace").decode()[:DETAIL_CHARACTERS_MAX], field)


def shown(text: str) -> str:
    """A value for people: cut if it is long."""
    return text if len(text) <= _VALUE_CHARACTERS_MAX else f"{text[:_VALUE_CHARACTERS_MAX]}… ({len(text)} characters)"


def to_text(payload: bytes, *, treated: bool = False) -> str:
    """A payload as quarantine keeps it; `treated`: `redacted:` is not the sensor's own word.

    >>> to_text(b"7"), to_text(bytes([255])), to_text(b"base64:7")
    ('7', 'base64:/w==', 'base64:YmFzZTY0Ojc=')
    """
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return _encoded(payload)
    return _encoded(payload) if text.startswith((BASE64, REDACTED)) and not treated else text


def from_text(text: str) -> bytes:
    """The inverse of `to_text`."""
    if not text.startswith(BASE64):
        return text.encode()
    try:
        return base64.b64decode(text[len(BASE64) :], validate=True)
    except ValueError:  # the sensor's own word: older agents kept it as it was
        return text.encode()


def _encoded(payload: bytes) -> str:
    return BASE64 + base64.b64encode(payload).decode()
