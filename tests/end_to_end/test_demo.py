"""The whole journey, small: what `fenceline demo` promises, on real brokers, processes, lake, Ray, MLflow and TUF."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
TRIAL = "{learning_rate: 0.1, max_iter: 60, max_leaf_nodes: 9, min_samples_leaf: 20, l2_regularization: 1.0, max_features: 1.0}"
SMALL = (
    "train.folds=2",
    f"train.search=[{TRIAL}]",
    "evaluate.rmse_max=40.0",
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: Ray's sockets lie in it, and their names may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="fl-") as name:
        yield Path(name)


def command(place: Path, *words: str) -> list[str]:
    sets = [word for assignment in SMALL for word in ("--set", assignment)]
    report = str(place / "report.json")
    return [sys.executable, "-m", "cloud.cli", "--project", str(PROJECT), "demo", "--report", report, *sets, *words]


def environment(place: Path) -> dict[str, str]:
    """An empty home, and a temporary directory that can be searched for what was left."""
    (place / "home").mkdir()
    (place / "tmp").mkdir()
    return {**os.environ, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONPATH": str(PROJECT)}


def processes_of(place: Path) -> list[str]:
    """Command lines of living processes that name this test's directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(place) in line and int(entry.name) != os.getpid():
            found.append(line)
    return found


@pytest.mark.timeout(420)
def test_a_reading_travels_from_a_sensor_to_a_model_and_back(place: Path) -> None:
    done = subprocess.run(
        command(place, "--devices", "2", "--engines", "5", "--json"),
        env=environment(place), cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8_000:] + done.stdout[-2_000:]
    report = json.loads(done.stdout)
    assert report == json.loads((place / "report.json").read_text())
    assert report["broken"] == []
    assert (report["lost"], report["duplicates"], report["out_of_zone"], report["altered"], report["quarantined"]) == (0, 0, 0, 0, 0)
    assert report["readings_in_lake"] == report["readings_published"] == sum(report["rows_by_lane"].values()) > 900
    assert {"switzerland", "europe", "atlantic", "canada", "united-states"} <= set(report["rows_by_lane"])
    assert set(report["rows_by_region"]) == {"eu", "us"}
    assert (report["broker_kills"], report["agent_kills"]) == (1, 1)
    assert report["border_crossings"], "no aircraft crossed a border during the outage"
    for crossing in report["border_crossings"]:
        assert crossing["delivered"] == crossing["waiting"] and crossing["flowed"], crossing
    assert report["devices_running_model"] == report["devices"] == 2
    assert report["readings_scored_on_device"] > 100
    assert report["edge_cloud_parity_max_abs_diff"] <= 1e-6
    assert report["uplink_bytes_per_reading"] < report["sensor_bytes_per_reading"]
    assert report["mlflow_run_id"] and report["model_version"] == "1"
    assert {"collect", "train", "release", "score", "verify"} <= set(report["seconds_by_phase"])
    assert processes_of(place) == []
    assert list((place / "tmp").glob("fenceline-demo-*")) == [], "a good demonstration cleans up"


@pytest.mark.timeout(180)
def test_a_demonstration_that_is_stopped_leaves_no_process(place: Path) -> None:
    process = subprocess.Popen(
        command(place, "--devices", "2", "--engines", "2"),
        env=environment(place), cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # until the agents run and the sensors send
            lines.append(line)
            if line.startswith("collect"):
                break
        assert lines and lines[-1].startswith("collect"), "".join(lines)
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    finally:
        process.kill()
        process.wait()
    assert processes_of(place) == []


def test_a_directory_without_nasas_files_is_refused_before_anything_starts(place: Path) -> None:
    done = subprocess.run(
        command(place, "--cmapss", str(place)),
        env=environment(place), cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "neither train_FD001.txt nor train_FD001.txt.gz" in done.stdout + done.stderr
    assert list((place / "tmp").glob("fenceline-demo-*")) == []
