"""Exactly once: ingest is killed at every step of a commit and at random instants, and each reading is in the lake once.

Two workers share one subscription of a real Mosquitto, and each lives many short lives. Devices send half of the blocks again, out of
order, and whatever has no receipt for a while once more. Oracle: every block gets a receipt in the end (0 lost), and the lake holds each
reading once.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config
from cloud.config import Settings
from cloud.lake import Lake
from edge_agent.contract.receipt import SequenceSet, decode_receipt
from edge_agent.contract.topics import PREFIX, DeviceTopics, Kind
from tests.brokers import Broker, mosquitto_broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block_bytes
from tests.faults.doomed_ingest import LAST, STEPS

ROOT = Path(__file__).parents[2]
DEVICES = 4
AGAIN = 0.5
OPEN_MAX = 60  # blocks without receipt
RESEND_S = 3.0
END_S = 600.0
LIVES_S = 30.0  # of the short run: on a busy machine fewer deaths, not a longer run
SMALL_FILES_MAX = 15

pytestmark = pytest.mark.needs_mosquitto


class Devices:
    """Some devices on one connection. A block is sent, perhaps twice, and again until a receipt names it."""

    def __init__(self, broker: Broker, blocks: int, rows: int, chance: random.Random) -> None:
        self.blocks, self.rows, self._chance = blocks, rows, chance
        self.sent: dict[tuple[str, int], float] = {}
        self.copies = self.receipts = 0
        self.settled: dict[str, SequenceSet] = {name: SequenceSet() for name in self.names}
        self._waiting = [(name, sequence) for sequence in range(blocks, 0, -1) for name in self.names]
        self._sealed: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="devices")
        self._client.on_message = self._take
        self._client.on_connect = lambda client, *_: client.subscribe(f"{PREFIX}/+/{Kind.RECEIPTS}", 1)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    @property
    def names(self) -> list[str]:
        return [f"d{i}" for i in range(DEVICES)]

    @property
    def open(self) -> list[tuple[str, int]]:
        with self._lock:
            return [(name, sequence) for name, sequence in self.sent if sequence not in self.settled[name]]

    def turn(self, allowed: int) -> None:
        """Send what may be sent now: new blocks up to `allowed` in all, copies, and what waits too long for its receipt."""
        open_, now = self.open, time.monotonic()
        new: list[tuple[str, int]] = []
        while self._waiting and len(open_) + len(new) < OPEN_MAX and len(self.sent) + len(new) < allowed:
            new.append(self._waiting.pop())
        copies = [block for block in new if self._chance.random() < AGAIN]
        late = [block for block in open_ if now - self.sent[block] > RESEND_S]
        if not self._waiting and not open_ and self.sent:
            copies.append(self._chance.choice(list(self.sent)))  # something to do for those that have not died yet
        self.copies += len(copies) + len(late)
        order = [*new, *copies, *late]
        self._chance.shuffle(order)
        for name, sequence in order:
            self.sent[name, sequence] = now
            if (name, sequence) not in self._sealed:
                self._sealed[name, sequence] = block_bytes(sequence, device=name, rows=self.rows)
            self._client.publish(DeviceTopics(name).up("europe", "pump"), self._sealed[name, sequence], qos=1)

    @property
    def done(self) -> bool:
        return not self._waiting and not self.open

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _take(self, client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        receipt = decode_receipt(message.payload)
        with self._lock:
            self.receipts += 1
            for lane in receipt.lanes:
                self.settled[receipt.device].add_range(1, lane.cumulative)
                for first, last in lane.ranges:
                    self.settled[receipt.device].add_range(first, last)


@contextmanager
def doomed(settings: Settings, folder: Path, kills: int, lives_s: float, seed: int) -> Iterator[list[Path]]:
    """Two workers that share `kills` deaths between them, or what `lives_s` leave time for; the files that tell of these."""
    logs = [folder / f"deaths-{number}.jsonl" for number in (1, 2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = []
    with (folder / "ingest.log").open("wb") as output:
        for number, log in enumerate(logs, 1):
            log.touch()
            arguments = ["--worker", str(number), "--of", "2", "--kills", str(kills // 2), "--lives-s", str(lives_s)]
            arguments += ["--seed", str(seed + number), "--log", str(log)]
            command = [sys.executable, "-m", "tests.faults.doomed_ingest", "--project", str(settings.project), *arguments]
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        try:
            yield logs
        finally:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def deaths(logs: list[Path]) -> Counter[str]:
    return Counter(json.loads(line)["step"] for log in logs for line in log.read_text().splitlines())


def a_project(folder: Path, broker: Broker) -> Settings:
    folder.mkdir()
    (folder / "pump.yaml").write_text(CONTRACT_YAML)
    (folder / "zones.geojson").write_bytes(ZONES_JSON)
    (folder / "fenceline.toml").write_text(
        "contracts = ['pump.yaml']\nzones = 'zones.geojson'\n"
        f"[[regions]]\nname = 'eu'\nport = {broker.port}\nmqtt = 5\nshared_subscriptions = true\n"
        f"[lake]\nsmall_files_max = {SMALL_FILES_MAX}\n"
    )
    settings = config.load(folder)
    brokers.password(settings, brokers.CLOUD_USER)
    return settings


def prove(tmp_path: Path, kills: int, readings: int, rows: int, seed: int, lives_s: float = math.inf) -> Counter[str]:
    """The deaths, by step."""
    chance = random.Random(seed)
    blocks = readings // rows // DEVICES
    total = blocks * DEVICES
    with mosquitto_broker(tmp_path, extra=("autosave_on_changes false",)) as broker:
        settings = a_project(tmp_path / "project", broker)
        devices = Devices(broker, blocks, rows, chance)
        with doomed(settings, tmp_path, kills, lives_s, seed) as logs:
            died, last, progress = 0, False, time.monotonic()
            while not (last and devices.done):
                by_step = deaths(logs)
                last = by_step.pop(LAST, 0) == 2
                now_dead = by_step.total()
                if now_dead > died or devices.open == []:
                    progress = time.monotonic()
                died = now_dead
                devices.turn(allowed=total if last else total * (died + 1) // (kills // 2 * 2 + 1) + OPEN_MAX)
                assert time.monotonic() - progress < END_S, f"no progress: {(tmp_path / 'ingest.log').read_text(errors='replace')[-3000:]}"
                time.sleep(0.02)
        devices.close()
    table = Lake(settings.lake).read("pump", columns=["device", "sequence", "row", "count"])
    found = Counter(zip(*(table[name].to_pylist() for name in ("device", "sequence", "row")), strict=True))
    lost = total * rows - len(found)
    duplicates = table.num_rows - len(found)
    print(f"{by_step.total()} kills {dict(by_step)}; {total * rows} readings, {devices.copies} copies of {total} blocks, ", end="")
    print(f"{devices.receipts} receipts; {lost} lost, {duplicates} duplicates")
    assert (lost, duplicates) == (0, 0)
    named = zip(*(table[name].to_pylist() for name in ("sequence", "row", "count")), strict=True)
    assert all(count == (sequence - 1) * rows + row for sequence, row, count in named)
    return by_step


def test_killed_at_any_step_every_reading_is_in_the_lake_once(tmp_path: Path, seed: int) -> None:
    by_step = prove(tmp_path, kills=12, readings=6_000, rows=50, seed=seed, lives_s=LIVES_S)
    assert by_step.total() >= 2, "a machine so busy that hardly a life ended"


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_500_kills_and_a_million_readings(tmp_path: Path, seed: int) -> None:
    kills = int(os.environ.get("FENCELINE_RUNS", "500"))
    by_step = prove(tmp_path, kills=kills, readings=2_000 * kills, rows=200, seed=seed)
    assert by_step.total() == kills // 2 * 2
    if kills >= 300:
        assert set(by_step) >= set(STEPS), f"never reached: {set(STEPS) - set(by_step)}"
