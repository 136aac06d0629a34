"""The control loop: what fails in one step is said, and the others go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cloud import brokers, config
from cloud.control import Control
from cloud.watch import read_quality
from tests.brokers import free_port
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON


def test_a_fault_in_one_step_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    region = f"[[regions]]\nname = 'eu'\nport = {free_port()}\n"
    (tmp_path / "fenceline.toml").write_text(f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n{region}")
    settings = config.load(tmp_path)
    secret = brokers.password_path(settings, brokers.CLOUD_USER)
    secret.parent.mkdir(parents=True)
    secret.write_text("c")
    control = Control(settings)

    def fault() -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(control.regions[0], "step", fault)
    control.start()
    try:
        deadline = time.monotonic() + 60
        while read_quality(settings) is None or caplog.text.count("control step failed") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        control.stop()
    assert "a fault of ours" in caplog.text
