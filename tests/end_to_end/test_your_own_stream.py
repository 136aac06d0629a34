"""docs/your-own-stream.md, followed: a pump's sensor messages through agent, ingest and lake, and the page's commands on the result."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud import brokers, cli, config, ingest
from cloud.audit import Audit
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.lake import Lake
from cloud.watch import open_lake
from edge_agent.contract.privacy import is_hashed
from tests.brokers import Broker, User, nats_broker
from tests.edge_agent.gateway import Bench, wait_for

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-own-stream.md").read_text(encoding="utf-8")
CONTRACT = ROOT / "contracts" / "pump.odcs.yaml"
SAMPLES = 300
SECRET = "Jane Doe"


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


class Gateway(Bench):
    """A gateway as the page sets it up; its contract is an older one, with a wider range."""

    def __init__(self, path: Path, sensors: Broker, eu: Broker) -> None:
        super().__init__(path, sensors, eu)
        self.cloud.close()
        text = CONTRACT.read_text().replace("{minimum: 0, maximum: 100}", "{minimum: 0, maximum: 1000}")
        (path / "pump.odcs.yaml").write_text(text)
        (path / "pii.key").write_text("ab" * 32 + "\n")
        streams = next(block for block in blocks_of("toml") if "[[streams]]" in block)
        self.replace('[[streams]]\ncontract = "turbofan.odcs.yaml"\n', streams)
        self.replace(f':{eu.port}"', f':{eu.port}"\nusername = "plane-01"\npassword_file = "password"')
        (path / "password").write_text("p")

    def sample(self, number: int, start_s: float, **changes: object) -> None:
        reading = {**json.loads(blocks_of("json")[0]), "ts": round(start_s + number / 100, 2), "vibration": 2.0 + number % 7 / 10}
        self.publish(json.dumps({**reading, **changes}).encode(), "pump")

    def close(self) -> None:
        if self.agent is not None:
            self.kill()
        self._publisher.disconnect()
        self._publisher.loop_stop()


@pytest.fixture
def eu(tmp_path: Path) -> Iterator[Broker]:
    with nats_broker(tmp_path, [User("cloud", "c"), User("plane-01", "p")], name="eu") as running:
        yield running


@pytest.fixture
def gateway(tmp_path: Path, eu: Broker) -> Iterator[Gateway]:
    with nats_broker(tmp_path, name="sensors") as sensors:
        folder = tmp_path / "gateway"
        folder.mkdir()
        found = Gateway(folder, sensors, eu)
        yield found
        found.close()


@pytest.fixture
def settings(tmp_path: Path, eu: Broker) -> Settings:
    project = tmp_path / "project"
    (project / "contracts").mkdir(parents=True)
    for name in ("pump.odcs.yaml", "zones.geojson"):
        shutil.copy(ROOT / "contracts" / name, project / "contracts")
    contracts = next(block for block in blocks_of("toml") if block.startswith("contracts"))
    (project / "fenceline.toml").write_text(f"{contracts}[quality]\ngrace_s = 0.001\n[[regions]]\nname = 'eu'\nport = {eu.port}\n")
    found = config.load(project)
    path = brokers.password_path(found, brokers.CLOUD_USER)
    path.parent.mkdir(parents=True)
    path.write_text("c")
    Fleet(found.fleet_db).add("plane-01")
    return found


def say(settings: Settings, capsys: pytest.CaptureFixture[str], command: str, *more: str) -> tuple[int, str]:
    words = shlex.split(command.replace("gateway-1", "plane-01"))
    assert words[0] == "fenceline"
    code = cli.main(["--project", str(settings.project), *words[1:], *more])
    return code, capsys.readouterr().out


def rows(settings: Settings, stream: str) -> int:
    return Lake(settings.lake).read(stream, columns=["row"]).num_rows


def test_the_page_shows_what_is_in_the_contract() -> None:
    for block in blocks_of("yaml"):
        assert block in CONTRACT.read_text()


def test_the_page_followed(settings: Settings, gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    work = ingest.build(settings, "eu")
    work.intake.open()
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        gateway.start_now()
        wait_for(lambda: gateway.status()["sensors"]["connected"], gateway.log, 60)
        start_s = time.time() - SAMPLES / 100
        for number in range(SAMPLES):
            gateway.sample(number, start_s, operator=SECRET, **({"vibration": 640.0} if number % 100 == 50 else {}))
        gateway.sample(0, start_s, operator=SECRET)  # delivered again
        gateway.sample(SAMPLES, start_s, vibration=-3, operator=SECRET)
        gateway.publish(b'{"operator": "Jane Doe"', "pump")
        wait_for(lambda: rows(settings, "pump") == SAMPLES - 3 and rows(settings, "quarantine") == 2, gateway.log, 60)
    finally:
        work.stop = True
        thread.join()
        work.intake.close()
    commands = [line for block in blocks_of("sh") for line in block.strip().splitlines()]
    found = [say(settings, capsys, command, "--json") for command in commands]
    answers = dict(zip(commands, found, strict=True))
    _check_queries(settings, capsys, answers[commands[0]])
    _check_quarantine(answers)
    pump, device = (json.loads(answers[c][1]) for c in commands if "completeness" in c)
    assert pump["share"] == device["share"] == 1.0 and not pump["alarm"]
    assert pump["readings"] == {"stored": SAMPLES - 3, "quarantined": 3, "lost": 0.0}
    lake = open_lake(settings)
    everything = [source.read(stream).to_pylist() for source in (lake.lake, lake.held) for stream in source.streams()]
    assert len(everything) == 3 and SECRET not in str(everything)
    _release_after_a_wider_contract(settings, capsys)


def _check_queries(settings: Settings, capsys: pytest.CaptureFixture[str], answer: tuple[int, str]) -> None:
    assert answer[0] == 0 and json.loads(answer[1]) == [{"pump": "p-7", "samples": SAMPLES - 3, "worst": 2.6}]
    _, out = say(settings, capsys, "fenceline query 'SELECT DISTINCT operator, pulse, lane FROM pump'", "--json")
    (row,) = json.loads(out)
    assert is_hashed(row["operator"]) and (row["pulse"], row["lane"]) == (70.0, "europe")


def _check_quarantine(answers: dict[str, tuple[int, str]]) -> None:
    groups = {(g["origin"], g["reason"]): g["rows"] for g in json.loads(answers["fenceline quarantine list"][1])}
    assert groups == {("device", "out_of_range"): 1, ("device", "malformed"): 1, ("ingest", "out_of_range"): 3}
    shown = json.loads(answers["fenceline quarantine show --stream pump"][1])
    assert [row["broken"] for row in shown if row["origin"] == "ingest"] == [{"vibration": "0 to 100 mm/s allowed"}] * 3
    refused = next(row for row in shown if row["reason"] == "out_of_range" and row["origin"] == "device")
    assert "is -3 mm/s" in refused["detail"] and is_hashed(json.loads(refused["payload"].removeprefix("redacted:"))["operator"])
    code, out = answers["fenceline quarantine release --stream pump"]
    assert code == 1 and json.loads(out)["released"] == 0


def _release_after_a_wider_contract(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """As the page says: the sensor was right; raise the maximum and the version, then release."""
    wider = CONTRACT.read_text().replace("{minimum: 0, maximum: 100}", "{minimum: 0, maximum: 1000}")
    (settings.project / "contracts" / "newer.odcs.yaml").write_text(wider.replace("version: 1.0.0", "version: 1.0.1"))
    toml = settings.project / "fenceline.toml"
    listed = '"contracts/pump.odcs.yaml"'
    toml.write_text(toml.read_text().replace(listed, f'{listed}, "contracts/newer.odcs.yaml"'))
    code, out = say(settings, capsys, "fenceline quarantine release --stream pump", "--json")
    assert (code, json.loads(out)["released"]) == (1, 3)  # the two payloads are wrong whatever the range
    assert rows(settings, "pump") == SAMPLES
    assert "quarantine_released" in {entry.kind for entry in Audit(settings.audit_db).entries()}
