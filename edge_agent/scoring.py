"""The active model at work: windows, worker and probation of one bundle.

- Windows are warmed from the buffer's history, so that the first readings after a swap or a restart have the windows
  that they would have had without it. Readings that get no score pass through the windows all the same.
- The score of a window stands on the row of the reading that it was done with: with trailing windows that is every reading; with windows
  that close, the reading that closed it, NaN on all others. A reading that closes several windows carries the score of the newest; the
  others are checked like it, and come again from the lake (`pipelines.score`).
- Every score must be a number within the manifest's bounds. One that is not, and any failure of the worker, is a WorkerError: the
  caller stores the readings unscored.
- The data path waits PATIENCE_S for the scores of a batch and no longer; without them its readings are stored unscored. The worker has
  until the manifest's limit to answer, then it counts as hanging.
- One that is late again and again is asked less and less often, down to once in PAUSE_S_MAX: waiting in vain takes a tenth of the path's
  time at most.
- After `probation_rows` good scores the bundle is proved.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from edge_agent.core.functions import NO_FUNCTIONS, FunctionError, Functions
from edge_agent.inference import ModelWorker, WorkerError
from edge_agent.updater import Activation

log = logging.getLogger(__name__)

PATIENCE_S = 0.5
PAUSE_S_MAX = 5.0


class Scoring:
    """One activated bundle; `sha256` names its file.

    Raises:
        WorkerError: the model does not load within the limits.
    """

    def __init__(self, activation: Activation, contract: StreamContract, functions: Functions = NO_FUNCTIONS) -> None:
        self.sha256 = activation.sha256
        self.stream, self.contract_version = contract.stream, contract.version
        self._manifest, self._model = activation.bundle.manifest, activation.bundle.model
        self._contract = contract
        self._windows = Windows(self._manifest.features, functions)
        self._good_rows = 0 if activation.on_probation else self._manifest.probation_rows
        self._pause_s, self._ask_at = 0.0, 0.0
        self._worker: ModelWorker | None = self.start_worker()

    @property
    def proved(self) -> bool:
        """Whether the probation is over."""
        return self._good_rows >= self._manifest.probation_rows

    def warm(self, history: Table | None) -> None:
        """Take the stored readings as the past of the windows. Those that have not the fields of the contract are not taken."""
        try:
            if history is not None:
                self._windows.warm(*self._columns(history), history)
        except ContractError as e:  # the contract was changed, and its version was not
            log.warning("windows begin empty stream=%s: stored readings have other fields error=%s", self.stream, e)

    def score(self, table: Table) -> Floats | None:
        """Score fresh readings in the order seen, one score per row; None if there are no scores in time, or no worker now.

        Raises:
            WorkerError: the worker failed and is ended, a score is out of bounds, or a function of the features failed.
        """
        try:
            made = self._windows.push(*self._columns(table), table)
        except FunctionError as e:
            raise WorkerError(Reason.BAD_SCORES, str(e), f"function {e.name!r} failed: the device's log says why") from e
        except ContractError as e:
            raise WorkerError(Reason.BAD_SCORES, str(e)) from e
        scores = None if self._worker is None else self._ask(self._worker, made.features)
        if scores is None:
            return None
        self._check(scores)
        self._good_rows += len(scores)
        out = np.full(len(table[self._contract.entity]), np.nan)
        out[made.rows] = scores  # of several on one row the last stays: the newest window's
        return out

    def _ask(self, worker: ModelWorker, features: Floats) -> Floats | None:
        if not worker.free() or time.monotonic() < self._ask_at:
            return None
        scores = worker.try_score(features, PATIENCE_S)
        if scores is None:
            pause_s = min(PAUSE_S_MAX, max(PATIENCE_S, 2 * self._pause_s))
            if pause_s != self._pause_s:
                log.warning("scores late sha256=%s patience_s=%s asked_again_in_s=%s", self.sha256, PATIENCE_S, pause_s)
            self._pause_s, self._ask_at = pause_s, time.monotonic() + pause_s
        elif len(scores):
            self._pause_s = 0.0
        return scores

    def _check(self, scores: Floats) -> None:
        low, high = self._manifest.score_min, self._manifest.score_max
        bad = ~((scores >= low) & (scores <= high))
        if bad.any():
            value = scores[np.argmax(bad)]
            reason = Reason.BAD_SCORES if self.proved else Reason.PROBATION
            wanted = f"within [{low}, {high}] of the manifest"
            raise WorkerError(reason, f"score {value} is not {wanted}", f"{np.count_nonzero(bad)} of {len(bad)} scores are not {wanted}")

    def start_worker(self) -> ModelWorker:
        """Another worker for the same model, not yet at work; takes as long as the model needs to load.

        Raises:
            WorkerError: the model does not load within the limits.
        """
        return ModelWorker(self._model, len(self._manifest.features.features), self._manifest.limits)

    def use(self, worker: ModelWorker | None) -> None:
        """Go on with this worker instead of the one before, which is ended; None: without one for now."""
        self.close()
        self._worker = worker
        self._pause_s, self._ask_at = 0.0, 0.0

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()

    def _columns(self, table: Table) -> tuple[Strings, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        entity, event_us = table.get(self._contract.entity), table.get(self._contract.event_time)
        if not isinstance(entity, Strings) or not isinstance(event_us, np.ndarray):
            raise ContractError(f"{self._contract.entity} is no column of text, or {self._contract.event_time} none of times")
        return entity, event_us.astype(np.int64, copy=False)
