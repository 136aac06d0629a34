"""Ingest: blocks from a region's broker into the lake. One process per region: `python -m cloud.ingest --region eu`.

- The order is the promise: check, commit to the lake, send receipts, then PUBACK. Whatever stops in between is sent again, by the
  broker or by the device, and stored once.
- What the gate refuses is counted, written to the audit trail, raised as an alarm on the device's events topic, and acknowledged to
  the broker without a receipt: the device keeps it.
- What the broker refused by itself (a topic that is not the device's, or not of this region's zones) is read from its log, and is
  written down and raised in the same way.
- A zone policy that was published is taken between two batches.
- paho's callbacks only put messages on a queue. The broker's limit of unacknowledged messages bounds the queue.
- While the lake cannot commit, nothing is acknowledged and nothing is lost.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from cloud import brokers, config
from cloud.audit import Audit
from cloud.broker_log import BrokerLog, Denial
from cloud.config import IngestLimits, Region, Settings
from cloud.gate import Gate, PolicyWatch, Refusal, load_contracts, load_zones
from cloud.intake import Intake, Received
from cloud.lake import Lake, Settled
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ContractError, Reason, UnavailableError
from edge_agent.contract.receipt import encode_receipt
from edge_agent.contract.topics import DeviceTopics, check_name, parse
from edge_agent.core.zones import Zones

log = logging.getLogger(__name__)

RETRY_S = (0.1, 5.0)  # the first and the longest wait while the lake is away
IDLE_S = 0.25
STATUS_S = 0.5
REFUSED, DENIED = "block_refused", "denied_by_broker"
ALARMS_MAX = 10_000
ALARM_S = 10.0  # refusals of one kind are written down once in this time, with their number


class Status(msgspec.Struct):
    """What an ingest has done since it started; other processes read it from a file."""

    region: str
    pid: int
    connected: bool = False
    messages: int = 0
    blocks: int = 0
    rows: int = 0
    duplicates: int = 0
    bytes: int = 0
    commits: int = 0
    lake_available: bool = True
    refused: dict[str, int] = {}
    updated_us: int = 0


def status_path(settings: Settings, region: str) -> Path:
    """Where the ingest of `region` writes its Status."""
    return settings.run_dir / f"ingest-{region}.json"


def read_status(settings: Settings, region: str) -> Status | None:
    """The Status of a region's ingest; None before its first word."""
    try:
        return msgspec.json.decode(status_path(settings, region).read_bytes(), type=Status)
    except FileNotFoundError:
        return None


class AlarmKey(NamedTuple):
    """Refusals that are written down together. `kind` says by whom: REFUSED by the gate, DENIED by the broker."""

    kind: str
    device: str
    lane: str
    stream: str
    reason: Reason


@dataclass
class _Alarm:
    """Refusals not yet written down; they are when `due`."""

    due: float
    count: int = 0
    detail: str = ""


@dataclass
class Ingest:
    """The loop of one region's ingest."""

    gate: Gate
    lake: Lake
    intake: Intake
    audit: Audit
    limits: IngestLimits
    status_file: Path
    small_files_max: int
    broker_log: BrokerLog | None = None
    policy: Callable[[], Zones | None] = lambda: None
    stop: bool = False
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        self.status = Status(self.gate.region, os.getpid())
        self._alarms: dict[AlarmKey, _Alarm] = {}
        self._status_due = self._look_due = 0.0

    def run(self) -> None:
        """Work until `stop`."""
        while not self.stop:
            batch = self._collect()
            if batch:
                self._handle(batch)
            else:
                self.lake.compact(self.small_files_max)
                self.lake.correct_clocks()
            self._look_around(time.monotonic())
            self._raise_alarms(time.monotonic())
            self._write_status(time.monotonic())
        self._raise_alarms(float("inf"))

    def _look_around(self, now: float) -> None:
        """Now and then: a new policy, and what the broker has refused."""
        if now < self._look_due:
            return
        self._look_due = now + STATUS_S
        zones = self.policy()
        if zones is not None:
            self.gate = replace(self.gate, zones=zones)
            log.info("policy taken region=%s digest=%s", self.gate.region, zones.digest)
        for denial in self.broker_log.read() if self.broker_log is not None else ():
            self._deny(denial)

    def _deny(self, denial: Denial) -> None:
        detail = f"the broker of {self.gate.region} refused to let {denial.client!r} {denial.action} {denial.topic!r} {denial.address}"
        log.warning("denied by broker %s", detail)
        try:
            topic = parse(denial.topic)
            lane, stream = topic.lane, topic.stream
        except ContractError:
            lane = stream = ""
        self._alarm(AlarmKey(DENIED, denial.client, lane, stream, Reason.DENIED), detail)

    def _handle(self, batch: list[Received]) -> None:
        accepted: list[tuple[BlockHeader, Table]] = []
        for message in batch:
            found = self.gate.inspect(message.topic, message.payload)
            if isinstance(found, Refusal):
                self._refuse(found)
            else:
                accepted.append(found)
        settled = self._append(accepted)
        if settled is None:
            return  # stopping, nothing acknowledged
        for receipt in settled.receipts:
            self.intake.publish(DeviceTopics(receipt.device).receipts, encode_receipt(receipt))
        self.intake.release(batch)
        self._count(batch, accepted, settled)

    def _append(self, accepted: list[tuple[BlockHeader, Table]]) -> Settled | None:
        """Append, however long the lake is away; None if asked to stop meanwhile."""
        wait_s = RETRY_S[0]
        while not self.stop:
            try:
                settled = self.lake.append(self.gate.region, accepted)
            except UnavailableError as e:
                log.warning("lake unavailable region=%s retry_s=%.1f reason=%s", self.gate.region, wait_s, e)
                self.status.lake_available = False
                self._write_status(time.monotonic())
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_S[1])
            else:
                self.status.lake_available = True
                return settled
        return None

    def _collect(self) -> list[Received]:
        """The next messages, at most a batch; waits `linger_ms` after the first one."""
        try:
            batch = [self.intake.queue.get(timeout=IDLE_S)]
        except queue.Empty:
            return []
        size, deadline = len(batch[0].payload), time.monotonic() + self.limits.linger_ms / 1_000
        while len(batch) < self.limits.batch_blocks_max and size < self.limits.batch_bytes_max:
            try:
                batch.append(self.intake.queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            size += len(batch[-1].payload)
        return batch

    def _refuse(self, refusal: Refusal) -> None:
        log.warning("block refused device=%s lane=%s reason=%s detail=%s", refusal.device, refusal.lane, refusal.reason, refusal.detail)
        self._alarm(AlarmKey(REFUSED, refusal.device, refusal.lane, refusal.stream, refusal.reason), refusal.detail)

    def _alarm(self, key: AlarmKey, detail: str) -> None:
        """Count one refusal; it is written down when its alarm is due."""
        self.status.refused[key.reason] = self.status.refused.get(key.reason, 0) + 1
        if key not in self._alarms and len(self._alarms) >= ALARMS_MAX:
            key = AlarmKey(key.kind, "", "", "", key.reason)
        alarm = self._alarms.setdefault(key, _Alarm(time.monotonic()))
        alarm.count, alarm.detail = alarm.count + 1, detail

    def _raise_alarms(self, now: float) -> None:
        """Write down refusals: the first of a kind at once, then at most one entry in ALARM_S."""
        for key, alarm in [(k, a) for k, a in self._alarms.items() if a.due <= now]:
            if not alarm.count:
                del self._alarms[key]
                continue
            self.audit.add(key.kind, region=self.gate.region, subject=key.device, reason=key.reason, detail=alarm.detail, count=alarm.count)
            if _is_device(key.device):
                event = {"event": key.kind, "region": self.gate.region, "reason": key.reason, "detail": alarm.detail, "count": alarm.count}
                self.intake.publish(DeviceTopics(key.device).events, msgspec.json.encode(event))
            alarm.due, alarm.count = now + ALARM_S, 0

    def _count(self, batch: list[Received], accepted: list[tuple[BlockHeader, Table]], settled: Settled) -> None:
        rows = {h.identity: h.rows for h, _ in accepted}
        status = self.status
        status.messages += len(batch)
        status.bytes += sum(len(m.payload) for m in batch)
        status.blocks += len(settled.committed)
        status.rows += sum(rows[i] for i in settled.committed)
        status.duplicates += len(accepted) - len(settled.committed)
        status.commits += bool(settled.committed)

    def _write_status(self, now: float) -> None:
        if now < self._status_due:
            return
        self._status_due = now + STATUS_S
        self.status.connected, self.status.updated_us = self.intake.connected, time.time_ns() // 1_000
        temporary = self.status_file.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(self.status))
        temporary.replace(self.status_file)


def _is_device(name: str) -> bool:
    try:
        check_name(name, "device")
    except ContractError:
        return False
    return True


def build(settings: Settings, region_name: str) -> Ingest:
    """The ingest of a region, its intake not yet connected."""
    region = settings.region(region_name)
    contracts, zones = load_contracts(settings), load_zones(settings)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    return Ingest(
        gate=Gate(region.name, contracts, zones),
        lake=Lake(settings.lake, contracts),
        intake=Intake(region, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER)),
        audit=Audit(settings.audit_path),
        limits=settings.ingest,
        status_file=status_path(settings, region.name),
        small_files_max=settings.small_files_max,
        broker_log=BrokerLog(_broker_log_path(settings, region), settings.run_dir / f"broker-log-{region.name}.json"),
        policy=PolicyWatch(settings, zones).changed,
    )


def _broker_log_path(settings: Settings, region: Region) -> Path:
    return region.broker_log or settings.logs_dir / f"broker-{region.name}.log"


def main() -> None:
    """Serve one region until SIGTERM."""
    parser = argparse.ArgumentParser(description="Store the blocks of one region's broker in the lake.")
    parser.add_argument("--region", required=True)
    parser.add_argument("--project", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    ingest = build(config.load(arguments.project, arguments.state), arguments.region)

    def end(signal_number: int, frame: object) -> None:
        ingest.stop = True

    signal.signal(signal.SIGTERM, end)
    ingest.intake.open()
    try:
        ingest.run()
    finally:
        ingest.intake.close()


if __name__ == "__main__":
    main()
