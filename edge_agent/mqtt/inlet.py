"""The hand-over from the sensor sides to the data path: any number of sides put batches in, one consumer takes them out.

- A side collects messages in an `OpenBatch` and hands it over when it is full, or when its first message is `ms` old and the
  consumer has nothing else to do; a batch that has FAST_ROWS by then goes on while messages come, up to FAST_TIMES as long: low latency
  when quiet, large batches under load.
- Back-pressure: while `batches_max` batches wait there is no `room`; a side whose open batch is full then reads no socket.
- A batch carries its own acknowledgement: `release`, once, from any thread, without blocking.
- A side that dies of a defect says so (`fail`), or the consumer would wait for ever, or go on deaf with the other sides. What waits
  then is not taken any more: it is not acknowledged, so it comes again.
- Memory: at most (batches_max + 2 per side) * (bytes_max + one packet).
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.contract.errors import ConfigError

FAST_ROWS = 256
FAST_TIMES = 4
PAUSE = 0.25
"""Of `ms`: after so long without a message nothing more is expected, as the sender's window may be full. A batch is some milliseconds of
work however few rows it has, so at tens of thousands of readings a second larger ones halve the processor time of a reading."""


class Batch:
    """Messages handled together: message i is `payloads[i]` on `topics[i]`. `received_us`: wall clock of the last of them."""

    __slots__ = ("_release", "payloads", "received_us", "topics")

    def __init__(self, topics: list[str], payloads: list[bytes], received_us: int, release: Callable[[], None] | None) -> None:
        self.topics = topics
        self.payloads = payloads
        self.received_us = received_us
        self._release = release

    def __len__(self) -> int:
        return len(self.payloads)

    def release(self) -> None:
        """Acknowledge all messages to who sent them: they are safe now. Never blocks; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


@dataclass(frozen=True)
class BatchLimits:
    """When an open batch is handed over: at so many rows or bytes, or `ms` after its first message (FAST_TIMES that while many come)."""

    rows_max: int = 4_096
    bytes_max: int = 4 * 1024 * 1024
    ms: float = 10.0

    def __post_init__(self) -> None:
        if self.rows_max < 1 or self.bytes_max < 1 or self.ms < 0:
            raise ConfigError(f"batches: want rows_max {self.rows_max} >= 1, bytes_max {self.bytes_max} >= 1, ms {self.ms} >= 0")


class OpenBatch:
    """Messages that wait for more of them; used by the thread of one side."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self.topics: list[str] = []
        self.payloads: list[bytes] = []
        self.received_us = 0
        self._bytes = 0
        self._opened = self._added = 0.0

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def room(self) -> int:
        """How many messages may come yet; 0 when full."""
        return 0 if self._bytes >= self._limits.bytes_max else max(0, self._limits.rows_max - len(self.payloads))

    def add(self, topics: list[str], payloads: list[bytes], size: int) -> None:
        """Append messages of so many bytes together, received now."""
        self._added = time.monotonic()
        if not self.payloads:
            self._opened = self._added
        self.received_us = time.time_ns() // 1_000
        self.topics += topics
        self.payloads += payloads
        self._bytes += size

    def due_s(self, now: float) -> float:
        """Seconds until it is old enough; infinite while it is empty."""
        if not self.payloads:
            return float("inf")
        wait_s = self._limits.ms / 1_000
        due = self._opened + wait_s
        if len(self.payloads) >= FAST_ROWS:
            due = min(max(due, self._added + PAUSE * wait_s), self._opened + FAST_TIMES * wait_s)
        return due - now

    def ready(self, hungry: bool) -> bool:
        """Whether it is to be handed over now."""
        return bool(self.payloads) and (not self.room or (hungry and self.due_s(time.monotonic()) <= 0))


class Inlet:
    """A bounded queue of batches. One consumer calls `get`; everything else is for the sides."""

    def __init__(self, limits: BatchLimits | None = None, batches_max: int = 4) -> None:
        if batches_max < 1:
            raise ConfigError(f"batches: queue_batches_max {batches_max} is too small")
        self.limits = limits or BatchLimits()
        self._batches_max = batches_max
        self._waiting: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._wakes: list[Callable[[], None]] = []
        self._failure: BaseException | None = None

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called whenever there is room for another batch."""
        self._wakes.append(wake)

    @property
    def waiting(self) -> int:
        """Batches handed over and not taken."""
        return len(self._waiting)

    @property
    def hungry(self) -> bool:
        """The consumer has nothing else to take."""
        return not self._waiting

    @property
    def room(self) -> bool:
        """Another batch may be put in. With several sides there can be one batch too many per further side."""
        return len(self._waiting) < self._batches_max

    def put(self, batch: Batch) -> None:
        """Hand over a batch."""
        with self._changed:
            self._waiting.append(batch)
            self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """A side's thread has died."""
        with self._changed:
            self._failure = error
            self._changed.notify()

    def get(self, timeout_s: float) -> Batch | None:
        """The next batch, or None if there is none in time.

        Raises:
            RuntimeError: a side's thread has died of a defect.
        """
        with self._changed:
            if not self._waiting and self._failure is None:
                self._changed.wait(timeout_s)
            if self._failure is not None:
                raise RuntimeError(f"sensor side died: {self._failure!r}") from self._failure
            batch = self._waiting.popleft() if self._waiting else None
        if batch is not None:
            for wake in self._wakes:
                wake()
        return batch


class Wake:
    """Wakes a thread that waits in `poll`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._lock = threading.Lock()
        self._set = False

    def fileno(self) -> int:
        """To wait on, for reading."""
        return self._reader.fileno()

    def set(self) -> None:
        """Wake it; from any thread, without blocking."""
        with self._lock:
            if not self._set and self._writer.fileno() >= 0:
                self._set = True
                self._writer.send(b"\0")

    def clear(self) -> None:
        """It is awake."""
        with self._lock:
            if self._set:
                self._set = False
                self._reader.recv(16)

    def close(self) -> None:
        """No more waking."""
        with self._lock:
            self._reader.close()
            self._writer.close()
