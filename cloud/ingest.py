"""Ingest: blocks from a region's broker into the lake. `fenceline ingest --region eu`.

- The order is the promise: check, commit to the lake, send receipts, then PUBACK. Whatever stops in between is sent again, by the
  broker or by the device, and stored once. A receipt may wait for the next one to the same device, and then comes after the PUBACK: that
  too costs one more sending at most.
- While one batch is committed the next is collected and checked. So a batch is what came during the commit before it: one block when it
  is quiet, `batch_blocks_max` under load. Its size is what it takes in memory: a few bytes on the wire may unpack to many. Headers are
  checked as they come, columns many at once (`cloud.stacks`).
- What the gate refuses is counted, written to the audit trail, raised as an alarm on the device's events topic, and acknowledged to
  the broker without a receipt: the device keeps it.
- Rows that break their contract go to the lake's quarantine, the rest of their block to its stream (`cloud.quarantine`); that too is told.
- What the broker refused by itself (a topic that is not the device's, or not of this region's zones) is read from its log, and is
  written down and raised in the same way.
- A zone policy that was published is taken between two blocks.
- While the lake cannot commit, nothing is acknowledged and nothing is lost. While the metadata database is away, blocks are stored all
  the same; see `cloud.refusals`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
import zstandard

from cloud import brokers, config
from cloud.audit import DETAIL_CHARACTERS_MAX, Audit
from cloud.broker_log import BrokerLog, Denial
from cloud.config import IngestLimits, Region, Settings
from cloud.gate import Gate, PolicyWatch, Refusal, Sealed, load_contracts, load_zones
from cloud.ingest_status import Status, status_path, write_status
from cloud.intake import Intake, Received
from cloud.lake import Lake, Settled
from cloud.quarantine import CheckedLake
from cloud.receipts import Receipts
from cloud.refusals import DENIED, QUARANTINED, REFUSED, Entry, Kind, Refusals
from cloud.stacks import Stack
from cloud.workers import NAME, ONE, Worker, end_unused
from edge_agent.contract.block import RAW_BYTES_MAX
from edge_agent.contract.errors import ContractError, Reason, UnavailableError
from edge_agent.contract.receipt import Receipt, encode_receipt
from edge_agent.contract.topics import DeviceTopics, check_name, parse
from edge_agent.core.zones import Zones

log = logging.getLogger(__name__)

RETRY_S = (0.1, 5.0)  # the first and the longest wait while the lake is away
IDLE_S = 0.25
STATUS_S = 0.5
UNSEAL_BLOCKS = 256
"""Decoded at once; more of them are not faster."""
UPKEEP_S = 60.0  # the longest time without upkeep under load


@dataclass
class Batch:
    """Messages that are acknowledged together, and their blocks, which the gate let pass: still sealed, or as stacks."""

    messages: list[Received] = field(default_factory=list)
    sealed: list[Sealed] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    size_bytes: int = 0
    rows: int = 0
    began: float = 0.0

    def add(self, message: Received, block: Sealed, now: float) -> None:
        self.began = self.began if self.messages else now
        self.messages.append(message)
        self.sealed.append(block)
        self.size_bytes += len(message.payload) + _unpacked_bytes(block)
        self.rows += block.header.rows


@dataclass
class Ingest:
    """The loop of one worker. The lake is used by one thread of its own, so that the next batch is collected meanwhile."""

    gate: Gate
    lake: CheckedLake
    intake: Intake
    audit: Audit
    limits: IngestLimits
    status_file: Path
    small_files_max: int
    vacuum_hours: int
    broker_log: BrokerLog | None = None
    policy: Callable[[], Zones | None] = lambda: None
    stop: bool = False
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        self.status = Status(self.gate.region, os.getpid())
        self._refusals = Refusals(self.audit, self.gate.region, self._raise_alarm)
        self._receipts = Receipts(self._send_receipt, self.limits.receipt_interval_ms / 1_000)
        self._lake_thread = ThreadPoolExecutor(1, "lake")
        self._work: Future[Settled | None] | None = None  # of the lake's thread: a commit, or upkeep
        self._next, self._committing = Batch(), Batch()
        self._retry_s, self._retry_due = RETRY_S[0], 0.0
        self._status_due = self._look_due = 0.0
        self._upkept_at = time.monotonic()

    def run(self) -> None:
        """Work until `stop`."""
        try:
            while not self.stop:
                self._collect()
                self._finish(time.monotonic())
                self._begin(time.monotonic())
                self._receipts.send(time.monotonic())
                self._look_around(time.monotonic())
            if self._work is not None:
                self._finish(time.monotonic(), last=True)
        finally:
            self._lake_thread.shutdown()
            self._receipts.send(float("inf"))
            self._refusals.close()

    # Batches

    def _collect(self) -> None:
        """Take messages into the next batch until there is something else to do, for IDLE_S at most: what is refused never fills it."""
        until = time.monotonic() + IDLE_S
        while not self._full and not self.stop:
            if (now := time.monotonic()) >= until:
                return
            message = self._message(self._wait_s(now))
            if message is None:
                return
            found = self.gate.admit(message.topic, message.payload)
            if isinstance(found, Refusal):
                self._refuse(found)
                self.intake.release([message])
            else:
                self._next.add(message, found, time.monotonic())
            self.status.messages += 1
            self.status.bytes += len(message.payload)
            if len(self._next.sealed) >= UNSEAL_BLOCKS:
                self._unseal()
        self._unseal()
        if self._full:  # no room for more before the lake's thread is done, or may try again
            self._rest(time.monotonic())

    def _rest(self, now: float) -> None:
        """Wait for the lake, as long as nothing else has to be done."""
        if self._work is not None:
            wait([self._work], self._wait_s(now))
        elif now < self._retry_due:
            time.sleep(min(self._wait_s(now), self._retry_due - now))

    def _unseal(self) -> None:
        """Read the columns of the next batch's blocks, many at once, while the lake's thread writes the batch before it."""
        stacks, refused = self.gate.unseal(self._next.sealed)
        self._next.sealed.clear()
        self._next.stacks += stacks
        for refusal in refused:
            self._refuse(refusal)

    def _message(self, wait_s: float) -> Received | None:
        """The next message; None after `wait_s`, or when the lake's thread is done."""
        try:
            return self.intake.queue.get(timeout=wait_s) if wait_s else self.intake.queue.get_nowait()
        except queue.Empty:
            return None

    @property
    def _full(self) -> bool:
        batch, limits = self._next, self.limits
        return (
            len(batch.messages) >= limits.batch_blocks_max
            or batch.size_bytes >= limits.batch_bytes_max
            or batch.rows >= limits.batch_rows_max
        )

    def _wait_s(self, now: float) -> float:
        """How long nothing else has to be done."""
        waits = [IDLE_S]
        if (receipt_s := self._receipts.due_s(now)) is not None:
            waits.append(receipt_s)
        if self._next.messages and self._work is None:
            waits.append(max(self._retry_due, self._next.began + self.limits.linger_ms / 1_000) - now)
        return max(0.0, min(waits))

    def _begin(self, now: float) -> None:
        """Give the lake's thread something to do, if it has nothing: upkeep that is due, the batch that failed, or the next batch."""
        if self._work is not None or now < self._retry_due:
            return
        busy = self._committing.messages or self._next.messages
        if now >= self._upkept_at + (UPKEEP_S if busy else IDLE_S):
            self._upkept_at = now
            self._start(self._upkeep)
            return
        lingered = now >= self._next.began + self.limits.linger_ms / 1_000
        if not self._committing.messages and self._next.messages and (lingered or self._full):
            self._unseal()
            self._committing, self._next = self._next, Batch()
        if self._committing.messages:
            self._start(self.lake.append, self.gate.region, self._committing.stacks)

    def _start(self, work: Callable[..., Settled | None], *arguments: object) -> None:
        self._work = self._lake_thread.submit(work, *arguments)
        self._work.add_done_callback(lambda _: self.intake.wake())

    def _upkeep(self) -> None:
        self.lake.compact(self.small_files_max)
        if self.vacuum_hours:
            self.lake.vacuum(self.vacuum_hours)
        self.lake.correct_clocks()

    def _finish(self, now: float, last: bool = False) -> None:
        """If the lake's thread is done: receipts, then PUBACKs. If the lake was away, the same batch again later."""
        if self._work is None or not (last or self._work.done()):
            return
        work, self._work = self._work, None
        try:
            settled = work.result()
        except UnavailableError as e:
            log.warning("lake unavailable region=%s retry_s=%.1f reason=%s", self.gate.region, self._retry_s, e)
            self.status.lake_available = False
            self._retry_due, self._retry_s = now + self._retry_s, min(2 * self._retry_s, RETRY_S[1])
            return
        self.status.lake_available, self._retry_s = True, RETRY_S[0]
        if settled is not None:
            batch, self._committing = self._committing, Batch()
            for refusal in settled.refused:
                self._refuse(refusal)
            for found in self.lake.take_found():
                self.status.quarantined_rows += found.rows
                self._add_refusal(Kind(QUARANTINED, found.device, found.lane, found.stream, found.reason), found.detail)
            self._receipts.add(settled.receipts, now)
            self.intake.release(batch.messages)
            self._count(batch, settled)

    def _send_receipt(self, receipt: Receipt) -> None:
        self.status.receipts += self.intake.publish(DeviceTopics(receipt.device).receipts, encode_receipt(receipt))

    def _count(self, batch: Batch, settled: Settled) -> None:
        rows = {header.identity: header.rows for stack in batch.stacks for header in stack.headers}
        status = self.status
        status.blocks += len(settled.committed)
        status.rows += sum(rows[i] for i in settled.committed)
        status.duplicates += sum(len(stack.headers) for stack in batch.stacks) - len(settled.committed) - len(settled.refused)
        status.commits += bool(settled.committed)

    # Refusals, policy, status

    def _look_around(self, now: float) -> None:
        """Now and then: a new policy, what the broker has refused, what is to be written down."""
        self._refusals.write(now)
        if now < self._look_due:
            return
        self._look_due = now + STATUS_S
        zones = self.policy()
        if zones is not None:
            self.gate = replace(self.gate, zones=zones)
            log.info("policy taken region=%s digest=%s", self.gate.region, zones.digest)
        if self.broker_log is not None and self._refusals.available:
            if self._refusals.written:
                self._keep(self.broker_log.keep_place)
            for denial in self.broker_log.read():
                self._deny(denial)
        self.status.connected, self.status.audit_available = self.intake.connected, self._refusals.available
        self.status.updated_us = time.time_ns() // 1_000
        self._keep(partial(write_status, self.status_file, self.status))

    def _keep(self, write: Callable[[], None]) -> None:
        """Write a small file for others. If that fails nothing stops: the lake may have a disk of its own. The next look tries again."""
        try:
            write()
        except OSError as e:
            log.warning("file not written region=%s reason=%s", self.gate.region, e)

    def _deny(self, denial: Denial) -> None:
        detail = f"the broker of {self.gate.region} refused to let {denial.client!r} {denial.action} {denial.topic!r} {denial.address}"
        try:
            topic = parse(denial.topic)
            lane, stream = topic.lane, topic.stream
        except ContractError:
            lane = stream = ""
        self._add_refusal(Kind(DENIED, denial.client, lane, stream, Reason.DENIED), detail)

    def _refuse(self, refusal: Refusal) -> None:
        self._add_refusal(Kind(REFUSED, refusal.device, refusal.lane, refusal.stream, refusal.reason), refusal.detail)

    def _add_refusal(self, kind: Kind, detail: str) -> None:
        detail = detail[:DETAIL_CHARACTERS_MAX]  # a column's name, say, may be as long as a block: no log, memory or broker takes that
        log.warning("%s device=%s lane=%s reason=%s detail=%s", kind.by, kind.device, kind.lane, kind.reason, detail)
        self.status.refused[kind.reason] = self.status.refused.get(kind.reason, 0) + 1
        self._refusals.add(kind, detail, time.monotonic())

    def _raise_alarm(self, entry: Entry) -> None:
        """Tell the device's operator what stands in the audit trail."""
        kind, times, detail = entry
        if _is_device(kind.device):
            event = {"event": kind.by, "region": self.gate.region, "reason": kind.reason, "detail": detail, "count": times}
            self.intake.publish(DeviceTopics(kind.device).events, msgspec.json.encode(event))


def _unpacked_bytes(block: Sealed) -> int:
    """What the columns of a block are before they are packed; a pack that does not say counts as the largest."""
    size = zstandard.frame_content_size(block.packed)
    return size if size >= 0 else RAW_BYTES_MAX


def _is_device(name: str) -> bool:
    try:
        check_name(name, "device")
    except ContractError:
        return False
    return True


def build(settings: Settings, region_name: str, worker: Worker = ONE) -> Ingest:
    """A worker of a region, its intake not yet connected."""
    region = settings.region(region_name)
    contracts, zones = load_contracts(settings), load_zones(settings)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    secret = brokers.password(settings, brokers.CLOUD_USER)
    intake = Intake(region, brokers.CLOUD_USER, secret, client_id=worker.name, filters=worker.filters(region), kept=worker.kept(region))
    place = settings.run_dir / f"broker-log-{region.name}.json"
    return Ingest(
        gate=Gate(region.name, contracts, zones),
        lake=CheckedLake(Lake(settings.lake, contracts)),
        intake=intake,
        audit=Audit(settings.audit_db),
        limits=settings.ingest,
        status_file=status_path(settings, region.name, worker.name),
        small_files_max=settings.small_files_max,
        vacuum_hours=settings.vacuum_hours,
        broker_log=BrokerLog(_broker_log_path(settings, region), place) if worker.first else None,
        policy=PolicyWatch(settings, zones).changed,
    )


def _broker_log_path(settings: Settings, region: Region) -> Path:
    return region.broker_log or settings.logs_dir / f"broker-{region.name}.log"


def serve(settings: Settings, region: str, worker: Worker) -> None:
    """Be one worker until SIGTERM."""
    ingest = build(settings, region, worker)

    def end(signal_number: int, frame: object) -> None:
        ingest.stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    pa.array([0.0], from_pandas=True)  # Arrow imports pandas at its first array: now, not while blocks wait
    gc.freeze()  # what is loaded stays: the garbage of blocks is found without a look at it
    if worker.first:
        end_unused(settings, settings.region(region), worker)
    ingest.intake.open()
    try:
        ingest.run()
    finally:
        ingest.intake.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """One worker, as `fenceline ingest` and the stack start it."""
    parser = argparse.ArgumentParser(description="Store the blocks of one region's broker in the lake.")
    parser.add_argument("--region", required=True)
    parser.add_argument("--worker", type=int, default=1)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--project", type=Path)
    parser.add_argument("--state", type=Path)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    serve(config.load(given.project, given.state), given.region, Worker(given.worker, given.of, given.name))


if __name__ == "__main__":
    main()
