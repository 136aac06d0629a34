"""A world in one process: sensors, the agent's real parts, two regions and a lake, with one clock and one seed.

    with world(seed, folder) as made:
        made.live(steps=60)
        made.settle_down()

Faults are drawn at random: brokers that die, go silent or forget, receipts and blocks that come late, twice or not at all, kills and power
cuts in the middle of a commit, disk errors, clocks that jump, a device that moves from zone to zone, policies that change. Then
all is well again, and the promises are checked:

- every acknowledged message is in the lake, once; or named in the loss ledger; or waits on the disk where no endpoint may take it.
  It may be there twice only if it is a single value, which nothing tells from a new one;
- no block was ever sent where its lane may not go, none reached a region where its readings were not allowed to be captured for;
- no lane starves: what may go somewhere is gone.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import cbor2
import msgspec
import numpy as np

from edge_agent.contract.block import NOWHERE, BlockHeader, decode_block
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.stream import LOSSES, QUARANTINE, Encoding
from edge_agent.core.rejects import to_text
from edge_agent.core.zones import Zones, parse_zones
from tests.faults.disk import BASE, DiskError
from tests.simulators.device import POSITION, SPEED_M_S, Device, QuickDisk, contract
from tests.simulators.network import Cloud, Mode

START_S = 1_700_000_000.0
SETTLE_S, SETTLE_STEP_S = 3_000.0, 10.0
TURNS_AT_ONCE_MAX = 2_000
HALF_ROUND_M = 20_100_000.0  # half the way round the Earth
TRACE_LINES = 40
CLOCK_STEPS_S = (-3_600.0, 3_600.0, -86_400.0, 7 * 86_400.0, -START_S, 2**31 - START_S, 0.0)
DOCUMENT = json.loads((Path(__file__).parents[2] / "contracts" / "zones.geojson").read_bytes())


def policy(**endpoints: list[str]) -> Zones:
    """contracts/zones.geojson, with other endpoints for some zones."""
    document = json.loads(json.dumps(DOCUMENT))
    for feature in document["features"]:
        name = feature["properties"]["zone"].replace("-", "_")
        feature["properties"]["endpoints"] = endpoints.get(name, feature["properties"]["endpoints"])
    return parse_zones(json.dumps(document).encode())


POLICIES = (policy(), policy(canada=["us"], atlantic=["us", "eu"]), policy(europe=["eu", "us"], canada=["eu"]))
PLACES = [(z.name, z.area.representative_point()) for z in POLICIES[0].zones]

ENCODERS: dict[Encoding, Callable[[Any], bytes]] = {
    Encoding.JSON: msgspec.json.encode,
    Encoding.MSGPACK: msgspec.msgpack.encode,
    Encoding.CBOR: cbor2.dumps,
}
TREES = (Encoding.JSON, Encoding.MSGPACK, Encoding.CBOR)
LEVEL = "level"  # the stream of single values

Name = tuple[str, str, str, int]


class World:
    """See the module's rules. In a `tight` one the buffer is small, and the agent often struck when history gives way in it."""

    def __init__(self, seed: int, folder: Path, disk: QuickDisk, *, tight: bool = False) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.now, self.pauses = 100.0, 0
        self.zones = POLICIES[0]
        self.trace: list[str] = []
        pump, alarm = (contract(name, self.rng.choice(TREES)) for name in ("pump", "alarm"))
        self.contracts = (pump, alarm, contract(LEVEL, Encoding.VALUE))
        self._encoders = {c.stream: ENCODERS[c.encoding] for c in self.contracts if c.stream != LEVEL}
        self.acknowledged: set[bytes] = set()
        self.keys: dict[bytes, str] = {}
        self.stored: dict[str, set[Name]] = defaultdict(set)
        self.places: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._place = 0
        self.cloud = Cloud(self, ("eu", "us"))
        small = self.rng.random() < 0.3 or tight
        bytes_max = self.rng.choice([60_000, 120_000]) if small else 1 << 24
        when_full = self.rng.choice(["drop_oldest", "block"])
        self.device = Device(self, folder, disk, bytes_max=bytes_max, when_full=when_full, tight=tight)
        self.tell(f"buffer {bytes_max}")
        self.device.start()
        self.after(1.0, self._tidy)

    # Time.

    def wall_s(self) -> float:
        """True time, seconds since 1970."""
        return START_S + self.now

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + max(0.0, seconds), next(self._order), action))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end, at_once = self.now + seconds, 0
        while True:
            turn_at = self.device.turn_at if self.device.alive else end
            step_to = min(turn_at, self._events[0][0] if self._events else end, end)
            at_once = at_once + 1 if step_to <= self.now else 0
            assert at_once < TURNS_AT_ONCE_MAX, self.story("the uplink spins")
            self.now = max(self.now, step_to)
            if self.now >= end:
                return
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self.device.turn()

    def tell(self, text: str) -> None:
        self.trace.append(f"{self.now:.3f} {text}")

    def told(self, event: str, **fields: str) -> None:
        self.tell(f"event {event}")

    def story(self, what: str) -> str:
        return "\n".join([f"seed {self.seed}: {what}", *self.trace[-TRACE_LINES:]])

    # What happens.

    def live(self, steps: int) -> None:
        """A life full of accidents."""
        for _ in range(steps):
            self._accident()
            self._sense(self.rng.randrange(1, 12))
            self._receive()
            self.run(self.rng.choice([0.02, 0.1, 0.5, 3.0]))

    def _sense(self, count: int) -> None:
        """The device's position, and readings of this moment, some of them broken."""
        _, point = PLACES[self._place]
        ts = round(self.wall_s() + 1e-3 * next(self._order), 6)
        accuracy_m = self.rng.choice([0.0, 10.0, 10.0, 50_000.0])
        position = {"ts": ts, "lat": point.y, "lon": point.x, "accuracy_m": accuracy_m}
        self.device.sensors.publish(POSITION, json.dumps(position).encode())
        for i in range(count):
            number = next(self._numbers)
            self.places[number] = self._place
            stream = self.rng.choices(("pump", "alarm", LEVEL), (6, 2, 2))[0]
            reading: dict[str, Any] = {"ts": ts, "unit": f"u-{i}", "n": number, "place": self._place}
            broken = self.rng.random() < 0.05
            if broken:
                reading["ts"] = "broken"
            else:
                reading["value"] = self.rng.choice([None, round(self.rng.gauss(20, 1), 2), self.rng.random()])
            payload = b"%d" % number if stream == LEVEL else self._encoders[stream](reading)
            if stream == LEVEL and broken:
                payload += b" litres"
            self.keys[payload] = to_text(payload) if broken else f"{stream} {number}"
            self.device.sensors.publish(f"sensors/u-{i}/{stream}", payload)

    def _receive(self) -> None:
        count = self.rng.choice([1, 7, 30, 100])
        self.device.take(count)
        if self.rng.random() < 0.7:
            self.device.take(count)

    def _tidy(self) -> None:
        self.device.tidy()
        self.after(5.0, self._tidy)

    def _accident(self) -> None:
        region = self.rng.choice(list(self.cloud.regions.values()))
        match self.rng.randrange(16):
            case 0:
                self.tell(f"{region.name} killed")
                self.cloud.kill(region.name)
            case 1 | 2 | 3:
                region.mode = self.rng.choice([Mode.UP, Mode.UP, *Mode])
                self.tell(f"{region.name} {region.mode}")
            case 4:
                region.receipts_lost, region.twice = self.rng.choice([0.0, 0.0, 0.5, 1.0]), self.rng.choice([0.0, 0.3])
                region.delay_s, region.round_trip_s = self.rng.choice([0.05, 0.05, 4.0]), self.rng.choice([0.002, 0.1, 0.6])
            case 5:
                self.device.crash(power=self.rng.random() < 0.5, torn=self.rng.random() < 0.5)
            case 6 | 7:
                power, torn = self.rng.random() < 0.5, self.rng.random() < 0.5
                self.device.strike(self.rng.randrange(60), power=power, torn=torn)
            case 8 | 9:
                error = self.rng.choice(list(DiskError))
                self.tell(f"disk {error}")
                self.device.disk.fail_at(self.rng.randrange(40), error)
            case 10:
                self.device.clock.offset_s = self.rng.choice(CLOCK_STEPS_S)
                self.device.clock.synced = self.rng.random() < 0.5
                self.tell(f"clock {self.device.clock.offset_s:.0f} s off, synced={self.device.clock.synced}")
            case 11 | 12:
                self._travel(self.rng.randrange(len(PLACES)))
            case 13:
                self._change_policy(self.rng.choice(POLICIES))
            case 14:
                self.device.sensors.lose(self.rng.random() < 0.5)
                self.tell("sensor broker lost")
            case _:
                pass

    def _travel(self, place: int) -> None:
        """To another zone, no faster than the rules allow; no sensor speaks on the way."""
        (_, here), (zone, there) = PLACES[self._place], PLACES[place]
        metres = HALF_ROUND_M * min(1.0, here.distance(there) / 90.0)  # more than the great circle
        self.run(metres / SPEED_M_S)
        self._place = place
        self.tell(f"moved to {zone}")

    def _change_policy(self, zones: Zones) -> None:
        if self.device.alive and not self.device.busy:
            self.tell("policy changed")
            self.device.fence.offer(zones)
            self.device.path.refresh()
            self.zones = zones

    # What is known.

    def note_acknowledged(self, payloads: list[bytes]) -> None:
        self.tell(f"acknowledged {len(payloads)}")
        self.acknowledged.update(payloads)

    def note_stored(self, header: BlockHeader, table: Table) -> None:
        self.tell(f"stored {header.lane} {header.sequence} {header.stream} rows={header.rows}")
        for key in keys_of(header, table):
            self.stored[key].add(header.identity)

    def check_place(self, header: BlockHeader, table: Table, region: str) -> None:
        """Readings may only be where the place that they were truly captured at allows."""
        if header.stream in ("pump", "alarm"):
            for place in np.unique(np.asarray(table["place"])).tolist():
                zone = PLACES[place][0]
                allowed = {e for p in POLICIES for e in p.endpoints(zone)} if len(POLICIES) > 1 else set()
                assert region in allowed, self.story(f"reading of {zone} reached {region} in lane {header.lane}")

    # The end.

    def settle_down(self) -> None:
        """All is well again; then the promises must hold."""
        self.device.disk.calm()
        for region in self.cloud.regions.values():
            region.mode, region.receipts_lost, region.twice, region.delay_s, region.round_trip_s = Mode.UP, 0.0, 0.0, 0.05, 0.002
        self.tell("all is well")
        self.pauses = 0
        end = self.now + SETTLE_S
        while self.now < end and not self._quiet():
            self.device.take(100)
            self.run(SETTLE_STEP_S if not self.device.sensors.queue else 0.5)
        starving = {s.lane: s.blocks for s in self.device.buffer.lanes() if self.zones.endpoints(s.lane)}
        assert not starving, self.story(f"lanes starve: {starving}")
        self._check_account()

    def _quiet(self) -> bool:
        device = self.device
        waiting = any(self.zones.endpoints(s.lane) for s in device.buffer.lanes()) if device.alive else True
        return device.alive and not waiting and (not device.sensors.queue or self.pauses > 0)

    def _check_account(self) -> None:
        lake: Counter[str] = Counter()
        lost: set[Name] = set()
        unnamed = 0.0
        held: set[str] = set()
        blocks = [(h, t) for h, t, _ in self.cloud.lake.blocks.values()]
        for state in self.device.buffer.lanes():
            assert not self.zones.endpoints(state.lane)
            blocks += [decode_block(b.block) for b in self.device.buffer.pending(state.lane, 0, 1_000_000)]
        names = {name for several in self.stored.values() for name in several}
        for header, table in blocks:
            if header.stream == LOSSES.stream:
                for name, readings in losses_of(header, table):
                    lost.add(name)
                    unnamed += readings if name not in names else 0.0
            elif header.identity in self.cloud.lake.blocks:
                lake.update(keys_of(header, table))
            else:
                held.update(keys_of(header, table))
        known = [self.keys[payload] for payload in self.acknowledged if payload in self.keys]  # the others are positions
        missing = [key for key in known if not lake[key] and key not in held and not (self.stored[key] & lost)]
        assert len([k for k in missing if self.stored[k]]) == 0, self.story(f"lost without a word: {missing[:5]}")
        assert len(missing) <= unnamed, self.story(f"{len(missing)} readings lost, {unnamed} named: {missing[:5]}")
        twice = [key for key, count in lake.items() if count > 1 and key.startswith(("pump", "alarm"))]
        assert not twice, self.story(f"more than once in the lake: {[(k, sorted(self.stored[k])) for k in twice[:5]]}")


def keys_of(header: BlockHeader, table: Table) -> list[str]:
    """How the messages in a block are known: readings by stream and number, broken ones by their text."""
    if header.stream == QUARANTINE.stream:
        column = table["payload"]
        assert isinstance(column, Strings)
        return column.tolist()
    return [f"{header.stream} {n}" for n in table["n"].tolist()] if "n" in table else []


def losses_of(header: BlockHeader, table: Table) -> Iterator[tuple[Name, float]]:
    """The blocks that a ledger block names, each with its share of the readings."""
    columns = (table[name].tolist() for name in ("of_epoch", "of_lane", "first_sequence", "last_sequence", "blocks", "readings"))
    for epoch, lane, first, last, blocks, readings in zip(*columns, strict=True):
        for sequence in range(first, min(last, first + 10_000) + 1):
            yield (header.device, epoch, lane, sequence), (0.0 if readings != readings else readings / max(1, blocks))


@contextmanager
def world(seed: int, folder: Path, *, tight: bool = False) -> Iterator[World]:
    """A world on a disk of its own."""
    disk = QuickDisk()
    made = None
    try:
        made = World(seed, folder, disk, tight=tight)
        yield made
    finally:
        if made is not None:
            made.device.end()
        disk.close()
        apsw.set_default_vfs(BASE)


assert NOWHERE not in {name for name, _ in PLACES}
