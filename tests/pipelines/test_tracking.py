"""What is shown of a tracking server, and what is left in it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloud.tracking_server import errors_told
from edge_agent.contract.errors import UnavailableError
from pipelines import cluster, register, stage, tracking
from pipelines.stage import load_context
from tests.pipelines.lakes import ROOT
from tests.pipelines.repos import turbofan_project


def test_password_of_the_tracking_server_stays_out_of_the_run_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="7"))
    monkeypatch.setattr(tracking, "tracking_uri", lambda state: "https://ml:secret@mlflow.example:8443/team")
    monkeypatch.setattr(tracking, "client", lambda context: SimpleNamespace(get_run=lambda run_id: run))
    context = SimpleNamespace(state=tmp_path)
    assert tracking.run_url(context, "r1") == "https://mlflow.example:8443/team/#/experiments/7/runs/r1"  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["http://ml:s3cret@127.0.0.1:9", "nowhere://ml:s3cret@127.0.0.1:9/db", "sqlite:///{folder}/damaged.db"])
def test_tracking_server_that_is_not_there_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str) -> None:
    (tmp_path / "damaged.db").write_bytes(b"no database" * 1_000)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    context = SimpleNamespace(state=tmp_path)
    with pytest.raises(UnavailableError, match=r"^MLflow at .* does not answer ") as raised:
        tracking.client(context)  # type: ignore[arg-type]
    assert "s3cret" not in str(raised.value)


class Mlflow(BaseHTTPRequestHandler):
    """Stands in for what lies before an MLflow, a proxy or its login: the first question is let through, the others are not."""

    status, body = 500, b""

    def do_POST(self) -> None:
        first = self.path.endswith("/experiments/search")
        self.answer(200, b'{"experiments": []}') if first else self.answer(self.status, self.body)

    def do_GET(self) -> None:
        self.answer(self.status, self.body)

    def answer(self, status: int, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: it would go to stderr."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Mlflow) as made:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ml:s3cret@127.0.0.1:{made.server_port}")
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def fetch(store: Any) -> None:
    from mlflow.artifacts import download_artifacts

    download_artifacts(artifact_uri=f"{tracking.tracking_uri(Path())}/api/2.0/mlflow-artifacts/artifacts/bundle")


@pytest.mark.parametrize("ask", [lambda store: store.get_run("r1"), lambda store: tracking.log_batch(store, "r1", {"a": 1.0}), fetch])
@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, b'{"error_code": "INTERNAL_ERROR", "message": "disk full"}', "look into its log"),
        (502, b"<html>\n<h1>Bad\nGateway</h1>" + 5_000 * b"x", "look into its log"),
        (403, b"Permission denied", "~/.mlflow/credentials"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "~/.mlflow/credentials"),
        (None, b"", "start it with `fenceline up`"),
    ],
)
def test_mlflow_that_fails_in_the_midst_is_one_line_without_its_password(
    server: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ask: Callable[[Any], None],
    status: int | None,
    body: bytes,
    says: str,
) -> None:
    monkeypatch.setattr(Mlflow, "status", status)
    monkeypatch.setattr(Mlflow, "body", body)
    store = tracking.client(SimpleNamespace(state=tmp_path))  # type: ignore[arg-type]
    if status is None:
        server.shutdown()
        server.server_close()
    with pytest.raises(UnavailableError) as raised, errors_told():
        ask(store)
    text = str(raised.value)
    assert text.startswith(f"MLflow at http://127.0.0.1:{server.server_port} failed (") and says in text
    assert "\n" not in text and "s3cret" not in text and len(text) < 800


def test_a_stage_whose_mlflow_refuses_ends_with_what_it_said(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Mlflow, "status", 403)
    monkeypatch.setattr(Mlflow, "body", b"Permission denied")
    monkeypatch.delenv("FENCELINE_RUN_ID", raising=False)
    project = turbofan_project(tmp_path / "project")
    shutil.copy(ROOT / "pipelines/dvc.yaml", project / "pipelines")
    context = load_context(project, tmp_path / "state")
    stage.write_json(context.folder("snapshot") / "lake_version.json", {"lanes": {}})
    stage.write_json(context.folder("evaluate") / "gate.json", {})
    monkeypatch.chdir(project)
    monkeypatch.setattr(cluster, "connected", nullcontext)  # register has no work for Ray
    assert stage.main("register", register.work) == 1
    error = json.loads((context.build / "error.json").read_text())
    assert (error["stage"], error["exit_code"]) == ("register", 1) and "Permission denied" in error["message"]


def test_another_mistake_in_the_midst_is_none_of_mlflow_s() -> None:
    with pytest.raises(KeyError), errors_told():
        raise KeyError("ours")


def test_password_of_a_database_stays_out_of_the_run_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ml:s3cret@db.example/mlflow")
    assert "s3cret" not in tracking.run_url(SimpleNamespace(state=tmp_path), "r1")  # type: ignore[arg-type]


def test_run_that_is_discarded_takes_its_nested_runs_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tracking.client(SimpleNamespace(state=tmp_path))  # type: ignore[arg-type]
    experiment = store.create_experiment("turbofan")
    kept, discarded = (store.create_run(experiment).info.run_id for _ in range(2))
    nested = [tracking.child_run(store, parent, "setting-1") for parent in (kept, discarded)]
    tracking.discard_run(store, discarded)
    assert {run.info.run_id for run in store.search_runs([experiment])} == {kept, nested[0]}
