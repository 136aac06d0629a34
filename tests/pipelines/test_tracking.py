"""What is shown of a tracking server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import tracking


def test_password_of_the_tracking_server_stays_out_of_the_run_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="7"))
    monkeypatch.setattr(tracking, "tracking_uri", lambda state: "https://ml:secret@mlflow.example:8443/team")
    monkeypatch.setattr(tracking, "client", lambda context: SimpleNamespace(get_run=lambda run_id: run))
    context = SimpleNamespace(state=tmp_path)
    assert tracking.run_url(context, "r1") == "https://mlflow.example:8443/team/#/experiments/7/runs/r1"  # type: ignore[arg-type]
