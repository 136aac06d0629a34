"""Which filters the sensors' brokers may hold for us. A session outlives its agent, and so do its subscriptions.

A filter that agent.toml names no longer would deliver for ever, and what it delivers would fill the quarantine. So each filter is noted
in a small file before a broker is asked for it, and struck out when the broker has let it go.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE
from edge_agent.whole_file import replace_whole

log = logging.getLogger(__name__)

_decode = msgspec.json.Decoder(dict[str, list[str]]).decode


class Subscriptions:
    """The file at `path`, for all sides of the sensors. One that cannot be read or written only means that old filters stay.

    Without a path nothing is noted: for who reads a broker once, and has no session before or after.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def held(self, session: str) -> list[str]:
        """The filters that this session may have at its broker."""
        with self._lock:
            return self._read().get(session, [])

    def note(self, session: str, filters: list[str]) -> None:
        """These are the filters that this session may have from now on."""
        with self._lock:
            known = self._read()
            if self._path is None or known.get(session) == filters:
                return
            try:
                replace_whole(self._path, msgspec.json.encode({**known, session: filters}))
            except OSError as e:
                log.warning("subscriptions not noted path=%s error=%s", self._path, e)

    def _read(self) -> dict[str, list[str]]:
        if self._path is None:
            return {}
        try:
            return _decode(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, *UNREADABLE) as e:
            log.warning("subscriptions unreadable path=%s error=%s", self._path, e)
            return {}
