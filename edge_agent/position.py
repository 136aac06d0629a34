"""Position messages from MQTT: `{"ts": s, "lat": deg, "lon": deg, "accuracy_m": m}` become fixes for the track.

`ts` is the time of the fix in seconds since 1970 UTC, on the same clock as the readings' event time.
"""

from __future__ import annotations

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.core.zones import Fix, Zones

_TS_MAX = 7_258_118_400.0  # the year 2200


class _Position(msgspec.Struct, frozen=True):
    ts: float
    lat: float
    lon: float
    accuracy_m: float = 0.0


_decode = msgspec.json.Decoder(_Position).decode


def read_fix(payload: bytes, zones: Zones) -> Fix:
    """A fix from one position message.

    Raises:
        ContractError: the payload is not a position on Earth at a time from 1970 to 2200.
    """
    try:
        position = _decode(payload)
    except UNREADABLE as e:
        raise ContractError(f"position: {e}") from e
    if not 0 <= position.ts <= _TS_MAX:
        raise ContractError(f"position: ts {position.ts} is not between 0 and {_TS_MAX} seconds since 1970")
    return Fix(round(position.ts * 1e6), zones.locate(position.lat, position.lon, position.accuracy_m))
