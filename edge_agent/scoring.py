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
- After `probation_rows` good scores the bundle is proved.
"""

from __future__ import annotations

import numpy as np

from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from edge_agent.core.functions import NO_FUNCTIONS, Functions
from edge_agent.inference import ModelWorker, WorkerError
from edge_agent.updater import Activation

PATIENCE_S = 0.5


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
        self._worker: ModelWorker | None = self.start_worker()

    @property
    def proved(self) -> bool:
        """Whether the probation is over."""
        return self._good_rows >= self._manifest.probation_rows

    def warm(self, history: Table | None) -> None:
        """Take the stored readings as the past of the windows."""
        if history is not None:
            self._windows.warm(*self._columns(history), history)

    def score(self, table: Table) -> Floats | None:
        """Score fresh readings in the order seen, one score per row; None if there are no scores in time, or no worker now.

        Raises:
            WorkerError: the worker failed and is ended, a score is out of bounds, or a function of the features failed.
        """
        try:
            made = self._windows.push(*self._columns(table), table)
        except ContractError as e:
            raise WorkerError(Reason.BAD_SCORES, str(e)) from e
        scores = None if self._worker is None else self._worker.try_score(made.features, PATIENCE_S)
        if scores is None:
            return None
        self._check(scores)
        self._good_rows += len(scores)
        out = np.full(len(table[self._contract.entity]), np.nan)
        out[made.rows] = scores  # of several on one row the last stays: the newest window's
        return out

    def _check(self, scores: Floats) -> None:
        low, high = self._manifest.score_min, self._manifest.score_max
        bad = ~((scores >= low) & (scores <= high))
        if bad.any():
            value = scores[np.argmax(bad)]
            reason = Reason.BAD_SCORES if self.proved else Reason.PROBATION
            raise WorkerError(reason, f"score {value} is not within [{low}, {high}] of the manifest")

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

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()

    def _columns(self, table: Table) -> tuple[Strings, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        entity, event_us = table[self._contract.entity], table[self._contract.event_time]
        assert isinstance(entity, Strings) and isinstance(event_us, np.ndarray)
        return entity, event_us.astype(np.int64, copy=False)
