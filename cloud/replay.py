"""Replay: recorded rows as sensor messages.

- Rows go out in the file's order, at QoS 1, at most `window` of them unacknowledged. A lost connection is opened again and
  what was not acknowledged is sent again: the readings' identity makes copies harmless.
- An entity stays on one device. Several devices take the entities in turn, as they first appear.
- The replay plays the sensors, so it does not judge: a row that breaks the contract is sent as it is, for the device to refuse.
  Only the mapping must fit the file. A missing value is left out of its message.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from cloud.mapping import Chunk, ColumnMapping, count_rows, read_rows
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.stream import Compression, Encoding, FieldType, StreamContract
from edge_agent.contract.topics import check_name

WINDOW = 1_000
WINDOW_MAX = 16_000
CONNECT_TIMEOUT_S = 10.0
SILENCE_S_MAX = 60.0
PROGRESS_S = 0.1
KEEPALIVE_S = 30

_ENCODE: dict[Encoding, Callable[[Any], bytes]] = {
    Encoding.JSON: msgspec.json.encode,
    Encoding.MSGPACK: msgspec.msgpack.encode,
    Encoding.CBOR: cbor2.dumps,
}
_UNSENDABLE = (TypeError, ValueError, OverflowError, cbor2.CBOREncodeError)

Progress = Callable[[int, int], None]
"""Called with the rows acknowledged so far, and the rows in all."""


@dataclass(frozen=True)
class SensorBroker:
    """The broker that the gateways' sensors talk to."""

    host: str
    port: int
    username: str = ""
    password: str = ""


@dataclass(frozen=True)
class Replayed:
    """What a replay did. `entities` is device → its entities, in order of appearance."""

    rows: int
    acknowledged: int
    seconds: float
    entities: dict[str, list[str]]


@dataclass
class Assignment:
    """Which device an entity is on: the devices in turn, entities as they first appear."""

    devices: Sequence[str]
    _of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise ConfigError(f"devices {', '.join(self.devices) or '(none)'} must be at least one, each once")
        for device in self.devices:
            check_name(device, "device")

    def device(self, entity: str) -> str:
        return self._of.setdefault(entity, self.devices[len(self._of) % len(self.devices)])

    @property
    def entities(self) -> dict[str, list[str]]:
        return {d: [e for e, of in self._of.items() if of == d] for d in self.devices}


def replay(
    path: Path,
    mapping: ColumnMapping,
    contract: StreamContract,
    broker: SensorBroker,
    devices: Sequence[str],
    *,
    rows_per_s: float = 0.0,
    window: int = WINDOW,
    rows_max: int | None = None,
    progress: Progress = lambda acknowledged, total: None,
) -> Replayed:
    """Publish the rows of a file as sensor messages; returns when all are acknowledged.

    Args:
        rows_per_s: the speed; 0 is as fast as the broker acknowledges.
        rows_max: stop after that many rows.

    Raises:
        ConfigError: the file does not fit the mapping, or the broker refuses the password.
        UnavailableError: the broker does not answer, or acknowledges nothing for SILENCE_S_MAX.
    """
    if not 1 <= window <= WINDOW_MAX or not (rows_per_s >= 0 and math.isfinite(rows_per_s)):
        raise ConfigError(f"window {window} must be 1 to {WINDOW_MAX} rows, speed {rows_per_s} rows/s not negative")
    if rows_max is not None and rows_max < 0:
        raise ConfigError(f"limit {rows_max} rows must not be negative")
    assignment = Assignment(devices)
    total = min(count_rows(path, mapping), rows_max if rows_max is not None else 2**62)
    started = time.monotonic()
    rows = 0
    with Publisher(broker, window) as publisher:
        for topic, payload in messages(read_rows(path, mapping), mapping, contract, assignment):
            if rows == total:
                break
            if rows_per_s:
                _sleep_until(started + rows / rows_per_s)
            publisher.publish(topic, payload)
            rows += 1
            publisher.tell(progress, total)
        publisher.finish(progress, total)
    return Replayed(rows, publisher.acknowledged, time.monotonic() - started, assignment.entities)


def messages(
    chunks: Iterator[Chunk], mapping: ColumnMapping, contract: StreamContract, assignment: Assignment
) -> Iterator[tuple[str, bytes]]:
    """Topic and payload of every row."""
    if contract.encoding not in _ENCODE or contract.compression is not Compression.NONE or contract.shape.names:
        raise ConfigError(f"stream {contract.stream!r}: replay writes {', '.join(_ENCODE)}, uncompressed, to topics without named levels")
    encode = _ENCODE[contract.encoding]
    topics = {d: contract.topic.replace("{device}", d) for d in assignment.devices}
    names = list(mapping.fields)
    for chunk in chunks:
        columns = [_values(chunk, mapping.fields[name], contract.field(name).type) for name in names]
        for us, entity, *values in zip(chunk.event_us.tolist(), chunk.entity, *columns, strict=True):
            seconds = us / 1e6 if us % 1_000_000 else us // 1_000_000
            message: dict[str, Any] = {contract.event_time: seconds, contract.entity: entity}
            message.update((n, v) for n, v in zip(names, values, strict=True) if v is not None)
            try:
                payload = encode(message)
            except _UNSENDABLE as e:
                raise ConfigError(f"{_culprit(encode, message)}: {e}; {contract.encoding} has nothing for it") from e
            yield topics[assignment.device(entity)], payload


def _culprit(encode: Callable[[Any], bytes], message: dict[str, Any]) -> str:
    """The field that a message cannot hold, with its value."""
    for name, value in message.items():
        try:
            encode(value)
        except _UNSENDABLE:
            return f"field {name!r}, value {value!r}"
    return "a row"


def _values(chunk: Chunk, column: str, kind: FieldType) -> list[Any]:
    """A column as a sensor would send it: None is missing, whole numbers of an integer field have no point."""
    told = chunk.frame[column]
    values = [None if missing else v for v, missing in zip(told.tolist(), told.isna().tolist(), strict=True)]
    if kind is FieldType.TIMESTAMP and told.dtype.kind == "M":
        return [None if v is None else v.timestamp() for v in values]
    if kind is FieldType.INTEGER:
        return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    if kind is FieldType.STRING:
        return [None if v is None else str(v) for v in values]
    return values


def _sleep_until(when: float) -> None:
    left = when - time.monotonic()
    if left > 0:
        time.sleep(left)


class Publisher:
    """A connection to the sensor broker that keeps at most `window` messages unacknowledged. After `finish`, all are acknowledged."""

    def __init__(self, broker: SensorBroker, window: int) -> None:
        self.acknowledged = 0
        self._broker = broker
        self._window = window
        self._sent = 0
        self._told_s = 0.0
        self._free = threading.Semaphore(window)
        self._connected = threading.Event()
        self._refused = ""
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311, clean_session=True)
        self._client.max_inflight_messages_set(0)  # no limit there: with one, paho walks all open messages at each PUBACK
        self._client.reconnect_delay_set(1, 5)
        if broker.username:
            self._client.username_pw_set(broker.username, broker.password)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish

    def __enter__(self) -> Publisher:
        where = f"sensor broker {self._broker.host}:{self._broker.port}"
        try:
            self._client.connect(self._broker.host, self._broker.port, KEEPALIVE_S)
        except OSError as e:
            raise UnavailableError(f"{where} does not answer: {e}; start it with: fenceline up") from e
        self._client.loop_start()
        answered = self._connected.wait(CONNECT_TIMEOUT_S)
        if answered and not self._refused:
            return self
        self.__exit__()
        if self._refused:
            raise ConfigError(f"{where} refuses user {self._broker.username!r}: {self._refused}")
        raise UnavailableError(f"{where} does not answer to CONNECT within {CONNECT_TIMEOUT_S} s")

    def __exit__(self, *error: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes) -> None:
        """Send one message, waiting for a place in the window."""
        self._take_place()
        info = self._client.publish(topic, payload, qos=1)
        # Without a connection paho keeps the message and sends it on the next one.
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise UnavailableError(f"publish to {topic} failed: {mqtt.error_string(info.rc)}")
        self._sent += 1

    def tell(self, progress: Progress, total: int) -> None:
        """Report progress, but not for every row."""
        now = time.monotonic()
        if now - self._told_s >= PROGRESS_S:
            self._told_s = now
            progress(self.acknowledged, total)

    def finish(self, progress: Progress, total: int) -> None:
        """Wait until everything is acknowledged."""
        for _ in range(self._window):
            self._take_place()
            self.tell(progress, total)
        progress(self.acknowledged, total)

    def _take_place(self) -> None:
        if not self._free.acquire(timeout=SILENCE_S_MAX):
            open_ = self._sent - self.acknowledged
            raise UnavailableError(f"sensor broker acknowledged nothing for {SILENCE_S_MAX:g} s; {open_} of {self._sent} rows are open")

    def _on_connect(self, client: mqtt.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            self._refused = str(reason)
        self._connected.set()

    def _on_publish(self, client: mqtt.Client, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        self.acknowledged += 1
        self._free.release()
