"""Position messages from MQTT: `{"ts": s, "lat": deg, "lon": deg, "accuracy_m": m}`.

`ts` is the time of the fix in seconds since 1970 UTC, on the same clock as the readings' event time. `accuracy_m` is the radius of the
circle that the device is surely in; without it the position counts as exact, or as good as the setting `position.accuracy_m`.
"""

from __future__ import annotations

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.core.fix import Position

_TS_MAX = 7_258_118_400.0  # the year 2200


class _Message(msgspec.Struct, frozen=True):
    ts: float
    lat: float
    lon: float
    accuracy_m: float = 0.0


_decode = msgspec.json.Decoder(_Message).decode


def read_position(payload: bytes) -> Position:
    """The position in one message.

    Raises:
        ContractError: the payload is no position at a time from 1970 to 2200. The error names no place.
    """
    try:
        message = _decode(payload)
    except UNREADABLE as e:
        raise ContractError(f"position: {e}") from e
    if not 0 <= message.ts <= _TS_MAX:
        raise ContractError(f"position: ts {message.ts} is not between 0 and {_TS_MAX} seconds since 1970")
    return Position(round(message.ts * 1e6), message.lat, message.lon, message.accuracy_m, "mqtt")
