"""One device: the agent's real parts on a disk that can fail, with a clock that can be wrong, and the sensors' broker before it.

- The sensors' broker keeps a session: what was not acknowledged comes again, in order, when the agent connects again; after a lost
  connection also what was acknowledged last, if the acknowledgement was lost with it.
- A crash drops every object. After a kill the new agent finds the files as the page cache has them, after a power cut as the
  platter has them. It can strike in the middle of a commit: at any write or sync of SQLite.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw

from edge_agent.active_model import ActiveModel
from edge_agent.buffer import Buffer, Draft, StoredBlock
from edge_agent.clock import Moment
from edge_agent.contract.block import decode_block
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.stream import Encoding, Field, FieldType, StreamContract
from edge_agent.core.fix import Fix, Precision, Rules
from edge_agent.core.outbox import OutboxLimits
from edge_agent.core.track import Track
from edge_agent.datapath import DataPath
from edge_agent.fence import Fence
from edge_agent.intake import Intake
from edge_agent.metrics import Metrics
from edge_agent.mqtt.inlet import Batch
from edge_agent.mqtt.link import EndpointConfig
from edge_agent.uplink import Uplink, UplinkConfig
from tests.faults.disk import FaultyDisk, _File
from tests.simulators.network import DEVICE, SimLink

if TYPE_CHECKING:
    from tests.simulators.world import World

HISTORY_ROWS = 2_000
POSITION = "sensors/position"
PAUSES_MAX = 40
SPEED_M_S = 1_000_000.0  # worlds are lived fast


def contract(stream: str, encoding: Encoding) -> StreamContract:
    """Readings with a number, and the place where they were captured; of single values there is no more than the number."""
    if encoding is Encoding.VALUE:
        bare = (Field("ts", FieldType.TIMESTAMP), Field("unit", FieldType.STRING), Field("n", FieldType.INTEGER, minimum=0))
        return StreamContract(stream, "1.0.0", bare, ("unit", "ts"), "ts", "unit", f"sensors/{{unit}}/{stream}", encoding)
    fields = (
        Field("ts", FieldType.TIMESTAMP),
        Field("unit", FieldType.STRING),
        Field("n", FieldType.INTEGER, minimum=0),
        Field("place", FieldType.INTEGER),
        Field("value", FieldType.NUMBER, required=False),
    )
    return StreamContract(stream, "1.0.0", fields, ("unit", "ts"), "ts", "unit", f"sensors/{{unit}}/{stream}", encoding)


PRIORITIES = {"alarm": 5}


class Gone(Exception):
    """The agent is no more; whatever it was about to do does not happen."""


class QuickDisk(FaultyDisk):
    """A faulty disk whose platter is the model alone: nothing waits for the real one. No inode is used twice while it exists."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, int] = {}

    def platter(self, path: str) -> Any:
        if (number := Path(path).stat().st_ino) not in self._held:
            self._held[number] = os.open(path, os.O_PATH)
        return super().platter(path)

    def close(self) -> None:
        for handle in self._held.values():
            os.close(handle)
        self.unregister()

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _QuickFile(self, name, flags)

    def calm(self) -> None:
        """No more faults."""
        self._fail_at = self._call_at = None


class _QuickFile(_File):
    def xSync(self, flags: int) -> None:
        if self._disk.count(f"sync {self._suffix}"):
            self._platter.dirty.clear()
            raise self._disk.error(apsw.IOError, "sync failed")
        self._platter.sync()


@dataclass
class SimClock:
    """The device's clocks: wall time may be stepped, boot and monotonic time start anew at each boot."""

    world: World
    boot: str = "boot-0"
    booted_at: float = 0.0
    offset_s: float = 0.0
    synced: bool = True

    def now(self) -> Moment:
        wall_us = max(0, int((self.world.wall_s() + self.offset_s) * 1e6))
        return Moment(wall_us, int((self.world.now - self.booted_at) * 1e6), self.synced)

    def reboot(self) -> None:
        self.boot, self.booted_at = f"boot-{int(self.boot[5:]) + 1}", self.world.now


class SensorBroker:
    """The broker that the agent reads: QoS 1, a persistent session."""

    def __init__(self, acknowledged: Callable[[list[bytes]], None]) -> None:
        self.queue: deque[tuple[str, bytes]] = deque()
        self._flying: deque[tuple[str, bytes]] = deque()
        self._last: list[tuple[str, bytes]] = []
        self._acknowledged = acknowledged

    def publish(self, topic: str, payload: bytes) -> None:
        self.queue.append((topic, payload))

    def batch(self, count: int, received_us: int, release: Callable[[Callable[[], None]], None]) -> Batch | None:
        """The next messages; `release` is given what acknowledging them does, and decides whether it still happens."""
        taken = [self.queue.popleft() for _ in range(min(count, len(self.queue)))]
        if not taken:
            return None
        self._flying.extend(taken)
        return Batch([t for t, _ in taken], [p for _, p in taken], received_us, lambda: release(lambda: self._acked(taken)))

    def lose(self, acknowledgement_lost: bool) -> None:
        """The connection to the agent is gone; what it had not acknowledged comes again, perhaps also what it had."""
        again = [*(self._last if acknowledgement_lost else []), *self._flying]
        self.queue.extendleft(reversed(again))
        self._flying.clear()
        self._last = []

    def _acked(self, taken: list[tuple[str, bytes]]) -> None:
        for message in taken:
            self._flying.remove(message)
        self._last = taken
        self._acknowledged([p for _, p in taken])


class RecordingBuffer(Buffer):
    """The real buffer; the world is told which readings went into which block."""

    world: World

    def append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        stored = super().append(drafts, fixes, now)
        for block in stored:
            header, table = decode_block(block.block)
            self.world.note_stored(header, table)
        return stored


class Device:
    """A running agent, or one that has crashed and is started again by `start`."""

    def __init__(self, world: World, folder: Path, disk: QuickDisk, *, bytes_max: int, when_full: Any, tight: bool) -> None:
        self.world, self.disk, self._home, self._tight = world, disk, folder, tight
        self.clock = SimClock(world)
        self.sensors = SensorBroker(world.note_acknowledged)
        self._limits = {"bytes_max": bytes_max, "when_full": when_full}
        self._lives = 0
        self._doomed: Path | None = None  # what the next life finds, once this one has been struck
        self.busy = False
        self.alive = False
        self.turn_at = 0.0
        self.crashes = self.deferred = 0

    def start(self) -> None:
        """A new life. If the disk fails now, it is tried again later."""
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._assemble(folder)
        except UnavailableError as e:
            self.world.tell(f"start failed {e}")
            self.deferred += 1
            self._close_files()
            self.world.after(1.0, self._start_again)
            return
        self.alive, self.turn_at = True, self.world.now

    def _start_again(self) -> None:
        if not self.alive:
            self.start()

    def _assemble(self, folder: Path) -> None:
        world, contracts, metrics = self.world, self.world.contracts, Metrics()
        history = {c.stream: HISTORY_ROWS for c in contracts}
        self.buffer = RecordingBuffer(
            folder / "buffer.db",
            DEVICE,
            self.clock.boot,
            history_rows=history,
            priorities=PRIORITIES,
            clock=self.clock.now,
            **self._limits,
        )
        self.buffer.world = world
        if self._tight:
            self._strike_when_history_gives_way()
        fence = Fence(
            Track(world.zones, Rules(max_age_s=30.0, speed_m_s_max=SPEED_M_S), None, self.buffer.fixes()),
            {c.stream: Precision.ZONE_ONLY for c in contracts},
            metrics,
            world.told,
        )
        intake = Intake(contracts, POSITION, fence, HISTORY_ROWS)
        for c in contracts:
            if (stored := self.buffer.history(c.stream, c.version)) is not None:
                intake.remember(c.stream, stored)
        self.fence = fence
        self.uplink = Uplink(
            UplinkConfig(
                DEVICE,
                tuple(EndpointConfig(name, "sim", 1) for name in world.cloud.regions),
                failback_s=2.0,
                limits=OutboxLimits(receipt_timeout_s=5.0),
            ),
            self.buffer,
            lambda lane: world.zones.endpoints(lane),
            lambda document: None,
            rng=random.Random(world.rng.random()),
            clock=lambda: world.now,
            open_link=lambda config, topics, inbox: SimLink(world, config, inbox),  # type: ignore[arg-type,return-value]
        )
        self.path = DataPath(
            intake=intake,
            fence=fence,
            model=ActiveModel(contracts, lambda *of: self.path.storing.history(*of), metrics, world.told),
            buffer=self.buffer,
            uplink=self.uplink,
            clock=self.clock,  # type: ignore[arg-type]
            metrics=metrics,
            tell=world.told,
            pause=self._pause,
        )

    def _strike_when_history_gives_way(self) -> None:
        """History that gave way is not there to tell a reading that comes again: often the agent does not get far after it."""
        shed = self.buffer._room._shed_history

        def struck(wanted: int) -> int:
            blocks = shed(wanted)
            if blocks and self.world.rng.random() < 0.5:
                self.strike(self.world.rng.randrange(40), power=self.world.rng.random() < 0.5, torn=False)
            return blocks

        self.buffer._room._shed_history = struck  # type: ignore[method-assign]

    def take(self, count: int) -> None:
        """Let the data path take a batch, unless it is at one."""
        if self.busy or not self.alive:
            return
        batch = self.sensors.batch(count, self.clock.now().wall_us, self._release)
        if batch is None:
            return
        self.busy, life = True, self._lives
        try:
            self.path.process(batch)
        except Gone:
            pass
        except UnavailableError as e:
            self.world.tell(f"agent ends {e}")
            if life == self._lives:
                self.crash(power=False)
        finally:
            self.busy = False
        if self._doomed is not None:
            self._bury()

    def turn(self) -> None:
        """Let the uplink take a turn."""
        if self.alive and self._doomed is None:
            self.turn_at = self.world.now + self.uplink.turn()
            if self._doomed is None:
                return
        if not self.alive:
            return
        if self.busy:  # it dies as soon as it comes back
            self.turn_at = self.world.now + 1.0
        else:
            self._bury()

    def tidy(self) -> None:
        if self.alive and not self.busy:
            self.uplink.offer(self.path.storing.tidy())
            if self._doomed is not None:
                self._bury()

    def strike(self, operation: int, *, power: bool, torn: bool) -> None:
        """Kill the agent, or cut its power, before the n-th operation on the disk from now."""
        if self.alive:
            self.disk.call_at(operation, lambda: self._doom(power, torn))

    def crash(self, *, power: bool, torn: bool = False) -> None:
        """Kill the agent, or cut its power, now."""
        if self.alive and self._doomed is None:
            self._doom(power, torn)
            if not self.busy:
                self._bury()

    def end(self) -> None:
        """Close the files of this life."""
        self.disk.calm()
        if self.alive:
            self.alive = False
            self._forget()
        self._close_files()

    def _release(self, acknowledge: Callable[[], None]) -> None:
        if self._doomed is not None:
            raise Gone
        if self.world.rng.random() < 0.01:
            self.world.tell("killed before the acknowledgement")
            self._doom(False, False)
            raise Gone
        acknowledge()

    def _pause(self) -> None:
        """The buffer takes nothing: time passes, everything else goes on."""
        life = self._lives
        self.world.pauses += 1
        if self.world.pauses > PAUSES_MAX:
            self.world.tell("held for too long, the agent is stopped")
            self._doom(False, False)
        self.world.run(2.0)
        if self._doomed is not None or self._lives != life:
            raise Gone

    def _doom(self, power: bool, torn: bool) -> None:
        """From now on, nothing that this life does is seen by anybody."""
        if self._doomed is not None:
            return
        source, self._doomed = self._folder(), self._folder(self._lives + 1)
        self.world.tell(f"{'power cut' if power else 'kill'} torn={torn}")
        if power:
            self.disk.power_cut(source, self._doomed, self.world.rng if torn else None)
            self.clock.reboot()
        else:
            self._doomed.mkdir()
            for path in source.iterdir():
                if not path.name.endswith("-shm"):
                    shutil.copy(path, self._doomed / path.name)

    def _bury(self) -> None:
        self._doomed, self.alive = None, False
        self.crashes += 1
        self._forget()
        self._lives += 1
        self.sensors.lose(acknowledgement_lost=self._tight or self.world.rng.random() < 0.5)
        self.world.after(self.world.rng.uniform(0.05, 3.0), self._start_again)

    def _forget(self) -> None:
        self.disk.calm()
        for link in list(self.uplink._sending.links.values()):
            link.end("the agent is gone")  # type: ignore[attr-defined]
        self.buffer.close()  # into the old folder, which nobody reads any more
        self._close_files()

    def _close_files(self) -> None:
        """The kernel closes what a dead process had open."""
        for connection in apsw.connections():
            if connection.filename.startswith(str(self._home)):
                with contextlib.suppress(apsw.Error):  # closed it is, whatever it says
                    connection.close(True)

    def _folder(self, life: int | None = None) -> Path:
        return self._home / f"life-{self._lives if life is None else life}"
