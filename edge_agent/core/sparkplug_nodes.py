"""What the births of Sparkplug edge nodes and devices said: which metric an alias stands for, and of which datatype.

- Data is read by the birth of its node or device. Before one, and after a death, nobody knows what its metrics are: `no_birth`.
- The messages of a node and its devices are numbered 0 to 255 and round again. When one is missing, it may have been a birth that
  gave the aliases anew. We only listen, so we cannot ask for a rebirth as a host would: until the next birth, metrics that go by
  alias are refused as `sequence_gap`, while those that carry their name and datatype are still taken.
- A message at or behind the last number that is not newer than it was delivered again. That is no gap, and it is read by the
  birth in force, unless it is older than that.
- A birth that cannot be read or kept ends the one before it: its aliases may have changed.
- A node's birth ends those of its devices; a node's death counts only for the session that it names (bdSeq), because the
  broker may send the will of a lost connection after the birth of the next.
- Limits: NODES_MAX nodes, METRICS_MAX metrics over all of them. A birth beyond them is refused as `oversize`.

The state is explicit: `state` is all there is. `births` and `counters` are its slow and its fast part as bytes, `restore` puts them
together again after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.core.rejects import shown
from edge_agent.core.sparkplug import Address, Kind, Metric, Payload, parse_address, read_payload

NODES_MAX = 1_000
METRICS_MAX = 100_000
NAME_CHARACTERS_MAX = 256
TIME_MS_MAX = 7_258_118_400_000  # the year 2200
SEQUENCES = 256


class Birth(msgspec.Struct):
    """The metrics of a node or device: datatypes by name, names by alias; `sure` unless messages are missing since `at_ms`."""

    at_ms: int
    datatypes: dict[str, int]
    aliases: dict[int, str]
    sure: bool = True

    @property
    def size(self) -> int:
        return len(self.datatypes) + 1


class Node(msgspec.Struct):
    """An edge node: its session, the number and time of its last message, births by device ("" is the node's own)."""

    session: int | None
    born_ms: int
    sequence: int
    at_ms: int
    births: dict[str, Birth]

    @property
    def metrics(self) -> int:
        return sum(b.size for b in self.births.values())


State = dict[str, Node]
"""Nodes by `group/node`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric with its name, datatype and time found out."""

    name: str
    datatype: int | None
    time_ms: int
    metric: Metric


@dataclass(frozen=True)
class Heard:
    """A message that was understood."""

    address: Address
    samples: list[Sample]


class Nodes:
    """See the module's rules. All messages of all nodes come here, in the order received.

    `gaps` tells people where messages are missing, one text each; the caller empties it. `revision` rises whenever births change.
    """

    def __init__(self, state: State | None = None) -> None:
        self.state: State = {} if state is None else state
        self.gaps: list[str] = []
        self.revision = 0

    def hear(self, topic: str, data: bytes, bytes_max: int) -> Heard:
        """Take the next message.

        Raises:
            PayloadError: it gives no readings, and why. State may have changed: a message that cannot be read is still one.
        """
        address = parse_address(topic)
        if max(map(len, (address.group, address.node, address.device))) > NAME_CHARACTERS_MAX:
            raise PayloadError(Reason.OVERSIZE, f"a level of the topic has more than {NAME_CHARACTERS_MAX} characters")
        key = f"{address.group}/{address.node}"
        self.revision += address.kind not in (Kind.NDATA, Kind.DDATA)
        try:
            return self._hear(address, key, data, bytes_max)
        except PayloadError:
            if address.kind in (Kind.NBIRTH, Kind.NDEATH):
                self.state.pop(key, None)
            elif address.kind in (Kind.DBIRTH, Kind.DDEATH):
                self._bury_device(key, address.device)
            raise

    def _hear(self, address: Address, key: str, data: bytes, bytes_max: int) -> Heard:
        if len(data) > bytes_max:
            raise PayloadError(Reason.OVERSIZE, f"payload of {len(data)} bytes; at most {bytes_max}")
        payload = read_payload(data)
        if address.kind is Kind.NDEATH:
            self._bury(key, payload)
            return Heard(address, [])
        at_ms = _time(payload.timestamp_ms, "payload")
        if payload.sequence is None or payload.sequence >= SEQUENCES:
            raise PayloadError(Reason.MALFORMED, f"sequence {payload.sequence} is not 0 to {SEQUENCES - 1}")
        if address.kind is Kind.NBIRTH:
            return self._bear_node(address, key, payload, payload.sequence, at_ms)
        again = self._count(key, payload.sequence, at_ms)
        if address.kind is Kind.DBIRTH:
            return self._bear_device(address, key, payload, payload.sequence, at_ms)
        if address.kind is Kind.DDEATH:
            self._bury_device(key, address.device)
            return Heard(address, [])
        return Heard(address, self._samples(address, key, payload, at_ms, again))

    def _bear_node(self, address: Address, key: str, payload: Payload, sequence: int, at_ms: int) -> Heard:
        birth = _birth(payload, at_ms)
        session = _session(payload)
        old = self.state.get(key)
        self._check_room(key, birth.size)
        if old is not None and (old.session, old.born_ms) == (session, at_ms):  # the same birth once more
            old.births[""] = birth
            old.sequence, old.at_ms = sequence, at_ms
        else:
            self.state[key] = Node(session, at_ms, sequence, at_ms, {"": birth})
        return Heard(address, _birth_samples(payload, at_ms))

    def _bear_device(self, address: Address, key: str, payload: Payload, sequence: int, at_ms: int) -> Heard:
        birth = _birth(payload, at_ms)
        before = self.state[key].births.get(address.device) if key in self.state else None
        self._check_room(key, (self.state[key].metrics if key in self.state else 0) + birth.size, before)
        if key not in self.state:  # we came in the middle; a device's birth stands on its own
            self.state[key] = Node(None, -1, sequence, at_ms, {})
        self.state[key].births[address.device] = birth
        return Heard(address, _birth_samples(payload, at_ms))

    def _check_room(self, key: str, metrics: int, replaced: Birth | None = None) -> None:
        others = sum(n.metrics for k, n in self.state.items() if k != key)
        total = others + metrics - (replaced.size if replaced else 0)
        if total > METRICS_MAX or (key not in self.state and len(self.state) >= NODES_MAX):
            raise PayloadError(Reason.OVERSIZE, f"{total} metrics of {len(self.state)} nodes; at most {METRICS_MAX} and {NODES_MAX}")

    def _bury(self, key: str, payload: Payload) -> None:
        node, session = self.state.get(key), _session(payload)
        if node is not None and (session is None or node.session is None or node.session == session):
            del self.state[key]

    def _bury_device(self, key: str, device: str) -> None:
        if key in self.state:
            self.state[key].births.pop(device, None)

    def _count(self, key: str, sequence: int, at_ms: int) -> bool:
        """Follow the numbers of a node, noting gaps; whether this message came before."""
        node = self.state.get(key)
        if node is None:
            return False
        ahead = (sequence - node.sequence) % SEQUENCES
        if (ahead == 0 or ahead > SEQUENCES // 2) and at_ms <= node.at_ms:
            return True
        expected = (node.sequence + 1) % SEQUENCES
        node.sequence, node.at_ms = sequence, max(at_ms, node.at_ms)
        if sequence == expected:
            return False
        self.revision += 1
        for birth in node.births.values():
            birth.sure = False
        self.gaps.append(f"node {shown(key)}: message {expected} expected, {sequence} came; metrics by alias wait for a rebirth")
        return False

    def _samples(self, address: Address, key: str, payload: Payload, at_ms: int, again: bool) -> list[Sample]:
        node = self.state.get(key)
        birth = None if node is None else node.births.get(address.device)
        if birth is None:
            raise PayloadError(
                Reason.NO_BIRTH, f"no birth of {shown(f'{key}/{address.device}'.rstrip('/'))} since this agent listens, or since its death"
            )
        if again and at_ms < birth.at_ms:
            raise PayloadError(Reason.NO_BIRTH, "it came before, and is older than the birth in force")
        return [self._sample(metric, birth, at_ms) for metric in payload.metrics]

    def _sample(self, metric: Metric, birth: Birth, at_ms: int) -> Sample:
        name = metric.name
        if not name:
            if not birth.sure:
                raise PayloadError(Reason.SEQUENCE_GAP, "messages are missing since the birth, so its aliases are not sure")
            if metric.alias not in birth.aliases:
                raise PayloadError(Reason.NO_BIRTH, f"alias {metric.alias} is not in the birth")
            name = birth.aliases[metric.alias]
        datatype = metric.datatype
        if datatype is None and name in birth.datatypes:
            if not birth.sure:
                raise PayloadError(
                    Reason.SEQUENCE_GAP, f"messages are missing since the birth, so the datatype of {shown(name)!r} is not sure"
                )
            datatype = birth.datatypes[name]
        return Sample(name, datatype, at_ms if metric.timestamp_ms is None else _time(metric.timestamp_ms, shown(name)), metric)


def _birth(payload: Payload, at_ms: int) -> Birth:
    birth = Birth(at_ms, {}, {})
    for metric in payload.metrics:
        if not metric.name or metric.datatype is None:
            raise PayloadError(Reason.MISSING_FIELD, "a metric in a birth has no name or no datatype")
        if len(metric.name) > NAME_CHARACTERS_MAX:
            raise PayloadError(Reason.OVERSIZE, f"a metric's name has {len(metric.name)} characters; at most {NAME_CHARACTERS_MAX}")
        if metric.name in birth.datatypes or metric.alias in birth.aliases:
            raise PayloadError(Reason.MALFORMED, f"metric {shown(metric.name)!r} or its alias {metric.alias} is in the birth twice")
        birth.datatypes[metric.name] = metric.datatype
        if metric.alias is not None:
            birth.aliases[metric.alias] = metric.name
    return birth


def _birth_samples(payload: Payload, at_ms: int) -> list[Sample]:
    """A birth holds the present value of every metric, each perhaps of an earlier time."""
    times = [at_ms if m.timestamp_ms is None else _time(m.timestamp_ms, "metric") for m in payload.metrics]
    return [Sample(m.name or "", m.datatype, t, m) for m, t in zip(payload.metrics, times, strict=True)]


def _session(payload: Payload) -> int | None:
    """The number that ties a death to its birth."""
    return next((int(m.value) for m in payload.metrics if m.name == "bdSeq" and isinstance(m.value, int)), None)


def _time(time_ms: int | None, whose: str) -> int:
    if time_ms is None:
        raise PayloadError(Reason.MISSING_FIELD, f"{whose} has no timestamp")
    if time_ms >= TIME_MS_MAX:
        raise PayloadError(Reason.OUT_OF_RANGE, f"timestamp {time_ms} ms of {whose} is after the year 2200")
    return time_ms


class _Counter(msgspec.Struct, array_like=True):
    """How far a node has counted."""

    sequence: int
    at_ms: int


_encode = msgspec.msgpack.Encoder().encode
_decode_births = msgspec.msgpack.Decoder(State).decode
_decode_counters = msgspec.msgpack.Decoder(dict[str, _Counter]).decode


def births(nodes: Nodes) -> bytes:
    """What changes with `revision`."""
    return _encode(nodes.state)


def counters(nodes: Nodes) -> bytes:
    """What changes with every message."""
    return _encode({key: _Counter(n.sequence, n.at_ms) for key, n in nodes.state.items()})


def restore(births: bytes, counters: bytes) -> Nodes:
    """Nodes as they were.

    Raises:
        msgspec.MsgspecError: the bytes are not theirs.
    """
    nodes = Nodes(_decode_births(births))
    for key, counter in _decode_counters(counters).items():
        if key in nodes.state:
            nodes.state[key].sequence, nodes.state[key].at_ms = counter.sequence, counter.at_ms
    return nodes
