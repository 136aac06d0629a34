"""Personal fields on the device: treated before anything is stored. Pure; the rules are in `contract.privacy`.

- `Treatment.table` takes decoded, valid readings. Text is treated once per distinct value of a batch; names made before are remembered.
- `Treatment.payload` and `.detail` and `.topic` are what quarantine may keep of a rejected message. Of a payload that is a map, the
  fields that the contract names, treated; of any other nothing. Of a reject's words, only those about a field that is not personal.
- The result of a payload is marked: `redacted:` and JSON. It has been through here, so it is not treated again.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from edge_agent.contract.columns import Column, Strings, Table
from edge_agent.contract.privacy import HASH_CHARACTERS, KEY_ID_CHARACTERS, Pii, PiiKind, to_step
from edge_agent.contract.stream import Compression, Encoding, StreamContract
from edge_agent.core.cbor import read_cbor
from edge_agent.core.decode import DECODE_ERRORS
from edge_agent.core.rejects import REDACTED, Reject

NAMES_MAX = 65_536  # of remembered texts,
TEXT_CHARACTERS_MAX = 64  # and of each: longer ones are hashed anew, so that hostile ones do not fill the memory
WITHHELD = b"(not stored: the stream has personal fields)"

_MAPS: dict[Encoding, Callable[[bytes], Any]] = {
    Encoding.JSON: msgspec.json.decode,
    Encoding.MSGPACK: msgspec.msgpack.decode,
    Encoding.CBOR: read_cbor,
}


class Pseudonyms:
    """The names that texts have under one key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.key_id = hashlib.sha256(b"fenceline pii key" + key).hexdigest()[:KEY_ID_CHARACTERS]
        self._known: dict[str, str] = {}

    def of(self, text: str) -> str:
        """The name of a text: the same for ever, under this key."""
        name = self._known.get(text)
        if name is None:
            digest = hmac.new(self._key, text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()
            name = f"pii:{self.key_id}:{digest[:HASH_CHARACTERS]}"
            if len(self._known) >= NAMES_MAX:
                self._known.clear()
            if len(text) <= TEXT_CHARACTERS_MAX:
                self._known[text] = name
        return name


class Treatment:
    """What becomes of the personal fields of one stream. `pseudonyms` are needed if any is hashed.

    `topic_is_personal`: a level of its topic fills a personal field.
    """

    def __init__(self, contract: StreamContract, pseudonyms: Pseudonyms | None) -> None:
        self._contract, self._pseudonyms = contract, pseudonyms
        self._tags: dict[str, Pii] = {f.name: f.pii for f in contract.private if f.pii is not None}
        self._public = {f.name for f in contract.fields} - set(self._tags)
        self.topic_is_personal = bool(set(contract.shape.names) & set(self._tags))
        self._map = _MAPS.get(contract.encoding) if contract.compression is Compression.NONE else None

    def table(self, table: Table) -> Table:
        """Readings as they may be stored."""
        return {**table, **{name: self._column(table[name], tag) for name, tag in self._tags.items()}}

    def payload(self, payload: bytes) -> bytes:
        """What of a rejected payload may be stored."""
        if self._map is None or len(payload) > self._contract.payload_bytes_max:
            return WITHHELD
        try:
            tree = self._map(payload)
            if not isinstance(tree, dict):
                return WITHHELD
            shown = {name: tree[name] for name in self._public if name in tree and _plain(tree[name])}
            personal = {name: tag for name, tag in self._tags.items() if name in tree and _treatable(tree[name], tag)}
            shown |= {name: self._value(tree[name], tag) for name, tag in personal.items()}
            return REDACTED.encode() + msgspec.json.encode(shown)
        except DECODE_ERRORS:
            return WITHHELD

    def detail(self, reject: Reject) -> str:
        """What of a reject's words may be stored: they quote values."""
        if reject.field in self._public:
            return reject.detail
        return f"field {reject.field!r}, which is personal" if reject.field in self._tags else "not shown: the stream has personal fields"

    def topic(self, topic: str) -> str:
        """What of a rejected message's topic may be stored: its levels may be personal."""
        return self._contract.shape.filter if self.topic_is_personal else topic

    def _column(self, column: Column, tag: Pii) -> Column:
        if isinstance(column, Strings):
            return Strings(column.codes, tuple(self._value(text, tag) for text in column.values))
        if tag.kind is PiiKind.DROP:
            return np.full(len(column), np.nan)
        rounded = to_step(column.astype(np.float64, copy=False), tag.step)
        return rounded.astype(np.int64) if column.dtype == np.int64 else rounded

    def _value(self, value: Any, tag: Pii) -> Any:
        if tag.kind is PiiKind.ROUND:
            rounded = float(to_step(np.array([float(value)]), tag.step)[0])
            return int(rounded) if isinstance(value, int) else rounded
        if tag.kind is PiiKind.DROP:
            return "" if isinstance(value, str) else None
        assert self._pseudonyms is not None
        return self._pseudonyms.of(value)


def _plain(value: Any) -> bool:
    """Whether a value is one that a field can hold: what lies deeper may be anything."""
    return value is None or isinstance(value, str | int | float)


def _treatable(value: Any, tag: Pii) -> bool:
    if tag.kind is PiiKind.ROUND:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, str) or (tag.kind is PiiKind.DROP and value is None)
