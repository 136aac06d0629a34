"""`fenceline`: exit codes, messages that say what to do, and JSON on stdout alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud import cli, config
from edge_agent.addresses import Subscription
from edge_agent.config import load as load_agent

ROOT = Path(__file__).parents[2]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on a fresh state directory: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["--project", str(ROOT), "--state", str(tmp_path / "state"), *words])
        except SystemExit as e:
            code = int(str(e.code))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def answer(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_help_is_fast_and_names_every_command() -> None:
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-m", "cloud.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seconds = time.monotonic() - started
    data = ("replay", "import-buffer", "labels", "clock")
    for command in ("up", "status", "ui", *data, "train", "release", "rollout", "keys", "device", "demo"):
        assert f"    {command} " in said
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, cloud.cli; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "pyarrow", "deltalake", "mlflow", "ray"} & set(imported), f"help took {seconds:.2f} s"


def test_a_device_needs_keys_first_then_gets_a_directory_its_agent_accepts(run: Run, tmp_path: Path) -> None:
    code, _, err = run("device", "add", "plane-01")
    assert code == 2 and "fenceline keys init" in err

    keys = answer(run("keys", "init", "--json"))
    assert Path(keys["root"]).is_file()
    moving = load_agent(Path(answer(run("device", "add", "plane-01", "--json"))["config"]))
    standing = load_agent(Path(answer(run("device", "add", "pole-01", "--home", "48.1,11.5", "--json"))["config"]))

    assert moving.fixed_lane is None and moving.settings.position.topic == "sensors/plane-01/position"
    assert standing.fixed_lane == "europe"
    (sensors,) = moving.sensors
    assert isinstance(sensors, Subscription) and sensors.broker.username == "sensor" and sensors.broker.password
    assert {(name, e.username, bool(e.password)) for name, e in moving.endpoints.items()} == {
        ("eu", "plane-01", True),
        ("us", "plane-01", True),
    }
    assert moving.root == Path(keys["root"]).read_bytes()
    for path in (tmp_path / "state/devices/plane-01").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert [d["device"] for d in answer(run("device", "list", "--json"))] == ["plane-01", "pole-01"]


def test_a_device_gets_a_new_password_and_is_removed(run: Run, tmp_path: Path) -> None:
    run("keys", "init")
    config = answer(run("device", "add", "plane-01", "--json"))["config"]
    before = load_agent(Path(config)).endpoints["eu"].password
    said = answer(run("device", "password", "plane-01", "--json"))
    assert said == {"device": "plane-01", "password_file": str(tmp_path / "state/devices/plane-01/plane-01.password")}
    assert load_agent(Path(config)).endpoints["eu"].password not in (before, None)
    assert answer(run("device", "remove", "plane-01", "--json")) == {"device": "plane-01", "removed": True, "brokers_to_tell": []}
    assert answer(run("device", "list", "--json")) == []
    assert run("device", "remove", "plane-01") == (0, "device plane-01 was removed before\n", "")
    assert answer(run("completeness", "plane-01", "--json"))["device"] == "plane-01"
    assert run("device", "password", "plane-01")[0] == 2
    assert answer(run("device", "add", "plane-01", "--json"))["config"] == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device", "add", "Plane 1"], "must match"),
        (["device", "remove", "ship"], "there is no device 'ship'"),
        (["device", "password", "ship"], "there is no device 'ship'"),
        (["device", "add", "ship", "--home", "0,-150"], "lies in no zone"),
        (["device", "add", "ship", "--home", "91,0"], "out of bounds"),
        (["replay", "x.csv"], "fenceline device add NAME"),
        (["replay", "x.csv", "--device", "d1", "--mapping", "cmaps"], "did you mean 'cmapss'"),
        (["replay", "x.csv", "--device", "d1", "--stream", "turbofn"], "did you mean 'turbofan'"),
        (["labels", "add", "x.csv", "--run-to-failure", "--mapping", "cmapss"], "x.csv"),
        (["rollout", "status"], "there is no rollout"),
        (["rollout", "undo"], "there is no rollout"),
        (["rollout", "start", "m"], "fenceline release m@champion"),
        (["release", "turbofan-rul@champion"], "turbofan-rul"),
        (["up", "--ports", "asia=1"], "unknown ports asia"),
        (["up", "--ports", "eu=99999"], "port 99999"),
        (["up", "--ports", "eu=2222,us=2222"], "eu and us share a port"),
        (["ui", "--no-open"], "fenceline up"),
    ],
)
def test_what_a_person_must_change_exits_2_and_says_so(run: Run, words: list[str], message: str) -> None:
    run("keys", "init")
    code, _, err = run(*words)
    assert code == 2 and message in err, err


def test_ingest_beside_the_stack_that_does_it_already_is_refused(run: Run, tmp_path: Path) -> None:
    stack = {"pid": os.getpid(), "start_ticks": config.start_ticks(os.getpid()), "ports": {}}
    (tmp_path / "state").mkdir()
    (tmp_path / "state/stack.json").write_text(json.dumps(stack))
    code, out, err = run("ingest", "--region", "eu")
    assert (code, out) == (2, "") and "ingests region eu already" in err and "--worker-name" in err


def test_where_only_the_edge_agent_is_installed_it_says_what_is_missing() -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None; from cloud import cli; sys.exit(cli.main(['status']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fenceline: the Python package 'sqlalchemy' is not installed here")
    assert "pip install '.[cloud]'" in done.stderr and done.stderr.count("\n") == 1


def test_recorded_data_that_does_not_fit_is_one_line(run: Run, tmp_path: Path) -> None:
    run("keys", "init")
    run("device", "add", "plane-01")
    ragged = tmp_path / "ragged.txt"
    ragged.write_text("1 2\n1 2 3\n")
    for words, says in (
        (["replay", "x.txt", "--mapping", "cmaps"], "no mapping 'cmaps'"),
        (["replay", "x.txt", "--mapping", "cmapss"], "no file x.txt"),
        (["labels", "add", str(ragged), "--mapping", "cmapss", "--run-to-failure"], f"{ragged} does not read"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and err.startswith(f"fenceline: {says}")
        assert err.count("\n") == 1 and "\\n" not in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["rollout", "undo", "9" * 30],
        ["up", "--ports", "eu"],
        ["up", "--ports", "eu=x"],
        ["labels", "add", "f"],
        ["device", "add", "a", "--home", "x"],
    ],
)
def test_a_wrong_command_line_exits_2(run: Run, words: list[str]) -> None:
    assert run(*words)[0] == 2


def test_a_demo_of_no_possible_fleet_is_refused_before_anything_starts(run: Run) -> None:
    code, out, err = run("demo", "--seed", "-1", "--json")
    assert code == 2 and not out and "--seed -1 must not be negative" in err


def test_a_directory_without_a_project_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--project", str(tmp_path), "status"]) == 2
    assert f"no Fenceline project in {tmp_path}" in capsys.readouterr().err


def test_a_second_keys_init_changes_nothing(run: Run) -> None:
    root = Path(answer(run("keys", "init", "--json"))["root"])
    before = root.read_bytes()
    code, _, err = run("keys", "init")
    assert code == 2 and "never overwritten" in err and root.read_bytes() == before


def test_status_of_nothing_is_an_answer(run: Run) -> None:
    found = answer(run("status", "--json"))
    assert found["stack"] is None and found["devices"] == [] and found["lake"] == {} and found["audit_broken_at"] is None
    code, out, _ = run("status")
    assert code == 0 and "does not run (fenceline up)" in out


def test_status_exits_1_when_the_audit_trail_was_changed(run: Run, tmp_path: Path) -> None:
    import sqlite3

    from cloud.audit import Audit

    audit = Audit(tmp_path / "state/audit.db")
    for _ in range(2):
        audit.add("block_refused", region="eu", subject="d1", reason="corrupt", detail="x")
    with sqlite3.connect(tmp_path / "state/audit.db") as db:
        db.execute("DELETE FROM entries WHERE id = 1")
    code, out, _ = run("status", "--json")
    assert code == 1 and json.loads(out)["audit_broken_at"] == 1
    assert run("status")[0] == 1


def test_labels_are_added_and_replaced(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("engine,ts,rul\nsim-1,1700000000,10\nsim-1,1700003600,9\n")
    words = ("labels", "add", str(file), "--column", "rul", "--json")
    assert answer(run(*words)) == {"stream": "turbofan", "added": 2, "labels": 2}
    assert answer(run(*words)) == {"stream": "turbofan", "added": 2, "labels": 2}


def test_train_passes_the_pipelines_answer_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cloud.cli", "--project", str(ROOT), "--state", str(tmp_path), "train", "--set", "nonsense"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "nonsense" in done.stderr


def test_a_policy_is_published_once_and_shown(run: Run, tmp_path: Path) -> None:
    shown = answer(run("policy", "show", "--json"))
    assert shown["version"] is None and shown["zones"]["canada"] == ["us", "eu"]
    zones = ROOT / "contracts/zones.geojson"
    code, _, err = run("policy", "publish", str(zones))
    assert code == 2 and "fenceline keys init" in err
    answer(run("keys", "init", "--json"))
    answer(run("device", "add", "plane-01", "--json"))
    first = answer(run("policy", "publish", str(zones), "--json"))
    assert first["version"] == 1 and answer(run("policy", "publish", str(zones), "--json")) == first
    stricter = tmp_path / "stricter.geojson"
    stricter.write_bytes(zones.read_bytes().replace(b'["us", "eu"]', b'["us"]'))
    assert answer(run("policy", "publish", str(stricter), "--json"))["version"] == 2
    assert answer(run("policy", "publish", str(zones), "--json"))["version"] == 3  # back again: a new version
    answer(run("policy", "publish", str(stricter), "--json"))
    shown = answer(run("policy", "show", "--json"))
    assert (shown["version"], shown["zones"]["canada"], shown["behind"]) == (4, ["us"], ["plane-01"])
    code, out, _ = run("policy", "show")
    assert code == 0 and "version 4" in out and "plane-01" in out
    answer(run("device", "add", "plane-02", "--json"))
    assert (tmp_path / "state/devices/plane-02/zones.geojson").read_bytes() == stricter.read_bytes()
    refused = answer(run("status", "--json"))["refused"]
    assert refused == {}  # a publication is no refusal


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("", ""), "cannot read"),
        (('"us", "eu"', '"moon"'), "names endpoints moon; the regions .* are eu, us"),
        (("Polygon", "Line"), "geometry must be"),
    ],
)
def test_a_policy_that_cannot_be_in_force_is_refused_before_anything_changes(
    run: Run, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    answer(run("keys", "init", "--json"))
    path = tmp_path / "zones.geojson"
    if change[0]:
        path.write_text((ROOT / "contracts/zones.geojson").read_text().replace(*change))
    code, _, err = run("policy", "publish", str(path))
    assert code == 2 and re.search(says, err), err
    assert answer(run("policy", "show", "--json"))["version"] is None


def test_features_live_is_one_process_that_a_signal_ends(tmp_path: Path) -> None:
    """Its child went on pushing when only the command was told to end, by `kill` or a service manager."""
    (tmp_path / "fenceline.toml").write_text("")
    process = subprocess.Popen([sys.executable, "-m", "cloud.cli", "--project", str(tmp_path), "features", "live"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while b"pipelines.live" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
