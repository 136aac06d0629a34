"""What Sparkplug births said, kept in a file: after a restart of the agent, nodes need not be born again to be understood.

- `save` comes after a batch is stored and before it is acknowledged: what was counted is at most what is on disk.
- Births change seldom and are written whole, to a new file; the numbers of the last messages change with every batch and are
  written in place behind them. Neither is synced: it holds over a crash of the agent, not over a power cut. A file that is damaged,
  or older than the nodes' last messages, only means that they wait for their next birth.

Layout, little endian: u32 length and u32 CRC of the births, the births; then the same of the counters, whose CRC begins with that
of the births.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import msgspec

from edge_agent.core import sparkplug_nodes
from edge_agent.core.sparkplug_nodes import Nodes

log = logging.getLogger(__name__)


class NodeState:
    """The file. `load` once, then `save` after each batch that heard Sparkplug."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._revision = -1
        self._crc = self._end = 0

    def load(self) -> Nodes:
        """The nodes as saved; none if there is no file, or none that can be read."""
        try:
            data = self._path.read_bytes()
            births, crc, rest = _part(data, 0)
            counters, _, _ = _part(rest, crc)
            return sparkplug_nodes.restore(births, counters)
        except FileNotFoundError:
            return Nodes()
        except (OSError, ValueError, msgspec.MsgspecError) as e:
            log.warning("sparkplug births unreadable path=%s error=%s", self._path, e)
            return Nodes()

    def save(self, nodes: Nodes) -> None:
        """Keep what the nodes said; a failing disk is told and costs nothing but a wait for births after a restart."""
        try:
            if nodes.revision != self._revision:
                self._write_births(nodes)
            else:
                with self._path.open("r+b") as file:
                    file.seek(self._end)
                    file.write(_framed(sparkplug_nodes.counters(nodes), self._crc))
        except OSError as e:
            self._revision = -1
            log.warning("sparkplug births not saved path=%s error=%s", self._path, e)

    def _write_births(self, nodes: Nodes) -> None:
        births = _framed(sparkplug_nodes.births(nodes), 0)
        self._crc, self._end = int.from_bytes(births[4:8], "little"), len(births)
        fresh = self._path.with_name(f"{self._path.name}.new")
        with fresh.open("wb") as file:
            file.write(births + _framed(sparkplug_nodes.counters(nodes), self._crc))
        fresh.replace(self._path)
        self._revision = nodes.revision


def _framed(part: bytes, seed: int) -> bytes:
    return len(part).to_bytes(4, "little") + zlib.crc32(part, seed).to_bytes(4, "little") + part


def _part(data: bytes, seed: int) -> tuple[bytes, int, bytes]:
    """A part, its CRC and what follows it."""
    end = 8 + int.from_bytes(data[:4], "little")
    part, crc = data[8:end], int.from_bytes(data[4:8], "little")
    if len(data) < end or zlib.crc32(part, seed) != crc:
        raise ValueError("the file is damaged")
    return part, crc, data[end:]
