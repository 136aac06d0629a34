"""The agent of one gateway: it puts the parts together, takes batches down the data path, and answers for both.

Threads: each side of the sensors reads its broker, or its connections; this, the main thread, checks, scores and stores
(datapath.py); the uplink sends; the updater fetches bundles. They meet in bounded queues and in the buffer.

A disk that is full, read-only or dead ends nothing, neither while the agent runs (storing.py) nor when it starts: no sensor's message
is acknowledged, the operator is told, and the agent goes on by itself once the disk is back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_agent import __version__, metrics, systemd
from edge_agent.active_model import ActiveModel
from edge_agent.anchor import Anchor
from edge_agent.buffer import Buffer
from edge_agent.clock import Clock
from edge_agent.config import AgentConfig, gpsd_address
from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.contract.state import Reported, decode_desired
from edge_agent.contract.stream import QUARANTINE, StreamContract
from edge_agent.core.deadline import DeadlineLimits
from edge_agent.core.fix import Precision, Rules
from edge_agent.core.outbox import OutboxLimits
from edge_agent.core.privacy import Pseudonyms
from edge_agent.core.track import Track
from edge_agent.datapath import DataPath
from edge_agent.fence import Fence
from edge_agent.gpsd import Gpsd
from edge_agent.heap import Heap
from edge_agent.intake import Intake
from edge_agent.mqtt.link import EndpointConfig
from edge_agent.mqtt.tls import tls_context
from edge_agent.node_state import NodeState
from edge_agent.policy import PolicyStore
from edge_agent.policy_updates import PolicyUpdates
from edge_agent.releases import RepositoryConfig
from edge_agent.sealed import load_keys
from edge_agent.sensors import Sensors
from edge_agent.status import StatusServer
from edge_agent.updater import Updater, UpdaterConfig, UpdaterState
from edge_agent.uplink import Uplink, UplinkConfig

if TYPE_CHECKING:
    from edge_agent.profile import Profile

log = logging.getLogger(__name__)

POLL_S = 0.2
REPORT_S = 20.0  # also the sign of life that `fenceline status` shows
GIVE_BACK_S = 5.0
RETRY_S = 0.5
DISK_ERRORS = (errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE)
UNDER_WAY_MAX = 65_536  # what one MQTT connection can have unacknowledged: all of it may come again after it was stored


class _StoppedError(Exception):
    """Asked to stop while the data path waits."""


class Agent:
    """Everything that runs on one gateway; `run` returns when SIGTERM or SIGINT arrives."""

    def __init__(self, config: AgentConfig, profile: Profile | None = None) -> None:
        """Make what needs no state directory and no network; ConfigError for settings that cannot work.

        `profile` is shown by `describe`.
        """
        self._config, self._profile = config, profile
        self._sensors = Sensors(config)
        self._gpsd = _gpsd(config)
        self._uplink_config = _uplink_config(config)
        self._repository = _repository(config)
        self._metrics_address = metrics.parse_listen(config.settings.metrics.listen)
        self._stopping = False
        self._clock, self._heap = Clock(), Heap()
        self.metrics = metrics.Metrics()
        self._updater: Updater | None = None
        self._model = UpdaterState()
        self._reporting = threading.Lock()  # a report that began earlier must not be published later: it is retained
        self._report_due, self._told_policy = 0.0, ""
        self._give_back_due = 0.0
        self._lane: str | None = None

    def run(self) -> int:
        """Run until a signal; 0 after a clean stop.

        Raises:
            ConfigError: another agent runs on this state directory, or it cannot be one.
        """
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: self._stop())
        with contextlib.ExitStack() as stack, contextlib.suppress(_StoppedError):
            if self._metrics_address is not None:
                metrics.serve(self.metrics, *self._metrics_address)
            held = self._take_up(stack)
            self._start(stack)
            systemd.notify("READY=1")
            log.info("agent started device=%s epoch=%s version=%s", self._config.device, self._buffer.epoch, __version__)
            if held:
                systemd.notify("STATUS=")
                self._tell("buffer_recovered", detail=f"after {held}")
            while not self._stopping:
                batch = self._sensors.get(POLL_S)
                if batch is not None:
                    self._path.process(batch)
                    self._stay()
                else:
                    self._path.idle()
                    self._stay()
                self._tick()
        systemd.notify("STOPPING=1")
        log.info("agent stopped device=%s", self._config.device)
        return 0

    # Control: desired state comes in, reported state goes out.

    def _on_desired(self, document: bytes) -> None:
        """Called by the uplink in its own thread."""
        try:
            desired = decode_desired(document)
        except ContractError as e:
            log.warning("desired state rejected error=%s", e)
            return
        if self._updater is None:
            log.warning("desired state ignored version=%s: agent.toml has no [releases]", desired.version)
            return
        self._updater.handle(desired)

    def _on_model_state(self, state: UpdaterState) -> None:
        """Called by the updater in its own thread."""
        self._model = state
        self._report()

    def _tell(self, event: str, **fields: str) -> None:
        """Tell the operator, over the device's events topic."""
        self._uplink.publish_event(msgspec.json.encode({"event": event, "at_us": time.time_ns() // 1_000, **fields}))

    def _report(self) -> None:
        with self._reporting:
            model, waiting = self._model, self._buffer.lanes()
            self._uplink.publish_reported(
                Reported(
                    device=self._config.device,
                    agent_version=__version__,
                    desired_version=model.desired_version,
                    phase=model.phase,
                    active=model.active,
                    reason=model.reason,
                    detail=model.detail,
                    at_us=time.time_ns() // 1_000,
                    epoch=self._buffer.epoch,
                    zone=self._track.lane_now(),
                    blocks_waiting=sum(s.blocks for s in waiting),
                    readings_stored=self._buffer.readings_stored(),
                    policy=self._fence.policy,
                )
            )

    # Starting and housekeeping.

    def _take_up(self, stack: contextlib.ExitStack) -> str:
        """Read the state directory; while its disk takes or gives nothing, wait for it. Returns why it had to, "" if it had not.

        Raises:
            _StoppedError: the agent is to stop.
        """
        held = ""
        while True:
            try:
                with contextlib.ExitStack() as attempt:
                    with systemd.patience():
                        self._read_state(attempt)
                    stack.push(attempt.pop_all())
                    return held
            except UnavailableError as e:
                self.metrics.full.inc()
                if not held:  # to systemd it is up: starting it again would mend nothing
                    log.error("buffer unavailable, source held error=%s", e)
                    systemd.notify("READY=1\nSTATUS=no sensor is read: the buffer is unavailable")
                held = str(e)
            systemd.notify("WATCHDOG=1")
            if self._stopping:
                raise _StoppedError
            time.sleep(RETRY_S)

    def _read_state(self, stack: contextlib.ExitStack) -> None:
        """Make the parts that need the disk.

        Raises:
            UnavailableError: it fails.
        """
        config, settings = self._config, self._config.settings
        stack.enter_context(_only_agent_in(config.state_dir))
        history = {c.stream: settings.buffer.history_rows for c in config.contracts}
        self._buffer = Buffer(
            config.state_dir / "buffer.db",
            config.device,
            self._clock.boot,
            bytes_max=settings.buffer.bytes_max,
            history_rows=history,
            age_s_max=settings.buffer.age_s_max,
            when_full=settings.buffer.when_full,
            priorities=_priorities(config),
            keys=load_keys(config.key_file),
            clock=self._clock.now,
        )
        stack.callback(self._buffer.close)
        position = settings.position
        self._policy = PolicyStore(config.state_dir / "policy")
        anchor = Anchor(config.device, config.state_dir)
        zones, last = self._policy.load(config.zones), anchor.read() if config.fixed is None else None
        self._track = Track(zones, _rules(config), config.fixed, self._buffer.fixes(), last)
        self._fence = Fence(self._track, _locations(config), self.metrics, self._tell, anchor)
        self._node_state = NodeState(config.state_dir / "sparkplug.state")
        recent_rows = max(settings.buffer.history_rows, UNDER_WAY_MAX)
        pseudonyms = Pseudonyms(config.pii_key) if config.pii_key else None
        self._intake = Intake(config.contracts, position.topic, self._fence, recent_rows, self._node_state.load(), pseudonyms)
        for contract in config.contracts:
            self._remember(contract)

    def _remember(self, contract: StreamContract) -> None:
        """Take the stored readings of a stream as seen."""
        stored = self._buffer.history(contract.stream, contract.version)
        try:
            if stored is not None:
                self._intake.remember(contract.stream, stored)
        except ContractError as e:  # the contract was changed, and its version was not
            log.warning("readings that come again will not be known stream=%s: stored ones have other fields error=%s", contract.stream, e)

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Bring up every other part; `stack` takes them down in the opposite order."""
        config = self._config
        self._active = ActiveModel(
            config.contracts, lambda *of: self._path.storing.history(*of), self.metrics, self._tell, config.functions
        )
        self._uplink = Uplink(
            self._uplink_config,
            self._buffer,
            self._fence.endpoints,
            self._on_desired,
            on_settled=self.metrics.settled.inc,
            on_event=lambda event, fields: self._tell(event, **fields),
        )
        if self._repository is not None:
            self._updater = self._active.updater = self._make_updater(self._repository)
        self._path = DataPath(
            intake=self._intake,
            fence=self._fence,
            model=self._active,
            buffer=self._buffer,
            uplink=self._uplink,
            clock=self._clock,
            metrics=self.metrics,
            tell=self._tell,
            pause=self._pause,
            positions=tuple if self._gpsd is None else self._gpsd.take,
            node_state=self._node_state,
        )
        self.metrics.registry.register(metrics.UplinkCollector(self._uplink.status))
        self.metrics.registry.register(metrics.BufferCollector(self._buffer.lanes))
        self._uplink.start()  # the updater is there already: a desired document comes with the first connection
        stack.callback(self._uplink.stop)
        self._stay()
        stack.callback(self._active.close)
        if self._updater is not None:
            self._updater.start()
            stack.callback(self._updater.stop)
        if self._gpsd is not None:
            self._gpsd.start()
            stack.callback(self._gpsd.stop)
        self._sensors.start()
        stack.callback(self._sensors.stop)
        status = StatusServer(config.state_dir, self.describe)
        stack.callback(status.close)
        if self._profile is not None:
            stack.callback(self._profile.sum)  # a last look at threads that end now

    def _make_updater(self, repository: RepositoryConfig) -> Updater:
        return Updater(
            UpdaterConfig(repository, {c.stream: c.version for c in self._config.contracts}, functions=self._config.functions),
            self._config.state_dir / "models",
            here=self._track.lane_now,
            on_activate=self._active.activate,
            on_report=self._on_model_state,
            policies=PolicyUpdates(self._policy, self._fence.offer, self._tell),
        )

    def _stop(self) -> None:
        self._stopping = True

    def _tick(self) -> None:
        """Between batches: sign of life, gauges, the reported document, memory that is not needed.

        Raises:
            UnavailableError: another thread of the agent has failed.
        """
        for part in (self._uplink, self._updater, self._gpsd):
            if part is not None and not part.alive:
                raise UnavailableError(f"{type(part).__name__.lower()} failed: {part.failure!r}")
        systemd.notify("WATCHDOG=1")
        now = time.monotonic()
        if now >= self._report_due or self._told_policy != self._fence.policy:
            self._report_due, self._told_policy = now + REPORT_S, self._fence.policy
            self._report()
        if now >= self._give_back_due:
            self._give_back_due = now + GIVE_BACK_S
            self._heap.give_back()

    def _pause(self) -> None:
        """Let a moment pass while the data path waits.

        Raises:
            _StoppedError: the agent is to stop.
        """
        self._tick()
        if self._stopping:
            raise _StoppedError
        time.sleep(RETRY_S)

    def _stay(self) -> None:
        """Keep the links of the place where the device is now."""
        lane = self._track.lane_now()
        if lane != self._lane:
            self._lane = lane
            self._uplink.stay(lane)

    def describe(self) -> dict[str, Any]:
        """What `edge-agent status` shows; called from the status thread."""
        uplink = self._uplink.status()
        return {
            "device": self._config.device,
            "version": __version__,
            "epoch": self._buffer.epoch,
            "zone": self._track.lane_now(),
            "policy": {"digest": self._fence.policy, "version": self._policy.ref.version if self._policy.ref else None},
            "gpsd": None if self._gpsd is None else asdict(self._gpsd.status),
            "sensors": self._sensors.describe(),
            "buffer": self._describe_buffer(),
            "uplink": {
                "blocks_sent": uplink.blocks_sent,
                "bytes_sent": uplink.bytes_sent,
                "blocks_sent_again": uplink.blocks_sent_again,
                "blocks_settled": uplink.blocks_settled,
                "hedges": uplink.hedges,
                "hedges_denied": uplink.hedges_denied,
                "duplicate_bytes": uplink.duplicate_bytes,
            },
            "lanes": {lane: asdict(status) for lane, status in uplink.lanes.items()},
            "endpoints": {name: asdict(status) for name, status in uplink.endpoints.items()},
            "model": msgspec.to_builtins(self._model),
            **({} if self._profile is None else {"profile": self._profile.sum().describe()}),
        }

    def _describe_buffer(self) -> dict[str, Any]:
        saved = {"bytes_saved": self._path.payload_bytes - self._path.block_bytes, "readings_stored": self._buffer.readings_stored()}
        try:
            return {**saved, **asdict(self._buffer.state(self._clock.now()))}
        except UnavailableError as e:
            return {**saved, "error": str(e)}


def _uplink_config(config: AgentConfig) -> UplinkConfig:
    uplink = config.settings.uplink
    for broker in config.endpoints.values():
        if broker.tls is not None:
            tls_context(broker.tls)  # every connection reads the files again; here it is said at once if they do not load
    endpoints = tuple(
        EndpointConfig(name, b.host, b.port, b.username, b.password, b.tls, b.keepalive_s) for name, b in config.endpoints.items()
    )
    limits = OutboxLimits(
        inflight_blocks_max=uplink.inflight_blocks_max,
        inflight_bytes_max=uplink.inflight_bytes_max,
        receipt_timeout_s=uplink.receipt_timeout_s,
        replay_bytes_per_s=uplink.replay_bytes_per_s,
        heartbeat_s=uplink.heartbeat_s,
        hedge_share_max=uplink.hedge_share_max,
        deadline=DeadlineLimits(floor_s=uplink.deadline_ms_min / 1e3),
    )
    return UplinkConfig(config.device, endpoints, failback_s=uplink.failback_s, backoff_max_s=uplink.backoff_s_max, limits=limits)


def _rules(config: AgentConfig) -> Rules:
    position = config.settings.position
    return Rules(
        max_age_s=position.max_age_s,
        home=position.home,
        speed_m_s_max=position.speed_m_s_max,
        hysteresis_m=position.hysteresis_m,
        null_island_refused=position.null_island_refused,
        accuracy_m_min=position.accuracy_m,
        boot_us=round((time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)) * 1e6),
    )


def _priorities(config: AgentConfig) -> dict[str, int]:
    """Of a full buffer, what was refused goes before any reading: whoever sends rubbish cannot push readings out."""
    streams = {c.stream: s.priority for c, s in zip(config.contracts, config.settings.streams, strict=True)}
    return {**streams, QUARANTINE.stream: min(streams.values()) - 1}


def _locations(config: AgentConfig) -> dict[str, Precision]:
    return {c.stream: s.location for c, s in zip(config.contracts, config.settings.streams, strict=True)}


def _gpsd(config: AgentConfig) -> Gpsd | None:
    position = config.settings.position
    return Gpsd(*gpsd_address(position.url), accuracy_m=position.accuracy_m) if position.source == "gpsd" else None


def _repository(config: AgentConfig) -> RepositoryConfig | None:
    releases = config.settings.releases
    if releases is None or config.root is None:
        return None
    return RepositoryConfig(releases.url, config.root, config.releases_ca)


@contextlib.contextmanager
def _only_agent_in(state_dir: Path) -> Iterator[None]:
    """Make the state directory and hold its lock: two agents on one buffer would give one name to two blocks.

    Raises:
        ConfigError: another agent has it, or it cannot be a state directory.
        UnavailableError: its disk fails, or takes nothing.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        if e.errno in DISK_ERRORS:
            raise UnavailableError(f"state_dir {state_dir}: {e.strerror}; the agent waits for its disk") from e
        raise ConfigError(f"state_dir {state_dir} cannot be used: {e.strerror}; it must be a directory that the agent may write to") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(lock)
        raise ConfigError(f"another agent runs on {state_dir}; stop it, or give this one its own state_dir") from e
    try:
        yield
    finally:
        os.close(lock)
