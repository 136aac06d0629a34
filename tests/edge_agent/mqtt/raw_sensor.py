"""A sensor of bare bytes, for what no good client would do."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from typing import Any

from edge_agent.mqtt import frames
from edge_agent.mqtt.wire import Version, sized, write_text

WAIT_S = 20.0


def connect_packet(client_id: str, version: Version = 4, keepalive_s: int = 30, clean: bool = True, **more: Any) -> bytes:
    return frames.connect(version, client_id, keepalive_s, clean=clean, **more)


def publish_packet(payload: bytes, packet_id: int | None = 1, version: Version = 4, topic: str = "sensors/a/t", qos: int = 1) -> bytes:
    """PUBLISH; without a packet id QoS 0."""
    head = 0x30 if packet_id is None else 0x30 | qos << 1
    identifier = b"" if packet_id is None else struct.pack(">H", packet_id)
    return bytes([head]) + sized(write_text(topic) + identifier + (b"\0" if version == 5 else b"") + payload)


class RawSensor:
    """A TCP (or TLS) connection to a listener."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        raw = socket.create_connection(("127.0.0.1", port), WAIT_S)
        self.socket = raw if tls is None else tls.wrap_socket(raw, server_hostname="127.0.0.1")
        self.socket.settimeout(WAIT_S)
        self._rest = b""

    def __enter__(self) -> RawSensor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def connect(self, client_id: str, version: Version = 4, **more: Any) -> RawSensor:
        """CONNECT, and see that it is accepted."""
        self.send(connect_packet(client_id, version, **more))
        answer = self.packet()
        assert answer[0] == 0x20 and answer[3 if len(answer) < 130 else 4] == 0, answer
        return self

    def publish(self, payload: bytes, packet_id: int | None = 1, version: Version = 4) -> None:
        self.send(publish_packet(payload, packet_id, version))

    def packet(self, timeout_s: float = WAIT_S) -> bytes:
        """The next packet, whole; empty when the other side has closed. At most 127 bytes long."""
        deadline = time.monotonic() + timeout_s
        while len(self._rest) < 2 or len(self._rest) < 2 + self._rest[1]:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self.socket.recv(65_536)
            except ConnectionResetError:
                more = b""
            if not more:
                return b""
            self._rest += more
        size = 2 + self._rest[1]
        packet, self._rest = self._rest[:size], self._rest[size:]
        return packet

    def acks(self, count: int) -> list[int]:
        """The packet ids of the next `count` PUBACKs."""
        ids = []
        for _ in range(count):
            packet = self.packet()
            assert packet[:2] == b"\x40\x02", packet
            ids.append(int.from_bytes(packet[2:]))
        return ids

    def is_silent(self, seconds: float = 0.2) -> bool:
        """Nothing comes in this time."""
        try:
            return self.packet(seconds) is None
        except TimeoutError:
            return True

    def close(self) -> None:
        self.socket.close()
