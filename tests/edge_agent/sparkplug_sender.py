"""A Sparkplug B edge node for tests: its payloads are made by Google's protobuf library from a descriptor, not by our code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_F = descriptor_pb2.FieldDescriptorProto
_PAYLOAD = [("timestamp", 1, _F.TYPE_UINT64), ("seq", 3, _F.TYPE_UINT64), ("uuid", 4, _F.TYPE_STRING), ("body", 5, _F.TYPE_BYTES)]
_METRIC = [
    ("name", 1, _F.TYPE_STRING),
    ("alias", 2, _F.TYPE_UINT64),
    ("timestamp", 3, _F.TYPE_UINT64),
    ("datatype", 4, _F.TYPE_UINT32),
    ("is_historical", 5, _F.TYPE_BOOL),
    ("is_transient", 6, _F.TYPE_BOOL),
    ("is_null", 7, _F.TYPE_BOOL),
    ("metadata", 8, _F.TYPE_BYTES),
    ("properties", 9, _F.TYPE_BYTES),
]
_VALUES = [
    ("int_value", 10, _F.TYPE_UINT32),
    ("long_value", 11, _F.TYPE_UINT64),
    ("float_value", 12, _F.TYPE_FLOAT),
    ("double_value", 13, _F.TYPE_DOUBLE),
    ("boolean_value", 14, _F.TYPE_BOOL),
    ("string_value", 15, _F.TYPE_STRING),
    ("bytes_value", 16, _F.TYPE_BYTES),
    ("dataset_value", 17, _F.TYPE_BYTES),  # nested messages are bytes on the wire
    ("template_value", 18, _F.TYPE_BYTES),
    ("extension_value", 19, _F.TYPE_BYTES),
]


def _payload_class() -> Any:
    """Eclipse Tahu's sparkplug_b.proto (proto2), without the insides of nested messages."""
    file = descriptor_pb2.FileDescriptorProto(name="sparkplug_b.proto", package="org.eclipse.tahu.protobuf", syntax="proto2")
    payload = file.message_type.add(name="Payload")
    metric = payload.nested_type.add(name="Metric")
    metric.oneof_decl.add(name="value")
    for name, number, kind in _METRIC:
        metric.field.add(name=name, number=number, type=kind, label=_F.LABEL_OPTIONAL)
    for name, number, kind in _VALUES:
        metric.field.add(name=name, number=number, type=kind, label=_F.LABEL_OPTIONAL, oneof_index=0)
    for name, number, kind in _PAYLOAD:
        payload.field.add(name=name, number=number, type=kind, label=_F.LABEL_OPTIONAL)
    payload.field.add(
        name="metrics", number=2, type=_F.TYPE_MESSAGE, label=_F.LABEL_REPEATED, type_name=".org.eclipse.tahu.protobuf.Payload.Metric"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("org.eclipse.tahu.protobuf.Payload"))


Payload = _payload_class()

FLOAT, DOUBLE, BOOLEAN, STRING, INT8, INT32, INT64, UINT32, UINT64 = 9, 10, 11, 12, 1, 3, 4, 7, 8
_FIELD = {
    FLOAT: "float_value",
    DOUBLE: "double_value",
    BOOLEAN: "boolean_value",
    STRING: "string_value",
    INT64: "long_value",
    UINT64: "long_value",
}


def encode(timestamp_ms: int | None, sequence: int | None, metrics: list[dict[str, Any]]) -> bytes:
    """A payload; a metric is its fields, and `value` with `as_type` for a value in the field of that datatype."""
    message = Payload()
    if timestamp_ms is not None:
        message.timestamp = timestamp_ms
    if sequence is not None:
        message.seq = sequence
    for fields in metrics:
        metric = message.metrics.add()
        kind = fields.get("as_type", fields.get("datatype", DOUBLE))
        for name, value in fields.items():
            if name == "value":
                bits = value % 2**32 if kind in (INT8, INT32, UINT32) else value % 2**64 if kind in (INT64, UINT64) else value
                setattr(metric, _FIELD.get(kind, "int_value"), bits)
            elif name != "as_type":
                setattr(metric, name, value)
    return bytes(message.SerializeToString())


Message = tuple[str, bytes]


@dataclass
class EdgeNode:
    """Births, data and deaths of one node and its devices, in order, with sequence and session numbers kept as the standard says."""

    group: str = "plant"
    node: str = "edge-7"
    now_ms: int = 1_700_000_000_000
    session: int = 0
    sequence: int = 0
    types: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)

    def topic(self, kind: str, device: str = "") -> str:
        return f"spBv1.0/{self.group}/{kind}/{self.node}" + (f"/{device}" if device else "")

    def nbirth(self, metrics: list[tuple[str, int, int]] = [], values: dict[str, Any] = {}) -> Message:  # noqa: B006
        """`metrics`: name, alias, datatype."""
        self.session += 1
        self.sequence = -1
        rows = [{"name": "bdSeq", "datatype": INT64, "value": self.session}, *self._birth("", metrics, values)]
        return self.topic("NBIRTH"), encode(self._tick(), self._next(), rows)

    def dbirth(self, device: str, metrics: list[tuple[str, int, int]], values: dict[str, Any] = {}) -> Message:  # noqa: B006
        return self.topic("DBIRTH", device), encode(self._tick(), self._next(), self._birth(device, metrics, values))

    def data(self, device: str, by_name: bool = False, **values: Any) -> Message:
        """Values by metric name (`__` for `/`), sent by alias without a datatype, as nodes do."""
        known = {name.replace("/", "__"): (name, alias, kind) for name, alias, kind in self.types[device]}
        rows = []
        for key, value in values.items():
            name, alias, kind = known[key]
            label = {"name": name, "datatype": kind} if by_name else {"alias": alias, "as_type": kind}
            rows.append({**label, "is_null": True} if value is None else {**label, "value": value})
        return self.topic("DDATA" if device else "NDATA", device), encode(self._tick(), self._next(), rows)

    def ddeath(self, device: str) -> Message:
        return self.topic("DDEATH", device), encode(self._tick(), self._next(), [])

    def ndeath(self, session: int | None = None) -> Message:
        number = self.session if session is None else session
        return self.topic("NDEATH"), encode(None, None, [{"name": "bdSeq", "datatype": INT64, "value": number}])

    def skip(self) -> None:
        """A message that is lost on its way."""
        self._tick()
        self._next()

    def _birth(self, device: str, metrics: list[tuple[str, int, int]], values: dict[str, Any]) -> list[dict[str, Any]]:
        self.types[device] = metrics
        return [
            {"name": n, "alias": a, "datatype": t, **({"value": values[n]} if n in values else {"is_null": True})} for n, a, t in metrics
        ]

    def _tick(self) -> int:
        self.now_ms += 1_000
        return self.now_ms

    def _next(self) -> int:
        self.sequence = (self.sequence + 1) % 256
        return self.sequence
