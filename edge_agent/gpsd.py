"""Positions from gpsd, over its JSON protocol (gpsd_json(5)): one line, one object.

- gpsd greets with VERSION; `?WATCH={"enable":true,"json":true}` asks for reports. Of those, TPV (time, position, velocity) counts.
- A TPV with mode 2 (2D) or 3 (3D), a time, a latitude and a longitude is a position. Its accuracy is the largest of `eph`, of
  `epx` and `epy` taken together, and of `accuracy_m`, the least that the operator takes any fix for. Without an estimate and without an
  `accuracy_m` it is not believed: a circle of unknown size proves nothing.
- A thread of its own reads, and reconnects for ever with growing waits; a receiver that is silent for SILENCE_S is connected again.
  Positions wait for the data path in a queue of POSITIONS_MAX; when it is full the oldest go, counted.

    gpsd = Gpsd("127.0.0.1", 2947, accuracy_m=0.0)
    gpsd.start()
    gpsd.take()     # the positions since the last time
"""

from __future__ import annotations

import logging
import math
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError, UnavailableError
from edge_agent.core.fix import Position

log = logging.getLogger(__name__)

WATCH = b'?WATCH={"enable":true,"json":true};\n'
PROTOCOL_MAJOR = 3
POSITIONS_MAX = 1_024
LINE_BYTES_MAX = 64 * 1024  # SKY reports of many satellites are some 10 kB
CONNECT_S = 5.0
SILENCE_S = 60.0
POLL_S = 0.5
BACKOFF_S = (0.5, 30.0)


class _Report(msgspec.Struct, frozen=True):
    """The fields of gpsd's objects that matter here."""

    cls: str = msgspec.field(name="class", default="")
    proto_major: int = 0
    release: str = ""
    mode: int = 0
    time: str | None = None
    lat: float | None = None
    lon: float | None = None
    eph: float | None = None
    epx: float | None = None
    epy: float | None = None


_decode = msgspec.json.Decoder(_Report).decode


def read_report(line: bytes, accuracy_m: float) -> Position | None:
    """The position in one line of gpsd; None if it is none.

    Raises:
        ContractError: the line is not gpsd's protocol, or a fix without a time or an accuracy.
    """
    try:
        report = _decode(line)
    except UNREADABLE as e:
        raise ContractError(f"gpsd: {e}") from e
    if report.cls == "VERSION" and report.proto_major != PROTOCOL_MAJOR:
        raise ContractError(f"gpsd: protocol {report.proto_major} of release {report.release!r}; this version speaks {PROTOCOL_MAJOR}")
    if report.cls != "TPV" or report.mode < 2 or report.lat is None or report.lon is None:
        return None
    if report.time is None:
        raise ContractError("gpsd: a fix without a time")
    both = None if report.epx is None or report.epy is None else math.hypot(report.epx, report.epy)
    known = [radius for radius in (report.eph, both, accuracy_m or None) if radius is not None]
    if not known:
        raise ContractError("gpsd: a fix without eph, epx and epy; set position.accuracy_m to what this receiver is good for")
    return Position(_microseconds(report.time), report.lat, report.lon, max(known), "gpsd")


def _microseconds(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as e:
        raise ContractError(f"gpsd: time {text[:40]!r}: {e}") from e
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)


@dataclass(frozen=True)
class GpsdStatus:
    """`fixes`: positions read; `dropped`: of them, those that nobody took in time; `malformed`: lines that were not believed."""

    connected: bool = False
    error: str = ""
    connections: int = 0
    fixes: int = 0
    dropped: int = 0
    malformed: int = 0


class Gpsd:
    """Reads one gpsd, from `start` to `stop`."""

    def __init__(
        self, host: str, port: int, *, accuracy_m: float = 0.0, silence_s: float = SILENCE_S, rng: random.Random | None = None
    ) -> None:
        self._address, self._accuracy_m, self._silence_s = (host, port), accuracy_m, silence_s
        self._rng = rng or random.Random()
        self._positions: deque[Position] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpsd", daemon=True)
        self.status = GpsdStatus()
        self.failure: BaseException | None = None

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and when the thread has failed (see `failure`)."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a connection attempt under way is left behind after two seconds."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def take(self) -> list[Position]:
        """The positions since the last call, in the order in which they came."""
        return [self._positions.popleft() for _ in range(len(self._positions))]

    def _run(self) -> None:
        wait_s = BACKOFF_S[0]
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                try:
                    self._read_one_connection()
                except (OSError, UnavailableError) as e:
                    log.warning("gpsd lost address=%s:%s error=%s retry_s=%.1f", *self._address, e, wait_s)
                    self.status = replace(self.status, connected=False, error=str(e) or type(e).__name__)
                wait_s = BACKOFF_S[0] if time.monotonic() - started > BACKOFF_S[1] else wait_s
                self._stopping.wait(wait_s)
                wait_s = min(BACKOFF_S[1], self._rng.uniform(BACKOFF_S[0], 3 * wait_s))
        except Exception as e:
            self.failure = e
            log.exception("gpsd failed")
            raise

    def _read_one_connection(self) -> None:
        """Read until asked to stop.

        Raises:
            UnavailableError: gpsd has closed the connection, is silent, or does not speak its protocol.
        """
        with socket.create_connection(self._address, CONNECT_S) as connection:
            connection.settimeout(POLL_S)
            connection.sendall(WATCH)
            log.info("gpsd connected address=%s:%s", *self._address)
            self.status = replace(self.status, connected=True, error="", connections=self.status.connections + 1)
            for line in self._lines(connection):
                self._take_line(line)

    def _lines(self, connection: socket.socket) -> Iterator[bytes]:
        rest, heard = b"", time.monotonic()
        while not self._stopping.is_set():
            try:
                data = connection.recv(16 * 1024)
            except TimeoutError:
                if time.monotonic() - heard > self._silence_s:
                    raise UnavailableError(f"silent for {self._silence_s:g} s") from None
                continue
            if not data:
                raise UnavailableError("closed by gpsd")
            heard = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES_MAX:
                raise UnavailableError(f"a line of more than {LINE_BYTES_MAX} bytes")
            yield from (line for line in lines if line.strip())

    def _take_line(self, line: bytes) -> None:
        try:
            position = read_report(line, self._accuracy_m)
        except ContractError as e:
            log.debug("gpsd line refused error=%s", e)
            self.status = replace(self.status, malformed=self.status.malformed + 1, error=str(e))
            return
        if position is None:
            return
        if len(self._positions) >= POSITIONS_MAX:
            self._positions.popleft()
            self.status = replace(self.status, dropped=self.status.dropped + 1)
        self._positions.append(position)
        self.status = replace(self.status, fixes=self.status.fixes + 1)
