"""Cuts the bytes of one MQTT connection into publishes, in bulk, and into control packets. No I/O.

- Publishes are cut from a large piece of the byte stream, as parallel lists; their PUBACKs come ready made.
- However the stream is cut into pieces, the same packets come out, up to the same error: what came before a bad packet is given
  out first, and the next `feed` raises. After that the cutter is of no more use.
- QoS 2 and topic aliases are refused: both sides of Fenceline say that they do not have them.
- Memory held: at most one piece, one packet and their copies.

The two directions differ in their control packets only: `frames.Decoder` reads a server, `server_frames.Decoder` a client.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import repeat
from typing import Generic, TypeVar

from edge_agent.contract.errors import ContractError
from edge_agent.mqtt import wire
from edge_agent.mqtt.wire import PUBLISH, FrameError, Version, malformed

PACKET_BYTES_MAX = 1024 * 1024
TOPICS_KNOWN_BYTES_MAX = 1024 * 1024
PROPERTIES_KNOWN_MAX = 256
ENTRY_BYTES = 150  # what a known topic costs beside its bytes and its text
PIECES_MAX = 256
_PUBACK = b"\x40\x02"

P = TypeVar("P")


@dataclass
class Frames(Generic[P]):
    """What one piece of the stream held: publish i is `topics[i]`, `payloads[i]`; `acks` are the PUBACKs of those with QoS 1, in order.

    `more`: whole packets, or an error, may be left over; feed `b""` to get them. `size`: the bytes that all of it took on the way here.
    """

    topics: list[str] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    acks: bytes = b""
    packets: list[P] = field(default_factory=list)
    more: bool = False
    size: int = field(default=0, compare=False)

    def extend(self, later: Frames[P]) -> None:
        """Append what came after."""
        self.topics += later.topics
        self.payloads += later.payloads
        self.acks += later.acks
        self.packets += later.packets
        self.more = later.more


class Cutter(Generic[P]):
    """One direction of one connection. Subclasses say which control packets may come (`_control`)."""

    _FIRST: int
    _PUBLISH_PROPERTIES: Collection[int]
    _TOPICS_KNOWN_BYTES_MAX = TOPICS_KNOWN_BYTES_MAX

    def __init__(self, version: Version, packet_bytes_max: int) -> None:
        self._version: Version = version
        self._packet_bytes_max = packet_bytes_max
        self._pieces: list[bytes] = []
        self._held = 0  # bytes in `_pieces`
        self._need = 2  # bytes from which on a look at `_pieces` is worth it
        self._skip = 0  # bytes left of a publish that was cut
        self._connected = False
        self._error: ContractError | None = None
        self._topics_known: dict[bytes, str] = {}
        self._topics_bytes = 0
        self._properties_known: set[bytes] = set()

    @property
    def held(self) -> int:
        """Bytes kept because their packet is not whole yet, or was not asked for."""
        return self._held

    def discard(self) -> None:
        """Let go of what is held; the cutter is of no more use."""
        self._pieces, self._held = [], 0

    def feed(self, data: bytes, packets_max: int = 65_536) -> Frames[P]:
        """Take the next piece of the stream; gives at most `packets_max` packets.

        Raises:
            ContractError: a packet is malformed or not for this side.
        """
        if self._error is not None:
            raise self._error
        if self._skip and data:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if data:
            self._pieces.append(data)
            self._held += len(data)
            if len(self._pieces) > PIECES_MAX:  # a piece of few bytes costs many times those
                self._pieces = [b"".join(self._pieces)]
        if self._held < self._need:
            return Frames()
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        connected, frames = self._connected, Frames[P]()
        try:
            done = self._scan(whole, 0, packets_max, frames)
        except ContractError:
            self._connected = connected
            return self._before_the_error(whole, packets_max)
        frames.size, rest = done, whole[done:]
        self._pieces, self._held = [rest] if rest else [], len(rest)
        return frames

    def _before_the_error(self, data: bytes, packets_max: int) -> Frames[P]:
        """The packets of `data` up to the bad one, which is kept for the next call."""
        frames, at = Frames[P](), 0
        self._pieces, self._held, self._skip = [], 0, 0
        for _ in repeat(None, packets_max):
            step = Frames[P]()
            try:
                at = self._scan(data, at, 1, step)
            except ContractError as e:
                if not (frames.topics or frames.packets):
                    raise
                self._error, frames.more = e, True
                break
            frames.extend(step)
        frames.size = at
        return frames

    def _control(self, head: int, body: bytes, frames: Frames[P]) -> bool:
        """Take a packet that is no publish of QoS 0 or 1; True if nothing after it may be read yet."""
        raise NotImplementedError

    def _scan(self, data: bytes, at: int, packets_max: int, frames: Frames[P]) -> int:
        """Fill `frames`; returns where the first packet begins that was not taken. Written for speed: one pass, few calls."""
        topics, payloads, ids = list[bytes](), frames.payloads, list[bytes]()
        size_max, five = self._packet_bytes_max, self._version == 5
        end = len(data)
        for _ in repeat(None, packets_max):
            start = at + 2
            if start > end:
                self._need = 2
                break
            head, size = data[at], data[at + 1]
            if size > 127:
                if start == end:
                    self._need = 3
                    break
                size += (data[start] - 1) << 7
                if data[start] > 127:
                    size, start = _long_length(data, at + 1)
                    if start == 0:
                        self._need = end - at + 1
                        break
                else:
                    start += 1
            stop = start + size
            if size > size_max:  # rare: take its beginning, skip the rest
                cut = self._cut(data, at, head, start)
                if cut is None:
                    break
                topic, id_, payload = cut
                topics.append(topic)
                payloads.append(payload)
                if id_:
                    ids.append(id_)
                at = min(stop, end)
                self._skip = stop - at
                continue
            if stop > end:
                if not self._connected and head >> 4 != self._FIRST:  # not to wait for the rest of what is not MQTT
                    raise FrameError(f"stream begins {data[at : at + 16]!r}, not with {wire.TYPE_NAMES[self._FIRST]}")
                self._need = stop - at
                break
            if head & 0xF6 == 0x32:  # PUBLISH, QoS 1, DUP and RETAIN or not
                if size < 5:
                    raise malformed(PUBLISH, f"{size} bytes long")
                name = start + 2
                name_end = name + (data[start] << 8 | data[start + 1])
                body = name_end + 2
                if body > stop:
                    raise malformed(PUBLISH, f"topic of {name_end - name} bytes in a packet of {size}")
                ids.append(data[name_end:body])
            elif head & 0xFE == 0x30:  # QoS 0, RETAIN or not
                if size < 3:
                    raise malformed(PUBLISH, f"{size} bytes long")
                name = start + 2
                name_end = body = name + (data[start] << 8 | data[start + 1])
                if body > stop:
                    raise malformed(PUBLISH, f"topic of {name_end - name} bytes in a packet of {size}")
            else:
                at = stop
                if self._checked(head, data[start:stop], frames):
                    frames.more = at < end
                    self._need = 0
                    break
                continue
            if five:
                if body == stop:
                    raise malformed(PUBLISH, "no property length")
                body = self._publish_properties(data, body, stop) if data[body] else body + 1
            topics.append(data[name:name_end])
            payloads.append(data[body:stop])
            at = stop
        else:
            frames.more = at < end
            self._need = 0
        frames.topics = self._topics(topics)
        if b"\0\0" in ids:
            raise malformed(PUBLISH, "packet id 0", wire.PROTOCOL_ERROR)
        if ids:
            frames.acks = _PUBACK + _PUBACK.join(ids)
        return at

    def _checked(self, head: int, body: bytes, frames: Frames[P]) -> bool:
        """What holds for control packets of both directions, then `_control`."""
        kind = head >> 4
        if kind == PUBLISH:
            if head & 0x06 == 0x04:
                raise FrameError("a message with QoS 2, which is not taken here; QoS 0 and 1 are", wire.QOS_NOT_SUPPORTED)
            raise malformed(kind, f"flags {head & 15:#x} (QoS 3 and DUP with QoS 0 do not exist)")
        if self._connected == (kind == self._FIRST):
            raise FrameError(f"{wire.TYPE_NAMES[kind]} {'twice' if self._connected else f'before {wire.TYPE_NAMES[self._FIRST]}'}")
        if frames.payloads and not self._connected:
            raise FrameError(f"PUBLISH before {wire.TYPE_NAMES[self._FIRST]}")
        if len(body) > wire.CONTROL_BYTES_MAX:
            raise malformed(kind, f"{len(body)} bytes; at most {wire.CONTROL_BYTES_MAX}", wire.TOO_LARGE)
        stop = self._control(head, body, frames)
        self._connected = True
        return stop

    def _topics(self, topics: list[bytes]) -> list[str]:
        """As text, checked once per distinct topic; equal topics are one object."""
        if topics and not self._connected:
            raise FrameError(f"PUBLISH before {wire.TYPE_NAMES[self._FIRST]}")
        known = self._topics_known
        new = {topic: _topic(topic, self._version) for topic in set(topics).difference(known)}
        known.update(new)
        texts = list(map(known.__getitem__, topics))
        self._topics_bytes += sum(len(topic) + sys.getsizeof(text) + ENTRY_BYTES for topic, text in new.items())
        if self._topics_bytes > self._TOPICS_KNOWN_BYTES_MAX:
            known.clear()
            self._topics_bytes = 0
        return texts

    def _publish_properties(self, data: bytes, at: int, stop: int) -> int:
        """Check the properties that begin at `at`; returns where the payload begins."""
        size, start = wire.read_length(data, at, stop)
        end = start + size
        if end > stop:
            raise malformed(PUBLISH, f"properties of {size} bytes reach past the packet")
        raw = data[start:end]
        if raw not in self._properties_known:
            wire.read_properties(raw, PUBLISH, self._PUBLISH_PROPERTIES)
            if len(self._properties_known) >= PROPERTIES_KNOWN_MAX:
                self._properties_known.clear()
            if size <= 256:
                self._properties_known.add(raw)
        return end

    def _cut(self, data: bytes, at: int, head: int, start: int) -> tuple[bytes, bytes, bytes] | None:
        """Topic, packet id and the beginning of the payload of a publish that is too large; None if more bytes are needed."""
        if head & 0xF6 != 0x32 and head & 0xFE != 0x30:
            raise malformed(head >> 4, f"larger than {self._packet_bytes_max} bytes", wire.TOO_LARGE)
        stop = start + self._packet_bytes_max
        if stop > len(data):
            self._need = stop - at
            return None
        name_end = start + 2 + int.from_bytes(data[start : start + 2])
        body = name_end + (2 if head & 0x02 else 0)
        if body > stop:
            raise malformed(PUBLISH, f"topic reaches past the first {self._packet_bytes_max} bytes")
        payload = b""
        if self._version == 4:
            payload = data[body:stop]
        else:
            size, properties = wire.read_length(data, body, stop)
            if properties + size <= stop:  # or the properties alone are too large: then nothing of the payload is in reach
                payload = data[self._publish_properties(data, body, stop) : stop]
        return data[start + 2 : name_end], data[name_end:body], payload


def _topic(topic: bytes, version: Version) -> str:
    if not topic:
        alias = " (a topic alias, which was not offered)" if version == 5 else ""
        raise malformed(PUBLISH, f"empty topic{alias}", wire.PROTOCOL_ERROR)
    if b"+" in topic or b"#" in topic:
        raise malformed(PUBLISH, f"wildcard in topic {topic[:64]!r}", wire.TOPIC_INVALID)
    return wire.decode_text(topic, PUBLISH)


def _long_length(data: bytes, at: int) -> tuple[int, int]:
    """The remaining length at `at` and where it ends; (0, 0) if bytes are still missing."""
    if len(data) < at + 4 and all(byte > 127 for byte in data[at:]):
        return 0, 0
    return wire.read_length(data, at, len(data))
