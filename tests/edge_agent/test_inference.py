"""The model worker: real processes, real ONNX Runtime, tiny models."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import inference
from edge_agent.contract.bundle import Limits
from edge_agent.contract.errors import BundleError, ContractError, Reason
from edge_agent.inference import ROWS_MAX, ModelWorker, WorkerError, self_test
from tests.edge_agent import models

ROOM = Limits(memory_mb=256, score_timeout_s=5.0)


def worker(onnx: bytes, **limits: Any) -> ModelWorker:
    return ModelWorker(onnx, 2, msgspec.structs.replace(ROOM, **limits))


def failure(onnx: bytes, features: list[list[float]], **limits: Any) -> WorkerError:
    with worker(onnx, **limits) as running:
        with pytest.raises(WorkerError) as caught:
            running.score(np.array(features))
        assert not running.alive
    return caught.value


def gone(pid: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_scores_come_back_one_per_row_for_none_few_and_many_rows() -> None:
    with worker(models.linear([1.0, 2.0])) as running:
        assert running.score(np.zeros((0, 2))).shape == (0,)
        assert running.score(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [5.0, 11.0]
        many = np.random.default_rng(1).normal(size=(ROWS_MAX + 7, 2))
        assert np.allclose(running.score(many), many @ [1.0, 2.0], atol=1e-5)
        assert 0 < running.resident_bytes < 300e6


def test_worker_loads_nothing_of_the_agent() -> None:
    with worker(models.linear([1.0, 2.0])) as running:
        loaded = Path(f"/proc/{running.pid}/maps").read_text()
        assert "onnxruntime" in loaded
        for name in ("msgspec", "zstandard", "apsw", "shapely"):
            assert name not in loaded


def test_worker_that_finds_no_file_descriptor_is_a_worker_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(WorkerError, match="cannot be started") as caught:
            worker(models.linear([1.0, 2.0]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.reason is Reason.WORKER_DIED


def test_features_of_the_wrong_width_never_reach_the_worker() -> None:
    with worker(models.linear([1.0, 2.0])) as running:
        with pytest.raises(ContractError, match=r"\(rows, 2\)"):
            running.score(np.zeros((1, 3)))
        assert running.alive


@pytest.mark.parametrize("value", [-1.0, 0.0], ids=["nan", "infinite"])
def test_score_that_is_not_a_finite_number_ends_the_worker(value: float) -> None:
    assert failure(models.logarithm(), [[1.0, 0.0], [value, 0.0]]).reason is Reason.BAD_SCORES


def test_scores_of_the_wrong_shape_end_the_worker() -> None:
    error = failure(models.wide(), [[1.0, 0.0]])
    assert error.reason is Reason.BAD_SCORES
    assert "(1, 2)" in str(error)


def test_hanging_model_is_ended_at_its_time_limit() -> None:
    began = time.monotonic()
    assert failure(models.endless(), [[1.0, 0.0]], score_timeout_s=0.5).reason is Reason.WORKER_TIMEOUT
    assert time.monotonic() - began < 5.0


def test_frozen_worker_is_ended_though_it_does_not_read() -> None:
    with worker(models.linear([1.0, 2.0]), score_timeout_s=0.5) as running:
        os.kill(running.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError) as caught:
            running.score(np.zeros((200_000, 2)))
    assert caught.value.reason is Reason.WORKER_TIMEOUT


def test_who_does_not_wait_gets_no_scores_until_the_worker_is_free_again() -> None:
    with worker(models.linear([1.0, 2.0]), score_timeout_s=60.0) as running:
        os.kill(running.pid, signal.SIGSTOP)
        assert running.try_score(np.ones((30_000, 2)), 0.05) is None
        assert running.try_score(np.ones((1, 2)), 0.05) is None
        os.kill(running.pid, signal.SIGCONT)
        scores = None
        while scores is None:
            scores = running.try_score(np.array([[5.0, 6.0]]), 0.05)
        assert scores.tolist() == [17.0]  # not those that came too late
        assert running.score(np.array([[1.0, 2.0]])).tolist() == [5.0]


def test_limit_counts_from_the_question_however_often_one_looks() -> None:
    with worker(models.endless(), score_timeout_s=0.5) as running, pytest.raises(WorkerError) as caught:
        while running.try_score(np.ones((1, 2)), 0.01) is None:
            pass
    assert caught.value.reason is Reason.WORKER_TIMEOUT


def test_memory_beyond_the_limit_is_refused_and_within_it_given() -> None:
    assert failure(models.hog(100_000_000), [[1.0, 0.0]]).reason is Reason.WORKER_DIED
    with worker(models.hog(10_000_000)) as running:
        assert running.score(np.array([[1.0, 0.0]])).tolist() == [0.0]


def test_killed_worker_raises_and_a_new_one_works() -> None:
    onnx = models.linear([1.0, 2.0])
    with worker(onnx) as running:
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            running.score(np.zeros((1, 2)))
        assert caught.value.reason is Reason.WORKER_DIED
    with worker(onnx) as running:
        assert running.score(np.zeros((1, 2))).tolist() == [0.0]


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(WorkerError, match="does not load"):
        worker(b"nonsense")


def test_worker_ends_with_its_agent_also_in_the_middle_of_a_score() -> None:
    script = (
        "import sys, numpy as np\n"
        "from edge_agent.inference import ModelWorker\n"
        "from edge_agent.contract.bundle import Limits\n"
        "w = ModelWorker(sys.stdin.buffer.read(), 2, Limits(score_timeout_s=60.0))\n"
        "print(w.pid, flush=True)\n"
        "w.score(np.ones((1, 2)))\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert agent.stdin is not None
    assert agent.stdout is not None
    agent.stdin.write(models.endless())
    agent.stdin.close()
    pid = int(agent.stdout.readline())
    time.sleep(0.2)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    assert gone(pid)


def test_closed_worker_leaves_neither_process_nor_file_descriptor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    running = worker(models.linear([1.0, 2.0]))
    pid = running.pid
    running.close()
    running.close()
    assert not Path(f"/proc/{pid}").exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_worker_that_the_kernel_does_not_let_go_holds_nobody() -> None:
    running = worker(models.linear([1.0, 2.0]))
    seize = "import ctypes, sys; print(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0), flush=True); sys.stdin.read()"
    tracer = subprocess.Popen([sys.executable, "-c", seize, str(running.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert tracer.stdin is not None and tracer.stdout is not None
    seized = tracer.stdout.readline() == b"0\n"
    began = time.monotonic()
    running.close()  # killed, but its parent learns of that only when the tracer is gone
    closed_s = time.monotonic() - began
    with tracer:
        assert (Path(f"/proc/{running.pid}").exists() and closed_s < 10.0) or not seized
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{running.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_worker_that_never_stops_talking_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    babbler = tmp_path / "babbler.py"
    babbler.write_text(
        "import socket\n"
        "parent = socket.socket(fileno=0)\n"
        "parent.recv(9)\n"
        "parent.sendall(b'R' + (8).to_bytes(4, 'little') + bytes(8))\n"
        "parent.recv(1)\n"
        "parent.sendall(b'S' + (12).to_bytes(4, 'little'))\n"
        "while True: parent.sendall(bytes(65536))\n"
    )
    monkeypatch.setattr(inference.worker, "__file__", str(babbler))
    with worker(b"", score_timeout_s=60.0) as running:
        with pytest.raises(WorkerError) as caught:
            running.score(np.ones((1, 2)))
        assert not running.alive
    assert caught.value.reason is Reason.BAD_SCORES


def test_good_bundle_passes_its_self_test() -> None:
    self_test(models.bundle())


def test_model_that_gives_other_scores_fails_the_self_test() -> None:
    with pytest.raises(BundleError, match="score of golden window 2"):
        self_test(models.bundle(onnx=models.linear([1.0, 2.1])))


def test_feature_that_differs_in_its_last_bit_fails_the_self_test() -> None:
    golden = models.golden()
    features = [list(row) for row in golden.features]
    features[1][1] = float(np.nextafter(features[1][1], np.inf))
    with pytest.raises(BundleError, match="feature t_mean of golden window 1"):
        self_test(models.bundle(golden=msgspec.structs.replace(golden, features=features)))


def test_missing_values_in_golden_features_compare_equal() -> None:
    values = models.golden()
    golden = msgspec.structs.replace(values, fields={"t": [None, 2.5, 4.0]}, features=[[None, None], [2.5, 2.5], [4.0, 3.25]])
    with pytest.raises(BundleError, match="not finite"):  # the features passed; this model has no answer to a missing value
        self_test(models.bundle(golden=golden))


def test_model_that_hangs_fails_the_self_test() -> None:
    limits = Limits(memory_mb=256, score_timeout_s=0.5)
    with pytest.raises(BundleError, match="did not answer"):
        self_test(models.bundle(onnx=models.endless(), limits=limits))
