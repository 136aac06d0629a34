"""Sensor topics with named levels: `plant/{pump}/{field}` says that the second level fills the field `pump`.

- A name stands for a whole level, once. `{device}` is not a name: it is the gateway's, filled in by its settings.
- `+` and `#` may stand beside names, as in any MQTT filter.
- What a topic says is data and never becomes part of another topic or of a file name. Empty levels fill no field.

>>> shape = parse_shape("plant/{pump}/{field}")
>>> shape.filter, shape.values("plant/p-1/flow")
('plant/+/+', ('p-1', 'flow'))
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_agent.contract.errors import ContractError

DEVICE = "{device}"
FIELD = "field"
"""The level that names the field of a single-value topic."""

TOPIC_CHARACTERS_MAX = 65_535
_NAMED = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Shape:
    """The MQTT filter of a topic, and which level (counted from 0) has which name, from left to right."""

    filter: str
    names: tuple[str, ...]
    levels: tuple[int, ...]

    def values(self, topic: str) -> tuple[str, ...]:
        """What a topic that matches the filter says, in the order of `names`."""
        parts = topic.split("/")
        return tuple(parts[level] for level in self.levels)

    def matches(self, topic: str) -> bool:
        """Whether a message's topic matches the filter; one that holds a wildcard or NUL is no message's topic."""
        if "+" in topic or "#" in topic or "\0" in topic or (topic.startswith("$") and self.filter[0] in "+#"):
            return False
        wanted, parts = self.filter.split("/"), topic.split("/")
        if wanted[-1] == "#":
            wanted.pop()
            parts = parts[: len(wanted)]
        return len(wanted) == len(parts) and all(w in ("+", p) for w, p in zip(wanted, parts, strict=True))


def parse_shape(topic: str) -> Shape:
    """Read the topic of a contract.

    Raises:
        ContractError: it is not an MQTT filter, or a name is not a whole level or repeats.
    """
    if not topic or len(topic) > TOPIC_CHARACTERS_MAX or "\0" in topic:
        raise ContractError(f"topic {topic[:80]!r} must have 1 to {TOPIC_CHARACTERS_MAX} characters, none of them NUL")
    levels = topic.split("/")
    named = {i: match[1] for i, level in enumerate(levels) if level != DEVICE and (match := _NAMED.fullmatch(level))}
    for i, level in enumerate(levels):
        rest = "" if i in named else level.replace(DEVICE, "")
        if "{" in rest or "}" in rest:
            raise ContractError(f"topic {topic!r}: level {level!r} must be one name in braces, or have none")
        if ("+" in rest and level != "+") or ("#" in rest and (level != "#" or i != len(levels) - 1)):
            raise ContractError(f"topic {topic!r}: + must be a whole level, # the whole last level")
    names = tuple(named.values())
    if len(set(names)) != len(names):
        raise ContractError(f"topic {topic!r}: names repeat")
    return Shape("/".join("+" if i in named else level for i, level in enumerate(levels)), names, tuple(named))
