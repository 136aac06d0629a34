"""The active model at work: windows, worker and probation of one bundle.

- Windows are warmed from the buffer's history, so that the first readings after a swap or a restart have the windows
  that they would have had without it.
- Every score must be a number within the manifest's bounds. One that is not, and any failure of the worker, ends this bundle: the
  caller stores the readings unscored and rolls back.
- After `probation_rows` good scores the bundle is proved.
"""

from __future__ import annotations

import numpy as np

from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from edge_agent.inference import ModelWorker, WorkerError
from edge_agent.updater import Activation


class Scoring:
    """One activated bundle. `sha256` names its file; `worker` runs its model."""

    def __init__(self, activation: Activation, worker: ModelWorker, contract: StreamContract) -> None:
        self.sha256 = activation.sha256
        self.stream, self.contract_version = contract.stream, contract.version
        self._manifest = activation.bundle.manifest
        self._contract = contract
        self._worker = worker
        self._windows = Windows(self._manifest.features)
        self._good_rows = 0 if activation.on_probation else self._manifest.probation_rows

    @property
    def proved(self) -> bool:
        """Whether the probation is over."""
        return self._good_rows >= self._manifest.probation_rows

    def warm(self, history: Table | None) -> None:
        """Take the stored readings as the past of the windows."""
        if history is not None:
            self._windows.warm(*self._columns(history), history)

    def score(self, table: Table) -> Floats:
        """Score fresh readings in the order seen.

        Raises:
            WorkerError: the worker failed, or a score is out of bounds.
        """
        features = self._windows.push(*self._columns(table), table)
        scores = self._worker.score(features)
        low, high = self._manifest.score_min, self._manifest.score_max
        bad = ~((scores >= low) & (scores <= high))
        if bad.any():
            value = scores[np.argmax(bad)]
            reason = Reason.BAD_SCORES if self.proved else Reason.PROBATION
            raise WorkerError(reason, f"score {value} is not within [{low}, {high}] of the manifest")
        self._good_rows += len(scores)
        return scores

    def close(self) -> None:
        self._worker.close()

    def _columns(self, table: Table) -> tuple[Strings, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        entity, event_us = table[self._contract.entity], table[self._contract.event_time]
        assert isinstance(entity, Strings) and isinstance(event_us, np.ndarray)
        return entity, event_us.astype(np.int64, copy=False)
