"""The model in use: the updater's thread makes one ready, the data path takes it between two batches.

A model that fails is dropped at once and rolled back; the readings of that batch are stored without scores. The data path never waits
for a model longer than its limits allow.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from edge_agent.contract.columns import Floats, Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import FieldType, StreamContract
from edge_agent.inference import ModelWorker, WorkerError
from edge_agent.intake import Readings
from edge_agent.metrics import Metrics
from edge_agent.releases import RefusedError
from edge_agent.scoring import Scoring
from edge_agent.updater import Activation, Updater

log = logging.getLogger(__name__)


class ActiveModel:
    """The active model of one agent, or none.

    Args:
        history: the stored readings of a stream at a contract version, to warm windows with.
        tell: tells the operator of an event.
    """

    def __init__(
        self,
        contracts: tuple[StreamContract, ...],
        history: Callable[[str, str], Table | None],
        metrics: Metrics,
        tell: Callable[..., None],
    ) -> None:
        self.updater: Updater | None = None
        self._contracts = {c.stream: c for c in contracts}
        self._history, self._metrics, self._tell = history, metrics, tell
        self._scoring: Scoring | None = None
        self._swaps: queue.SimpleQueue[Scoring | None] = queue.SimpleQueue()

    def activate(self, activation: Activation | None) -> None:
        """Make a model ready, or ask for none; called by the updater in its own thread, or while the agent starts.

        Raises:
            RefusedError: the bundle does not fit this agent's stream.
            WorkerError: the model does not load.
        """
        if activation is None:
            self._swaps.put(None)
            return
        manifest = activation.bundle.manifest
        contract = self._contracts[manifest.stream]
        numeric = {f.name for f in contract.fields if f.type is not FieldType.STRING}
        foreign = sorted({f.field for f in manifest.features.features} - numeric)
        if foreign:
            raise RefusedError(Reason.FOREIGN, f"bundle needs the fields {foreign}, which are no numbers of stream {contract.stream}")
        worker = ModelWorker(activation.bundle.model, len(manifest.features.features), manifest.limits)
        self._swaps.put(Scoring(activation, worker, contract))

    def swap(self) -> None:
        """Take the model made ready last, if there is a new one."""
        while not self._swaps.empty():
            old, self._scoring = self._scoring, self._swaps.get()
            if self._scoring is not None:
                self._scoring.warm(self._history(self._scoring.stream, self._scoring.contract_version))
            if old is not None:
                old.close()

    def score(self, readings: Readings) -> tuple[Floats | None, str | None]:
        """Scores and the digest of the bundle that made them; (None, None) without a working model."""
        scoring = self._scoring
        if scoring is None or scoring.stream != readings.contract.stream:
            return None, None
        was_proved = scoring.proved
        try:
            scores = scoring.score(readings.table)
        except WorkerError as e:
            self._drop(scoring, e)
            return None, None
        if scoring.proved and not was_proved and self.updater is not None:
            self.updater.confirm(scoring.sha256)
        self._metrics.scored.labels(readings.contract.stream).inc(len(scores))
        return scores, scoring.sha256

    def close(self) -> None:
        """End the active model and those not taken yet."""
        self._swaps.put(None)
        self.swap()

    def _drop(self, scoring: Scoring, error: WorkerError) -> None:
        log.error("model failed sha256=%s reason=%s detail=%s", scoring.sha256, error.reason, error)
        self._tell("model_failed", sha256=scoring.sha256, reason=error.reason.value, detail=str(error))
        self._metrics.model_failures.labels(error.reason.value).inc()
        self._scoring = None
        scoring.close()
        if self.updater is not None:
            self.updater.rollback(scoring.sha256, error.reason, str(error))
