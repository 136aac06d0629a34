"""The model worker: a model in a process of its own, so that no crash, hang or leak of it takes the agent along.

- Whole batches of float32 features go in, one score per row comes out, over a socket pair; see worker.py.
- A score that takes longer than the limit, a worker that dies or asks for more memory than its limit, or an answer
  that is not one finite number per row raises WorkerError. The worker is ended then; it does not come back by itself.
- Memory: the kernel refuses what goes beyond `memory_mb` above the bare runtime (RLIMIT_DATA; RLIMIT_AS would count
  the gigabytes that the runtime only reserves).

    with ModelWorker(bundle.model, features=63, limits=bundle.manifest.limits) as worker:
        scores = worker.score(features)
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import NoReturn

import numpy as np

from edge_agent import worker
from edge_agent.contract.bundle import Bundle, Limits
from edge_agent.contract.columns import Floats
from edge_agent.contract.errors import BundleError, ContractError, FencelineError, Reason
from edge_agent.core.golden import check_golden

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
ROWS_MAX = 8_192
ERROR_BYTES_MAX = 64 * 1024


class WorkerError(FencelineError):
    """The worker failed and is ended; `reason` says how. The bundle that it runs should be rolled back."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ModelWorker:
    """One running model. Use it from one thread at a time.

    Args:
        model: the ONNX file.
        features: columns of its input.
        limits: memory, and time for one `score` of up to ROWS_MAX rows.

    Raises:
        WorkerError: the model does not load within the limits.
    """

    def __init__(self, model: bytes, features: int, limits: Limits) -> None:
        self._features, self._limits = features, limits
        self.resident_bytes = 0
        self._peer, other = socket.socketpair()
        with other:
            self._process = _start(other)
        payload = self._ask(b"L", limits.memory_mb.to_bytes(4, "little") + model, b"R", START_TIMEOUT_S, 8)
        self.resident_bytes = int.from_bytes(payload, "little")

    def __enter__(self) -> ModelWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def score(self, features: Floats) -> Floats:
        """Scores, float64 (rows,), of features, float64 (rows, features).

        Raises:
            WorkerError: see the module's rules.
        """
        if features.ndim != 2 or features.shape[1] != self._features:
            raise ContractError(f"features of shape {features.shape}; the model takes (rows, {self._features})")
        parts = [self._score(features[i : i + ROWS_MAX]) for i in range(0, len(features), ROWS_MAX)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def close(self) -> None:
        """End the process."""
        self._peer.close()
        self._process.kill()
        self._process.wait()

    def _score(self, features: Floats) -> Floats:
        rows = len(features)
        head = rows.to_bytes(4, "little") + self._features.to_bytes(4, "little")
        with np.errstate(over="ignore"):  # beyond float32 is infinity there, and the model's answer to it is judged below
            request = head + features.astype("<f4").tobytes()
        payload = self._ask(b"S", request, b"S", self._limits.score_timeout_s, 8 + 4 * rows)
        self.resident_bytes = int.from_bytes(payload[:8], "little")
        scores = np.frombuffer(payload, "<f4", offset=8).astype(np.float64)
        bad = ~np.isfinite(scores)
        if len(scores) != rows or bad.any():
            self._fail(Reason.BAD_SCORES, f"{int(bad.sum())} of {len(scores)} scores are not finite, for {rows} rows")
        return scores

    def _ask(self, kind: bytes, request: bytes, expected: bytes, timeout_s: float, reply_bytes: int) -> bytes:
        """Send a frame and return the payload of the reply, or fail."""
        deadline = time.monotonic() + timeout_s
        try:
            self._peer.settimeout(timeout_s)
            self._peer.sendall(worker.HEAD.pack(kind, len(request)))
            self._peer.sendall(request)
            got, length = worker.HEAD.unpack(self._read(worker.HEAD.size, deadline))
            if length > max(reply_bytes, ERROR_BYTES_MAX):
                self._fail(Reason.BAD_SCORES, f"worker answered {length} bytes; want {reply_bytes}")
            payload = self._read(length, deadline)
        except TimeoutError:
            self._fail(Reason.WORKER_TIMEOUT, f"worker did not answer within {timeout_s:g} s")
        except OSError as e:
            self._fail(Reason.WORKER_DIED, f"worker is gone: {e}")
        if got == b"E":
            self._fail(*_sort_out(payload.decode(errors="replace")))
        if got != expected or length != reply_bytes:
            self._fail(Reason.BAD_SCORES, f"worker answered {got!r} with {length} bytes; want {expected!r} with {reply_bytes}")
        return payload

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            self._peer.settimeout(max(0.001, deadline - time.monotonic()))
            got = self._peer.recv_into(view[done:])
            if not got:
                raise ConnectionResetError(f"it ended with code {self._exit_code()}")
            done += got
        return bytes(data)

    def _exit_code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        return None

    def _fail(self, reason: Reason, detail: str) -> NoReturn:
        self.close()
        raise WorkerError(reason, detail)


def _start(stdin: socket.socket) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(worker.__file__)],  # -P: nothing beside worker.py can shadow a library
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # their threads would only take memory
            start_new_session=True,  # Ctrl-C is for the agent, which then ends its workers
        )
    except OSError as e:
        raise WorkerError(Reason.WORKER_DIED, f"worker cannot be started: {e}") from e


def self_test(bundle: Bundle) -> None:
    """Check that this device gives the golden vectors of `bundle`: features in every bit, scores within the tolerance.

    Raises:
        BundleError: it does not, or the model does not run within its limits.
    """

    def score(features: Floats) -> Floats:
        with ModelWorker(bundle.model, len(bundle.manifest.features.features), bundle.manifest.limits) as running:
            return running.score(features)

    try:
        check_golden(bundle.manifest, score)
    except WorkerError as e:
        raise BundleError(f"self-test: {e}") from e


def _sort_out(message: str) -> tuple[Reason, str]:
    """The reason behind a worker's message: no memory is a dead worker, everything else is a bad answer."""
    starved = any(word in message for word in ("bad_alloc", "Failed to allocate", "MemoryError", "Unable to allocate", "std::length_error"))
    return (Reason.WORKER_DIED if starved else Reason.BAD_SCORES), message
