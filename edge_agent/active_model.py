"""The model in use: the updater's thread makes one ready, the data path takes it between two batches.

- The data path never waits long for a model (`scoring.PATIENCE_S`). Readings without scores are stored all the same and can be told
  apart: their block names no model (`model` None in its header, no `score` column), so both are null in the lake.
- A model that fails is dropped at once and rolled back. Only a proved one whose worker died or hung gets another worker, made beside the
  data path, up to RESTARTS_MAX times within RESTARTS_S: a worker can also fall victim to somebody else, such as the kernel's OOM killer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from edge_agent.contract.columns import Floats, Table
from edge_agent.contract.errors import BundleError, Reason
from edge_agent.contract.stream import FieldType, StreamContract
from edge_agent.core.functions import NO_FUNCTIONS, Functions, check_functions
from edge_agent.inference import ModelWorker, WorkerError
from edge_agent.intake import Readings
from edge_agent.metrics import Metrics
from edge_agent.releases import RefusedError
from edge_agent.scoring import Scoring
from edge_agent.updater import Activation, Updater

log = logging.getLogger(__name__)

RESTARTS_MAX = 3
RESTARTS_S = 600.0
_RESTARTABLE = (Reason.WORKER_DIED, Reason.WORKER_TIMEOUT)


class ActiveModel:
    """The active model of one agent, or none.

    Args:
        history: the stored readings of a stream at a contract version, to warm windows with.
        tell: tells the operator of an event.
        functions: those of the user's own that are installed here.
    """

    def __init__(
        self,
        contracts: tuple[StreamContract, ...],
        history: Callable[[str, str], Table | None],
        metrics: Metrics,
        tell: Callable[..., None],
        functions: Functions = NO_FUNCTIONS,
    ) -> None:
        self.updater: Updater | None = None
        self._contracts = {c.stream: c for c in contracts}
        self._history, self._metrics, self._tell, self._functions = history, metrics, tell, functions
        self._scoring: Scoring | None = None
        self._offered: list[Scoring | None] = []  # one at most
        self._offering = threading.Lock()
        self._started: queue.SimpleQueue[tuple[Scoring, ModelWorker | WorkerError]] = queue.SimpleQueue()
        self._restarts: deque[float] = deque(maxlen=RESTARTS_MAX)

    def activate(self, activation: Activation | None) -> None:
        """Make a model ready, or ask for none; called by the updater in its own thread, or while the agent starts.

        Raises:
            RefusedError: the bundle does not fit this agent's stream.
            WorkerError: the model does not load.
        """
        if activation is None:
            self._offer(None)
            return
        manifest = activation.bundle.manifest
        contract = self._contracts[manifest.stream]
        numeric = {f.name for f in contract.fields if f.type is not FieldType.STRING}
        foreign = sorted({f.field for f in manifest.features.features} - numeric)
        if foreign:
            raise RefusedError(Reason.FOREIGN, f"bundle needs the fields {foreign}, which are no numbers of stream {contract.stream}")
        try:
            check_functions(manifest.features, self._functions)
        except BundleError as e:
            raise RefusedError(Reason.FOREIGN, str(e)) from e
        self._offer(Scoring(activation, contract, self._functions))

    def _offer(self, scoring: Scoring | None) -> None:
        """To be taken next. One that was not taken is ended: while nothing can be stored none is, and each has a process."""
        with self._offering:
            before, self._offered = self._offered, [scoring]
        for old in before:
            if old is not None:
                old.close()

    def swap(self) -> None:
        """Take the model made ready last, if there is a new one, and the worker started again, if there is one."""
        if self._offered:
            old = self._scoring
            with self._offering:
                (self._scoring,), self._offered = self._offered, []
            if self._scoring is not None:
                self._scoring.warm(self._history(self._scoring.stream, self._scoring.contract_version))
            self._restarts.clear()
            if old is not None:
                old.close()
        while not self._started.empty():
            self._take_worker(*self._started.get())

    def score(self, readings: Readings) -> tuple[Floats | None, str | None]:
        """Scores (NaN where no window is done) and the digest of the bundle; (None, None) if there are none, for whatever reason."""
        scoring = self._scoring
        if scoring is None or scoring.stream != readings.contract.stream:
            return None, None
        was_proved = scoring.proved
        try:
            scores = scoring.score(readings.table)
        except WorkerError as e:
            self._failed(scoring, e)
            scores = None
        if scores is None:
            self._metrics.unscored.labels(readings.contract.stream).inc(len(readings))
            return None, None
        if scoring.proved and not was_proved and self.updater is not None:
            self.updater.confirm(scoring.sha256)
        self._metrics.scored.labels(readings.contract.stream).inc(int(np.count_nonzero(~np.isnan(scores))))
        return scores, scoring.sha256

    def close(self) -> None:
        """End the active model and those not taken yet."""
        self._offer(None)
        self.swap()

    def _failed(self, scoring: Scoring, error: WorkerError) -> None:
        now = time.monotonic()
        often = len(self._restarts) == RESTARTS_MAX and now - self._restarts[0] < RESTARTS_S
        if not scoring.proved or error.reason not in _RESTARTABLE or often:
            self._drop(scoring, error)
            return
        self._restarts.append(now)
        log.warning("model worker lost sha256=%s reason=%s restart=%d detail=%s", scoring.sha256, error.reason, len(self._restarts), error)
        self._tell("model_restarted", sha256=scoring.sha256, reason=error.reason.value, detail=error.said)
        self._metrics.model_failures.labels(error.reason.value).inc()
        scoring.use(None)
        threading.Thread(target=self._start_worker, args=(scoring,), name="model-restart", daemon=True).start()

    def _start_worker(self, scoring: Scoring) -> None:
        """In a thread of its own: loading a model takes seconds."""
        try:
            self._started.put((scoring, scoring.start_worker()))
        except WorkerError as e:
            self._started.put((scoring, e))

    def _take_worker(self, scoring: Scoring, worker: ModelWorker | WorkerError) -> None:
        if isinstance(worker, WorkerError):
            if scoring is self._scoring:
                self._failed(scoring, worker)
        elif scoring is self._scoring:
            scoring.use(worker)
            log.info("model worker started again sha256=%s", scoring.sha256)
        else:  # another model has been taken meanwhile
            worker.close()

    def _drop(self, scoring: Scoring, error: WorkerError) -> None:
        log.error("model failed sha256=%s reason=%s detail=%s", scoring.sha256, error.reason, error)
        self._tell("model_failed", sha256=scoring.sha256, reason=error.reason.value, detail=error.said)
        self._metrics.model_failures.labels(error.reason.value).inc()
        self._scoring = None
        scoring.close()
        if self.updater is not None:
            self.updater.rollback(scoring.sha256, error.reason, error.said)
