"""The data path: one batch of sensor messages at a time, from the source to the disk, then to the uplink.

    intake (decode, check, place) → model (score) → seal (part by lane) → buffer (commit) → acknowledge → uplink

The order is the promise: a batch is committed to the buffer, and only then acknowledged to the sensors. While nothing can be
stored, the path waits here, so that the sensors' messages stay where they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.active_model import ActiveModel
from edge_agent.buffer import Buffer, Draft, StoredBlock
from edge_agent.clock import Clock
from edge_agent.contract.block import BLOCK_BYTES_MAX, ROWS_MAX, SCORE
from edge_agent.contract.columns import Ints, Strings, Table, take
from edge_agent.contract.stream import QUARANTINE
from edge_agent.core.fix import Position
from edge_agent.core.rejects import to_text
from edge_agent.fence import Fence
from edge_agent.intake import Intake, Intaken, Readings, Rejected
from edge_agent.metrics import Metrics
from edge_agent.mqtt.inlet import Batch
from edge_agent.node_state import NodeState
from edge_agent.storing import Storing
from edge_agent.uplink import Uplink

log = logging.getLogger(__name__)

LOCATE_S = 5.0
PART_BYTES_MAX = BLOCK_BYTES_MAX * 3 // 4  # and one row more, which may be as long as an MQTT packet

Tell = Callable[..., None]
"""Tells the operator: the name of an event, and its fields as text."""


@dataclass
class DataPath:
    """The path of one agent, used by one thread.

    `pause` waits a moment while the buffer takes nothing; what it raises ends the wait.
    `positions` gives those that did not come as messages since it was last asked. `payload_bytes` came in, `block_bytes` were made of them.
    """

    intake: Intake
    fence: Fence
    model: ActiveModel
    buffer: Buffer
    uplink: Uplink
    clock: Clock
    metrics: Metrics
    tell: Tell
    pause: Callable[[], None]
    positions: Callable[[], Sequence[Position]] = tuple
    _located_s: float = float("-inf")
    node_state: NodeState | None = None
    payload_bytes: int = 0
    block_bytes: int = 0

    def __post_init__(self) -> None:
        self.storing = Storing(self.buffer, self.clock, self.metrics, self.tell, self.pause)

    def process(self, batch: Batch) -> None:
        """Take one batch all the way; on return its messages are acknowledged."""
        started = time.perf_counter()
        self.refresh()
        synced = self.clock.now().synced
        taken = self.intake.take(batch.topics, batch.payloads, batch.received_us, synced=synced, positions=self.positions())
        drafts = [draft for readings in taken.readings for draft in self._seal(readings)]
        drafts += self._quarantine(taken.rejected, batch.received_us)
        stored = self.storing.append(drafts, taken.fixes)
        self._keep_nodes(taken)
        self.fence.remember()
        batch.release()
        self.uplink.offer([*stored, *self.storing.tidy()])
        self._count(batch, taken, stored, time.perf_counter() - started)

    def refresh(self) -> None:
        """Take a new model or policy, between two batches."""
        self.model.swap()
        self.fence.swap(lambda: [lane.lane for lane in self.buffer.lanes()])

    def idle(self) -> None:
        """While there are no batches: take a new model or policy, and now and then the positions."""
        self.refresh()
        self.uplink.offer(self.storing.tidy())
        if time.monotonic() - self._located_s >= LOCATE_S and (positions := self.positions()):
            self._located_s = time.monotonic()
            now = self.clock.now()
            self.storing.append([], self.intake.take([], [], now.wall_us, synced=now.synced, positions=positions).fixes)
            self.fence.remember()

    def _seal(self, readings: Readings) -> list[Draft]:
        """Score readings and part them by lane."""
        scores, model = self.model.score(readings)
        table = readings.table if scores is None else {**readings.table, SCORE: scores}
        contract, lanes = readings.contract, readings.lanes
        drafts = []
        for code, order in _parts(lanes, table):
            part = table if len(order) == len(lanes) else take(table, order)
            event_us = part[contract.event_time]
            assert isinstance(event_us, np.ndarray)
            drafts.append(
                Draft(
                    lane=lanes.values[code],
                    stream=contract.stream,
                    contract_version=contract.version,
                    fix=self.fence.track.quality(lanes.values[code], placed=code != 0),
                    policy=self.fence.policy,
                    table=part,
                    rows=len(order),
                    first_us=int(event_us.min()),
                    last_us=int(event_us.max()),
                    order=order,
                    model=model,
                    units=contract.units,
                )
            )
        return drafts

    def _keep_nodes(self, taken: Intaken) -> None:
        """Keep what Sparkplug nodes said, and say where messages of theirs are missing."""
        if taken.gaps:  # one line a batch: no node can fill the log
            log.warning("sparkplug sequence broken %s others=%d", taken.gaps[0], len(taken.gaps) - 1)
            self.metrics.gaps.inc(len(taken.gaps))
        if taken.nodes_heard and self.node_state is not None:
            self.node_state.save(self.intake.nodes)

    def _quarantine(self, rejected: list[Rejected], received_us: int) -> list[Draft]:
        for r in rejected:
            self.metrics.rejected.labels(r.reason.value).inc()
        if not rejected:
            return []
        lanes = Strings.of([r.lane for r in rejected])
        table: Table = {
            "captured_at": np.full(len(rejected), received_us, np.int64),
            "topic": Strings.of([r.topic for r in rejected]),
            "reason": Strings.of([r.reason.value for r in rejected]),
            "detail": Strings.of([r.detail for r in rejected]),
            "payload": Strings.of([to_text(r.payload, treated=r.treated) for r in rejected]),
        }
        return [
            self._quarantine_draft(lanes.values[code], take(table, rows), len(rows), received_us) for code, rows in _parts(lanes, table)
        ]

    def _quarantine_draft(self, lane: str, table: Table, rows: int, received_us: int) -> Draft:
        quality, stream, version = self.fence.track.quality(lane), QUARANTINE.stream, QUARANTINE.version
        return Draft(lane, stream, version, quality, self.fence.policy, table, rows, received_us, received_us)

    def _count(self, batch: Batch, taken: Intaken, stored: list[StoredBlock], seconds: float) -> None:
        for block in stored:
            self.metrics.readings.labels(block.stream).inc(block.rows)
            self.metrics.block_bytes.labels(block.stream).inc(len(block.block))
        self.metrics.messages.inc(len(batch))
        self.payload_bytes += sum(map(len, batch.payloads))
        self.block_bytes += sum(len(b.block) for b in stored)
        for stream, count in taken.redelivered.items():
            self.metrics.redelivered.labels(stream).inc(count)
        self.metrics.batch_seconds.observe(seconds)


def _parts(lanes: Strings, table: Table) -> Iterator[tuple[int, Ints]]:
    """The rows of each lane, in parts that fit a block even where nothing compresses: one message may give many readings, or long texts."""
    sizes = _row_bytes(table, len(lanes))
    for code in np.unique(lanes.codes).tolist():
        order = np.flatnonzero(lanes.codes == code)
        part = (np.cumsum(sizes[order]) - sizes[order]) // PART_BYTES_MAX
        yield from ((code, rows) for rows in np.split(order, np.flatnonzero(np.diff(part)) + 1))


def _row_bytes(table: Table, rows: int) -> Ints:
    """What each row takes in a block at most; so much at least that ROWS_MAX of them make a part."""
    sizes = np.full(rows, max(8 * (len(table) + 2), PART_BYTES_MAX // ROWS_MAX), np.int64)
    for column in table.values():
        if isinstance(column, Strings):
            sizes += np.fromiter(map(len, map(str.encode, column.values)), np.int64, len(column.values))[column.codes]
    return sizes
