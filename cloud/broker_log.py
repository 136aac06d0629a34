"""What a broker refused by itself, read from its log: it drops a forbidden publish without telling the cloud.

- NATS and Mosquitto are understood; other lines are passed over. Mosquitto names refused publishes only with `log_type debug`.
- The name in a line is the MQTT client id. Where the broker ties that to the user (`deploy/mosquitto`: certificate, user and client id
  are one) it is who tried; in the embedded NATS a client may call itself anything, so the name is only what it said.
- Topics are in a line as they came. A line ends at a line feed and nowhere else (a topic has none), and what it is about stands before
  anything that a device said: otherwise a topic could hold a line about another device.
- The place in the log is kept in a file, so what was refused while nobody read it is read later, and what was read and not yet written
  down elsewhere (`keep_place`) is read again; a log that was replaced is read from its start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE

READ_BYTES_MAX = 1024 * 1024  # in one go
NAME_CHARACTERS_MAX = 128

_BY_ITSELF = r"[^'\"(]*"  # what the broker itself writes before the first name or topic
_NATS_CLIENT = _BY_ITSELF + r'\[ERR\] (?P<address>\S+) - \w+:\d+ - "(?P<client>[^"]*)" - '
_NATS = re.compile(_NATS_CLIENT + r'(?P<what>Publish|Subscription) Violation - Subject "(?P<subject>[^"]*)"')
_NATS_LOGIN = re.compile(_NATS_CLIENT + r"authentication error")
_MOSQUITTO = re.compile(_BY_ITSELF + r"Denied PUBLISH from (?P<client>\S+) \(d\d, q\d, r\d, m\d+, '(?P<topic>.*)', \.\.\. \(\d+ bytes\)\)")


@dataclass(frozen=True)
class Denial:
    """Something that a broker refused. `client` is the MQTT client id, `topic` the MQTT topic or filter; empty for a login."""

    client: str
    action: str
    topic: str
    address: str = ""


def read_line(line: str) -> Denial | None:
    """The refusal in one line of a broker's log, if it holds one."""
    if found := _NATS.match(line):
        action = "publish" if found["what"] == "Publish" else "subscribe"
        return Denial(found["client"][:NAME_CHARACTERS_MAX], action, _topic(found["subject"]), found["address"])
    if found := _NATS_LOGIN.match(line):
        return Denial(found["client"][:NAME_CHARACTERS_MAX], "connect", "", found["address"])
    if found := _MOSQUITTO.match(line):
        return Denial(found["client"][:NAME_CHARACTERS_MAX], "publish", found["topic"])
    return None


def _topic(subject: str) -> str:
    """The MQTT topic of a NATS subject: levels are parted by dots, and a dot in a level is `//`."""
    levels = subject.replace("//", "\0").replace(".", "/").replace("\0", ".")
    return "/".join({"*": "+", ">": "#"}.get(level, level) for level in levels.split("/"))


class _Place(msgspec.Struct):
    """How far a log was read; `inode` tells a log from the one that replaced it."""

    inode: int = 0
    offset: int = 0


class BrokerLog:
    """The log at `path`; `place_file` remembers how far it was read."""

    def __init__(self, path: Path, place_file: Path) -> None:
        self._path, self._place_file = path, place_file
        self._place = self._kept = _read_place(place_file)

    def read(self) -> Iterator[Denial]:
        """What was refused since the last call, in the order of the log; at most READ_BYTES_MAX of the log in one call.

        It goes on from there when all of it was taken; the next reader does only after `keep_place`.
        """
        try:
            with self._path.open("rb") as log:
                place = self._start(log.fileno())
                log.seek(place.offset)
                data = log.read(READ_BYTES_MAX)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == READ_BYTES_MAX:  # one endless line: nothing in it is ours
            whole = len(data)
        for line in data[:whole].decode(errors="replace").split("\n"):
            denial = read_line(line)
            if denial is not None:
                yield denial
        self._place = _Place(place.inode, place.offset + whole)

    def keep_place(self) -> None:
        """Remember how far it was read: all of that is safe."""
        if self._place != self._kept:
            temporary = self._place_file.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.encode(self._place))
            temporary.replace(self._place_file)
            self._kept = self._place

    def _start(self, handle: int) -> _Place:
        status = os.fstat(handle)
        same = status.st_ino == self._place.inode and status.st_size >= self._place.offset
        return self._place if same else _Place(status.st_ino, 0)


def _read_place(path: Path) -> _Place:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Place)
    except (FileNotFoundError, *UNREADABLE):  # half written by hand, say: reading the log again writes some entries twice, and loses none
        return _Place()
