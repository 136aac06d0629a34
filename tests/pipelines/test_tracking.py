"""What is shown of a tracking server, and what is left in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_agent.contract.errors import UnavailableError
from pipelines import tracking


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
    with pytest.raises(UnavailableError, match=r"^MLflow does not answer at ") as raised:
        tracking.client(context)  # type: ignore[arg-type]
    assert "s3cret" not in str(raised.value)


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
