"""A person sees the training run in MLflow's own pages: the run, its numbers and the registered model, in a real Chromium."""

from __future__ import annotations

import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import find_chromium
from tests.servers import HOST, Server, free_port, running

ROOT = Path(__file__).parents[2]
START_S_MAX = 180.0
PAGE_MS_MAX = 60_000
METRIC, VALUE = "holdout_rmse", 14.25
# No sandbox: tests may run as root. The others keep Chromium from calling its maker.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.mark.needs_chromium
@pytest.mark.timeout(420)
def test_run_metric_and_registered_model_are_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mlflow_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        run_page, run_name, model = log_run(tmp_path)
        with browser(tmp_path) as page:
            page.goto(run_page)
            see(page, run_name)
            see(page, METRIC)
            see(page, str(VALUE))
            page.goto(f"{url}/#/models/{model}")
            see(page, model)
            see(page, "Version 1")
            see(page, "champion")


def log_run(project: Path) -> tuple[str, str, str]:
    """A parent run with a metric and a registered model, made with the pipeline's own code; its page, its name, the model's."""
    import mlflow

    from pipelines import tracking
    from pipelines.stage import load_context

    for name in ("fenceline.toml", "contracts", "pipelines/params.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (project / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, project / name)
    context = load_context(project)
    run_id = tracking.open_run(context)
    with tracking.resumed(context, run_id) as store:
        tracking.log_batch(store, run_id, {METRIC: VALUE}, tracking.flatten({"train": {"seed": 7}}))
        name = context.params.register.model
        sample = np.zeros((1, 2), np.float32)
        logged = mlflow.onnx.log_model(
            tiny_model(), name="model", registered_model_name=name, input_example=sample,
            pip_requirements=["onnx", "onnxruntime"],  # not said: MLflow finds them out in a process that loads the model, which takes long
        )  # fmt: skip
        store.set_registered_model_alias(name, "champion", logged.registered_model_version)
    return tracking.run_url(context, run_id), store.get_run(run_id).info.run_name, name


def tiny_model() -> Any:
    """An ONNX model that adds its two inputs."""
    from onnx import TensorProto, checker, helper

    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 2])
    answer = helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])
    total = helper.make_node("ReduceSum", ["features", "axes"], ["score"])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    model = helper.make_model(
        helper.make_graph([total], "sum", [given], [answer], [axes]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    checker.check_model(model)
    return model


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """MLflow's server on SQLite, on loopback; its address."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    env = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(Server(command, folder / "mlflow.log", lambda: is_healthy(url), start_s_max=START_S_MAX, env=env)):
        yield url


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A page of a headless Chromium with an empty profile; on an error its picture is left as page.png."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder / "profile"),
            executable_path=find_chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1600, "height": 1200},
        )
        page = context.new_page()
        page.set_default_timeout(PAGE_MS_MAX)
        try:
            yield page
        except Exception:
            page.screenshot(path=str(folder / "page.png"))
            raise
        finally:
            context.close()


def see(page: Any, text: str) -> None:
    """Wait until `text` is visible somewhere on the page."""
    page.get_by_text(text).filter(visible=True).first.wait_for()
