"""A whole plant in one folder, each part a process of its own: sensors' broker, agent, regional broker, ingest with a real lake.

What the benchmarks of the edge path share. Both brokers are Mosquitto, the agent is `edge-agent run`, the ingest `cloud.ingest`.

    with Plant(folder) as plant:
        plant.start_agent()
        report = plant.play(rate=1_000, seconds=10)
        arrivals = plant.arrivals()
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from deltalake import DeltaTable

from cloud import brokers, config
from cloud.config import Settings
from cloud.handle import blocks_of
from cloud.ingest_status import read_status
from edge_agent.contract.errors import UnavailableError
from edge_agent.status import ask
from tests.brokers import Broker, mosquitto_broker
from tests.servers import free_port

CONTRACTS = Path(__file__).parents[1] / "contracts"
DEVICE, ZONE, STREAM = "plane-01", "europe", "turbofan"
WAIT_S = 60.0
SAVE_RARELY = ("autosave_on_changes false", "autosave_interval 1800")  # the tests' brokers write all they hold at every message


@dataclass(frozen=True)
class Arrivals:
    """Rows of the lake: event time (µs) and the time (µs) of the commit that made each visible; `keys` name the readings."""

    event_us: npt.NDArray[np.int64]
    commit_us: npt.NDArray[np.int64]
    keys: list[str]


class Plant:
    """See the module. `settings` is more TOML for agent.toml; `listen`: sensors connect to the agent itself."""

    def __init__(self, folder: Path, *, settings: str = "", listen: bool = False) -> None:
        self.folder, self.listen = folder, listen
        self._stack = contextlib.ExitStack()
        self._settings = settings
        self.agent: subprocess.Popen[bytes] | None = None
        self.ingest: subprocess.Popen[bytes] | None = None
        self.sensors_port = 0

    def __enter__(self) -> Plant:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_agent(signal.SIGKILL)
        self._stack.close()

    def _start(self) -> None:
        self.region = self._stack.enter_context(mosquitto_broker(self.folder, name="region", extra=SAVE_RARELY))
        if self.listen:
            self.sensors_port = free_port()
        else:
            self.sensors: Broker = self._stack.enter_context(mosquitto_broker(self.folder, name="sensors", extra=SAVE_RARELY))
            self.sensors_port = self.sensors.port
        self.cloud = self._project()
        self.start_ingest()
        self.wait_for_ingest()
        self.config = self.write_config(self.region.port)

    def write_config(self, region_port: int) -> Path:
        """agent.toml, with the region's endpoint at that port (a proxy's, perhaps)."""
        for name in ("turbofan.odcs.yaml", "zones.geojson"):
            shutil.copy(CONTRACTS / name, self.folder)
        where = f"mqtt://127.0.0.1:{self.sensors_port}"
        sensors = f'listen = "{where}"' if self.listen else f'url = "{where}"\nsubscribe = "sensors/{DEVICE}/#"'
        path = self.folder / "agent.toml"
        path.write_text(
            f'device = "{DEVICE}"\nstate_dir = "state"\nzones = "zones.geojson"\n\n[sensors]\n{sensors}\n\n'
            '[[streams]]\ncontract = "turbofan.odcs.yaml"\n\n[position]\nsource = "static"\nlat = 50.0\nlon = 9.0\n\n'
            f'[[endpoints]]\nname = "eu"\nurl = "mqtt://127.0.0.1:{region_port}"\n\n{self._settings}\n'
        )
        return path

    def start_agent(self) -> float:
        """Start it; returns the seconds from exec until it answers."""
        started = time.perf_counter()
        with (self.folder / "agent.log").open("ab") as log:
            command = [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(self.config)]
            self.agent = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait(lambda: bool(self.status()["device"]))
        ready_s = time.perf_counter() - started
        if not self.listen:
            self.wait(lambda: "source connected" in self.agent_log())
        return ready_s

    def stop_agent(self, sign: signal.Signals = signal.SIGTERM) -> None:
        if self.agent is not None:
            self.agent.send_signal(sign)
            self.agent.wait(WAIT_S)
            self.agent = None

    def agent_log(self) -> str:
        return (self.folder / "agent.log").read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        return ask(self.folder / "state")

    def sensor_command(self, rate: float, seconds: float, out: Path) -> list[str]:
        """The command of a process that plays sensors; see bench/sensors.py."""
        arguments = ["--port", str(self.sensors_port), "--rate", str(rate), "--seconds", str(seconds), "--out", str(out)]
        return [sys.executable, "-m", "bench.sensors", *arguments]

    def play(self, rate: float, seconds: float) -> dict[str, Any]:
        """Play sensors to the end; returns their report."""
        out = self.folder / f"sensors-{time.monotonic_ns()}.json"
        subprocess.run(self.sensor_command(rate, seconds, out), check=True, timeout=seconds + 2 * WAIT_S)
        report: dict[str, Any] = json.loads(out.read_text())
        return report

    def wait(self, done: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Wait for a condition, which may fail while the agent is not there.

        Raises:
            TimeoutError: it did not come true; the message ends with the agent's log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(UnavailableError, KeyError, FileNotFoundError):
                if done():
                    return
            time.sleep(0.01)
        raise TimeoutError(f"plant: condition not met in {timeout_s} s; the agent's log ends\n{self.agent_log()[-2000:]}")

    @property
    def table(self) -> str:
        """The address of the lake's table."""
        return self.cloud.lake.of(ZONE).path(ZONE, STREAM)

    def rows(self) -> int:
        """Rows that the ingest has committed since it started."""
        found = read_status(self.cloud, "eu")
        return found.rows if found else 0

    def arrivals(self) -> Arrivals:
        """All rows of the lake, with the time at which each became visible."""
        table = DeltaTable(self.table)
        commits: dict[tuple[str, str, str, int], int] = {}
        for commit in table.history():
            commits |= dict.fromkeys(blocks_of(commit), commit["timestamp"] * 1_000)
        rows = table.to_pyarrow_table(columns=["ts", "engine", "epoch", "lane", "sequence"])
        event_us = rows["ts"].cast("int64").to_numpy()
        names = zip(rows["epoch"].to_pylist(), rows["lane"].to_pylist(), rows["sequence"].to_pylist(), strict=True)
        commit_us = np.array([commits[(DEVICE, *name)] for name in names], np.int64)
        keys = [f"{engine} {us}" for engine, us in zip(rows["engine"].to_pylist(), event_us.tolist(), strict=True)]
        return Arrivals(event_us, commit_us, keys)

    def _project(self) -> Settings:
        project = self.folder / "project"
        project.mkdir()
        for name in ("turbofan.odcs.yaml", "zones.geojson"):
            shutil.copy(CONTRACTS / name, project)
        (project / "fenceline.toml").write_text(
            f"contracts = ['turbofan.odcs.yaml']\nzones = 'zones.geojson'\n[[regions]]\nname = 'eu'\nport = {self.region.port}\n"
        )
        found = config.load(project)
        path = brokers.password_path(found, brokers.CLOUD_USER)
        path.parent.mkdir(parents=True)
        path.write_text("not asked for")
        return found

    def start_ingest(self) -> None:
        with (self.folder / "ingest.log").open("ab") as log:
            command = [sys.executable, "-m", "cloud.ingest", "--region", "eu", "--project", str(self.cloud.project)]
            self.ingest = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
        self._stack.callback(self.stop_ingest)

    def stop_ingest(self) -> None:
        """kill -9; nothing happens if it is not running."""
        if self.ingest is not None:
            self.ingest.kill()
            self.ingest.wait()
            self.ingest = None

    def wait_for_ingest(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            found = read_status(self.cloud, "eu")
            if found is not None and found.connected:
                return
            time.sleep(0.05)
        raise TimeoutError(f"ingest did not connect: {(self.folder / 'ingest.log').read_text()[-2000:]}")


def percentiles(values_us: Any) -> tuple[float, float]:
    """p50 and p99 in milliseconds of microseconds."""
    p50, p99 = np.percentile(np.asarray(values_us, np.float64), [50, 99]) / 1e3
    return float(p50), float(p99)
