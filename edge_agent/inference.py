"""The model worker: a model in a process of its own, so that no crash, hang or leak of it takes the agent along.

- Whole batches of float32 features go in, one score per row comes out, over a socket pair; see worker.py.
- A score that takes longer than the limit, a worker that dies or asks for more memory than its limit, or an answer
  that is not one finite number per row raises WorkerError. The worker is ended then; it does not come back by itself.
- Who cannot wait that long asks with `try_score`: without an answer in time there is none, and while the worker is still busy with it,
  none is waited for.
- Memory: the kernel refuses what goes beyond `memory_mb` above the bare runtime (RLIMIT_DATA; RLIMIT_AS would count
  the gigabytes that the runtime only reserves).

    with ModelWorker(bundle.model, features=63, limits=bundle.manifest.limits) as worker:
        scores = worker.score(features)
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

import numpy as np

from edge_agent import worker
from edge_agent.contract.bundle import Bundle, Limits
from edge_agent.contract.columns import Floats
from edge_agent.contract.errors import BundleError, ContractError, FencelineError, Reason
from edge_agent.core.functions import NO_FUNCTIONS, Functions
from edge_agent.core.golden import check_golden

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
END_S = 1.0  # a process that is killed ends in milliseconds
ROWS_MAX = 8_192
ERROR_BYTES_MAX = 64 * 1024
RECV_BYTES = 256 * 1024


class WorkerError(FencelineError):
    """The worker failed and is ended; `reason` says how. The bundle that it runs should be rolled back.

    `said` is what the cloud may be told, at any endpoint. The error's own words, for the device's log, may hold values of readings.
    """

    def __init__(self, reason: Reason, detail: str, said: str = "") -> None:
        super().__init__(detail)
        self.reason, self.said = reason, said or detail


class ModelWorker:
    """One running model. Use it from one thread at a time.

    Args:
        model: the ONNX file.
        features: columns of its input.
        limits: memory, and time for up to ROWS_MAX rows.

    Raises:
        WorkerError: the model does not load within the limits.
    """

    def __init__(self, model: bytes, features: int, limits: Limits) -> None:
        self._features, self._limits = features, limits
        self.resident_bytes = 0
        self._asked: _Request | None = None
        self._peer, self._process = _start()
        payload = self._ask(_Request(b"L", limits.memory_mb.to_bytes(4, "little") + model, b"R", START_TIMEOUT_S, 8), math.inf)
        assert payload is not None
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
        scores = self.try_score(features, math.inf)
        assert scores is not None
        return scores

    def try_score(self, features: Floats, patience_s: float) -> Floats | None:
        """The same, or None if there is no answer within `patience_s`. An answer that comes later is thrown away.

        Raises:
            WorkerError: see the module's rules; the limits count from when the worker was asked.
        """
        if features.ndim != 2 or features.shape[1] != self._features:
            raise ContractError(f"features of shape {features.shape}; the model takes (rows, {self._features})")
        give_up = time.monotonic() + patience_s
        if not self.free(give_up if patience_s == math.inf else 0.0):
            return None
        parts = []
        for first in range(0, len(features), ROWS_MAX):
            part = self._score(features[first : first + ROWS_MAX], give_up)
            if part is None:
                return None
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0)

    def free(self, give_up: float = 0.0) -> bool:
        """Whether it has answered what it was asked, by `give_up` (monotonic seconds). An answer that came too late is thrown away here.

        Raises:
            WorkerError: it has not within the limits, or it failed.
        """
        return self._asked is None or self._answer(give_up) is not None

    def close(self) -> None:
        """End the process. One that the kernel does not let go at once (its pages are on a disk that hangs) is left to it: nobody waits."""
        self._peer.close()
        self._process.kill()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.error("model worker killed, not gone yet pid=%s", self._process.pid)
            threading.Thread(target=self._process.wait, name="model-end", daemon=True).start()

    def _score(self, features: Floats, give_up: float) -> Floats | None:
        rows = len(features)
        head = rows.to_bytes(4, "little") + self._features.to_bytes(4, "little")
        with np.errstate(over="ignore"):  # beyond float32 is infinity there, and the model's answer to it is judged below
            request = head + features.astype("<f4").tobytes()
        payload = self._ask(_Request(b"S", request, b"S", self._limits.score_timeout_s, 8 + 4 * rows), give_up)
        if payload is None:
            return None
        self.resident_bytes = int.from_bytes(payload[:8], "little")
        scores = np.frombuffer(payload, "<f4", offset=8).astype(np.float64)
        bad = ~np.isfinite(scores)
        if len(scores) != rows or bad.any():
            self._fail(Reason.BAD_SCORES, f"{int(bad.sum())} of {len(scores)} scores are not finite, for {rows} rows")
        return scores

    def _ask(self, request: _Request, give_up: float) -> bytes | None:
        """Send a frame and return the payload of the reply; None if it has not come by `give_up`, or fail."""
        assert self._asked is None, "the worker is busy"
        self._asked = request
        return self._answer(give_up)

    def _answer(self, give_up: float) -> bytes | None:
        """Wait for the reply to what was asked, until `give_up` or its limit."""
        request = self._asked
        assert request is not None
        try:
            while not (reply := self._reply(request)):
                now = time.monotonic()
                if now >= request.due:
                    self._fail(Reason.WORKER_TIMEOUT, f"worker did not answer within {request.timeout_s:g} s")
                if now >= give_up:
                    return None
                self._wait(request, min(request.due, give_up) - now)
        except OSError as e:
            self._fail(Reason.WORKER_DIED, f"worker is gone: {e}")
        self._asked = None
        kind, payload = reply
        if kind == b"E":
            message = payload.decode(errors="replace")
            self._fail(_reason(message), message, "the model does not load or score: the device's log says why")
        if kind != request.expected or len(payload) != request.reply_bytes:
            want = f"want {request.expected!r} with {request.reply_bytes}"
            self._fail(Reason.BAD_SCORES, f"worker answered {kind!r} with {len(payload)} bytes; {want}")
        return payload

    def _reply(self, request: _Request) -> tuple[bytes, bytes] | None:
        """Send and receive what goes without waiting; kind and payload of the reply once it is whole."""
        with contextlib.suppress(BlockingIOError):
            while request.unsent:
                request.unsent = request.unsent[self._peer.send(request.unsent) :]
        with contextlib.suppress(BlockingIOError):
            while (more := self._peer.recv(RECV_BYTES)) or self._ended():
                request.received += more
                if len(request.received) >= worker.HEAD.size:
                    kind, length = worker.HEAD.unpack_from(request.received)
                    if length > max(request.reply_bytes, ERROR_BYTES_MAX):
                        self._fail(Reason.BAD_SCORES, f"worker answers {length} bytes; want {request.reply_bytes}")
                    if len(request.received) >= worker.HEAD.size + length:  # more than asked for is judged as an answer of that length
                        return kind, bytes(request.received[worker.HEAD.size :])
        return None

    def _wait(self, request: _Request, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._peer, select.POLLIN | (select.POLLOUT if request.unsent else 0))
        poll.poll(timeout_s * 1_000 + 1)

    def _ended(self) -> bool:
        """Called when the worker has closed its end."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(END_S)
        raise ConnectionResetError(f"it ended with code {code}")

    def _fail(self, reason: Reason, detail: str, said: str = "") -> NoReturn:
        self.close()
        raise WorkerError(reason, detail, said)


class _Request:
    """A frame on its way to the worker, and the reply to it as far as it has come."""

    def __init__(self, kind: bytes, payload: bytes, expected: bytes, timeout_s: float, reply_bytes: int) -> None:
        self.unsent = memoryview(worker.HEAD.pack(kind, len(payload)) + payload)
        self.received = bytearray()
        self.expected, self.reply_bytes = expected, reply_bytes
        self.timeout_s, self.due = timeout_s, time.monotonic() + timeout_s


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A new process, and our end of the socket to it."""
    try:
        peer, stdin = socket.socketpair()
        peer.setblocking(False)
        with stdin:
            process = subprocess.Popen(
                [sys.executable, "-P", str(worker.__file__)],  # -P: nothing beside worker.py can shadow a library
                stdin=stdin.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # their threads would only take memory
                start_new_session=True,  # Ctrl-C is for the agent, which then ends its workers
            )
    except OSError as e:
        raise WorkerError(Reason.WORKER_DIED, f"worker cannot be started: {e}") from e
    return peer, process


def self_test(bundle: Bundle, functions: Functions = NO_FUNCTIONS) -> None:
    """Check that this device gives the golden vectors of `bundle`: features in every bit, scores within the tolerance.

    Raises:
        BundleError: it does not, or the model does not run within its limits.
    """

    def score(features: Floats) -> Floats:
        with ModelWorker(bundle.model, len(bundle.manifest.features.features), bundle.manifest.limits) as running:
            return running.score(features)

    try:
        check_golden(bundle.manifest, score, functions)
    except WorkerError as e:
        raise BundleError(f"self-test: {e}") from e


def _reason(message: str) -> Reason:
    """The reason behind a worker's message: no memory is a dead worker, everything else is a bad answer."""
    starved = any(word in message for word in ("bad_alloc", "Failed to allocate", "MemoryError", "Unable to allocate", "std::length_error"))
    return Reason.WORKER_DIED if starved else Reason.BAD_SCORES
