"""Window features: one definition for training, the cloud and the device.

- A spec says which windows there are and which features they have (`contract.feature_spec`); `trailing` and `closing` say which readings
  a window holds, `aggregates` how its features are computed.
- A feature has the same bits however the readings are cut into batches, and on every machine with IEEE 754 arithmetic. Entities are apart:
  how their readings are mixed changes nothing.
- Memory is bounded: of the entities seen last at most `Windows.entities_max` are remembered, so that all of them together hold at most
  HELD_VALUES_MAX numbers.

>>> import numpy as np
>>> spec = FeatureSpec(features=[Feature("t", "mean")], window_rows=2, window_s=3600.0)
>>> windows = Windows(spec)
>>> windows.push(Strings.of(["a"] * 3), np.array([0, 1, 2]), {"t": np.array([1.0, 3.0, 5.0])}).features.tolist()
[[1.0], [2.0], [4.0]]
>>> seconds = FeatureSpec(features=[Feature("t", "rms")], window_rows=200, window_s=1.0, kind=WindowKind.TUMBLING)
>>> made = Windows(seconds).push(Strings.of(["a"] * 3), np.array([0, 900_000, 1_000_000]), {"t": np.array([3.0, 3.0, 5.0])})
>>> made.features.tolist(), made.end_us.tolist(), made.rows.tolist()  # closed by the third reading, which is not in it
([[3.0]], [1000000], [2])
"""

from __future__ import annotations

from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind
from edge_agent.core.aggregates import Made, Outputs
from edge_agent.core.closing import ClosingWindows
from edge_agent.core.functions import NO_FUNCTIONS, Functions, check_functions
from edge_agent.core.trailing import TrailingWindows

ENTITIES_MAX = 10_000
HELD_VALUES_MAX = 16 * 1024 * 1024

__all__ = ["Feature", "FeatureSpec", "Made", "WindowKind", "Windows"]


class Windows:
    """The open windows of one stream on one device.

    Raises:
        BundleError: a function of the spec is not installed here, or in another version.
    """

    def __init__(self, spec: FeatureSpec, functions: Functions = NO_FUNCTIONS) -> None:
        check_functions(spec, functions)
        self.spec = spec
        self.late = self.overfull = 0
        """Readings so far that missed a window of theirs because they came too late, or because it was full."""
        self._outputs = Outputs(spec, {name: functions[name] for name in spec.functions})
        kind = TrailingWindows if spec.kind is WindowKind.TRAILING else ClosingWindows
        self._kind: TrailingWindows | ClosingWindows = kind(spec, self._outputs, entities_max(spec))

    @property
    def entities_max(self) -> int:
        """So many entities are remembered; a new one beyond that makes the one longest unseen be forgotten."""
        return self._kind.recent.limit

    @property
    def forgotten(self) -> int:
        """Readings so far that were in open windows of forgotten entities: those windows are never made."""
        return self._kind.forgotten

    def push(self, entity: Strings, event_us: Ints, table: Table) -> Made:
        """Take readings in the order seen, and return the windows that are done with them.

        Raises:
            ContractError: the table lacks a field of the spec, or it is not numeric; a function of the spec failed.
        """
        entity, values = self._checked(entity, table)
        parts = [(p.start, self._kind.push(entity[p], event_us[p], values[p])) for p in self._kind.recent.parts(entity)]
        made = Made.together(parts)
        self.late += len(made.late)
        self.overfull += len(made.overfull)
        return made

    def warm(self, entity: Strings, event_us: Ints, table: Table) -> None:
        """Take readings as history only: after a restart, those that the buffer still holds."""
        entity, values = self._checked(entity, table)
        for part in self._kind.recent.parts(entity):
            self._kind.warm(entity[part], event_us[part], values[part])

    def _checked(self, entity: Strings, table: Table) -> tuple[Strings, Floats]:
        if len(set(entity.values)) != len(entity.values):
            entity = Strings.of(entity.tolist())
        return entity, self._outputs.values(table, len(entity))


def entities_max(spec: FeatureSpec) -> int:
    """How many entities are remembered: ENTITIES_MAX, or as many as HELD_VALUES_MAX numbers hold when every window is full."""
    rows = spec.window_rows if spec.kind is WindowKind.TRAILING else spec.hop_rows * (spec.open_max + spec.overlap - 1)
    return max(1, min(ENTITIES_MAX, HELD_VALUES_MAX // (rows * (len(spec.fields) + 2))))
