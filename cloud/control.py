"""The control loop: tells devices what to run, hears what they run, and moves rollouts on.

- Desired documents are published retained in every region, at every connection and whenever one changes: a device finds its
  document wherever it connects. That of a removed device is empty: brokers keep none then. Commands only write to the fleet's database;
  this loop sees it, and reads there only what changed.
- While a large wave of devices is asked, documents are published all the same: a rollout is given ROLLOUT_S, and goes on after the regions
  had their turn.
- Reports and events come from every region.
- What is missing in the lake, and which service levels are not kept, is looked at now and then (`cloud.watch`).
- TUF metadata is signed again before it expires, if the keys are here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from cloud import brokers, keys, release, rollout
from cloud.config import Region, Settings
from cloud.fleet import Fleet
from cloud.intake import Intake, Received
from cloud.watch import Watch
from edge_agent.contract.errors import ContractError
from edge_agent.contract.state import Desired, decode_reported, encode_state
from edge_agent.contract.topics import ALL_EVENTS, ALL_REPORTED, DeviceTopics, Kind, parse

log = logging.getLogger(__name__)

NAME = "control-1"  # client id, and CN of the certificate
TICK_S = 0.2
ROLLOUT_S = 1.0
REFRESH_S = 3600.0
MESSAGES_PER_TICK_MAX = 1_000


class RegionControl:
    """What one region's broker was told and what it says."""

    def __init__(self, region: Region, fleet: Fleet, intake: Intake) -> None:
        self.region = region
        self.intake = intake
        self._fleet = fleet
        self._connection = 0
        self._change: int | None = None  # the last one whose document is published, or waits for that
        self._waiting: dict[str, Desired | None] = {}  # None: it was removed, and an empty document makes the broker forget the last
        self._held: Received | None = None  # taken from the queue, and not yet written down

    def step(self) -> None:
        """Take what came in, and publish the desired documents that this connection has not seen."""
        for _ in range(MESSAGES_PER_TICK_MAX):
            try:
                self._held = self._held or self.intake.queue.get_nowait()
            except queue.Empty:
                break
            if self._held is not None:
                self._take(self._held)
                self.intake.release([self._held])
            self._held = None
        if self.intake.connected:
            self._publish()

    def _take(self, message: Received) -> None:
        try:
            topic = parse(message.topic)
            if topic.kind is Kind.EVENTS:
                if not message.retained:
                    self._fleet.record_event(topic.device, message.payload)
                return
            reported = decode_reported(message.payload)
            if reported.device != topic.device:
                raise ContractError(f"report of {reported.device!r} on the topic of {topic.device!r}")
        except ContractError as e:
            log.warning("message refused region=%s topic=%s reason=%s", self.region.name, message.topic, e)
            return
        self._fleet.record_reported(reported, retained=message.retained)

    def _publish(self) -> None:
        if self._connection != self.intake.connection:
            self._connection, self._change = self.intake.connection, None
        changed, self._change = self._fleet.desired_since(self._change)
        self._waiting.update(changed)
        for device, desired in list(self._waiting.items()):
            document = b"" if desired is None else encode_state(desired)
            if not self.intake.publish(DeviceTopics(device).desired, document, retain=True, qos=1):
                return  # the connection is gone: all of them go out at the next one
            del self._waiting[device]


class Control:
    """The loop, in a thread of its own from `start` to `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.fleet = Fleet(settings.fleet_db)
        self._settings = settings
        self._rollouts = rollout.Controller(settings, self.fleet)
        self._watch = Watch(settings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control")
        secret = brokers.password(settings, brokers.CLOUD_USER)
        self.regions = [RegionControl(r, self.fleet, _intake(r, secret)) for r in settings.regions]

    @property
    def connected(self) -> bool:
        """Whether every region's broker is connected."""
        return all(r.intake.connected for r in self.regions)

    def start(self) -> None:
        for region in self.regions:
            region.intake.open()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for region in self.regions:
            region.intake.close()

    def _run(self) -> None:
        rollout_due = refresh_due = 0.0
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            for region in self.regions:
                _attempt(region.step)
            if now >= rollout_due:
                rollout_due = now + ROLLOUT_S
                _attempt(lambda: self._rollouts.tick(time.time(), ROLLOUT_S))
            _attempt(lambda: self._watch.tick(time.monotonic()))
            if now >= refresh_due:
                refresh_due = now + REFRESH_S
                _attempt(self._refresh)

    def _refresh(self) -> None:
        if keys.is_initialised(self._settings.keys_dir, self._settings.releases_dir):
            renewed = release.refresh(keys_dir=self._settings.keys_dir, releases_dir=self._settings.releases_dir, now=datetime.now(UTC))
            log.info("release metadata checked renewed=%s", ",".join(renewed) or "none")


def _attempt(step: Callable[[], object]) -> None:
    """One step of the loop. A busy database, a full disk, a fault of ours: it is said, the others go on, and this one comes again."""
    try:
        step()
    except Exception:
        log.exception("control step failed")


def _intake(region: Region, secret: str) -> Intake:
    return Intake(region, brokers.CLOUD_USER, secret, filters=(ALL_REPORTED, ALL_EVENTS), client_id=NAME, persistent=False)
