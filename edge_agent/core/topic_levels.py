"""What the topics of a stream say about its readings: the named levels of `plant/{pump}/{field}`.

- A level fills a string field; an empty one, and one longer than any text may be, is a reject.
- Sensors use few topics over and over, so what a topic says is remembered, for at most TOPICS_MAX of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import StreamContract
from edge_agent.core.rejects import Reject, reject, shown

STRING_CHARACTERS_MAX = 1_024
TOPICS_MAX = 10_000
TOPIC_CHARACTERS_MAX = 256  # of topics that are remembered


class TopicLevels:
    """The named levels of one stream's topic; `names` are the fields they fill."""

    def __init__(self, contract: StreamContract) -> None:
        self._shape = contract.shape
        self.names = self._shape.names
        self._known: dict[str, tuple[str, ...] | Reject] = {}

    def rejects(self, topics: Sequence[str]) -> list[Reject]:
        """The messages whose topic cannot fill its fields."""
        if not self.names:
            return []
        answers = map(self._read, topics)
        return [Reject(i, a.reason, a.detail) for i, a in enumerate(answers) if isinstance(a, Reject)]

    def columns(self, topics: Sequence[str], rows: npt.NDArray[np.intp]) -> dict[str, Strings]:
        """What the topics of these rows say, by name."""
        if not self.names:
            return {}
        answers = [self._read(topics[i]) for i in rows.tolist()]
        said = [a for a in answers if not isinstance(a, Reject)]  # all of them: rows are those that were not rejected
        return {name: Strings.of([values[place] for values in said]) for place, name in enumerate(self.names)}

    def _read(self, topic: str) -> tuple[str, ...] | Reject:
        known = self._known.get(topic)
        if known is None:
            known = self._read_new(topic)
            if len(self._known) < TOPICS_MAX and len(topic) <= TOPIC_CHARACTERS_MAX:
                self._known[topic] = known
        return known

    def _read_new(self, topic: str) -> tuple[str, ...] | Reject:
        if not self._shape.matches(topic):
            return reject(0, Reason.UNKNOWN_TOPIC, f"topic {shown(topic)!r} does not match {shown(self._shape.filter)}")
        values = self._shape.values(topic)
        for name, value in zip(self.names, values, strict=True):
            if not value:
                return reject(0, Reason.MISSING_FIELD, f"the level {name!r} of topic {shown(topic)!r} is empty")
            if len(value) > STRING_CHARACTERS_MAX:
                return reject(
                    0, Reason.OVERSIZE, f"the level {name!r} of the topic has {len(value)} characters; at most {STRING_CHARACTERS_MAX}"
                )
        return values
