"""Why a reading is refused, in words for people that are never longer than a line or two."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.contract.errors import Reason

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
