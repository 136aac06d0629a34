"""Rows of a feature view into Feast's online store, each batch read back: what is counted as served is served.

- A row counts as `written` if the store gives it back in every bit, as `older` if the store has a newer value of its entity. Anything
  else is an error: never a silent part.
- Feast converts a batch to messages of a few hundred bytes per value, so a batch has at most BATCH_ROWS rows.
- The library's errors of the store's connection become UnavailableError: keep the rows, come again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from edge_agent.contract.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

BATCH_ROWS = 1_024
TIMES_US = (-62_104_060_800_000_000, 253_370_764_799_999_999)
"""The first and the last time that Feast can store in any time zone: those of the years 2 to 9998. A reading may have any."""
NAMED_MAX = 3


@dataclass(frozen=True)
class Written:
    """What became of rows: how many are served now, and of how many the store had newer values."""

    written: int = 0
    older: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(self.written + other.written, self.older + other.older)


class OnlineWriter:
    """Writes the rows of one view: columns are its join keys, features and times, under Feast's names."""

    def __init__(self, store: FeatureStore, view: FeatureView) -> None:
        from feast.infra.provider import get_provider

        self.store, self.view = store, view
        self._provider = get_provider(store.config)
        self._key_types = {e.name: e.dtype.to_value_type() for e in view.entity_columns}

    def write(self, rows: pa.RecordBatch) -> Written:
        """Write at most BATCH_ROWS rows of as many entities.

        Raises:
            ConfigError: a column is not of the type that its field declares.
            UnavailableError: the store does not answer, or does not give back what was written.
        """
        messages = self._messages(rows)
        with available(self.store):
            self._provider.online_write_batch(self.store.config, self.view, messages, progress=None)
        return self._check(messages)

    def push(self, source: str, rows: pa.RecordBatch) -> Written:
        """The same through the push source called `source`, to every view that it feeds.

        Raises:
            UnavailableError: as `write`.
        """
        from feast.data_source import PushMode

        with available(self.store):
            self.store.push(source, rows.to_pandas(), to=PushMode.ONLINE)
        return self._check(self._messages(rows))

    def missing(self, keys: pa.Table) -> int:
        """How many of these entities the store has no value of."""
        from feast.utils import _build_entity_keys, _columns_to_proto_values

        columns = _columns_to_proto_values(keys.combine_chunks().to_batches()[0], list(self._key_types.items()))
        return sum(found[1] is None for found in self._read(_build_entity_keys(keys.num_rows, self._key_types, columns)))

    def empty(self) -> None:
        """Take all values of the view away."""
        with available(self.store):
            self._provider.online_store.update(self.store.config, [self.view], [], [], [], partial=True)
            self._provider.online_store.update(self.store.config, [], [self.view], [], [], partial=True)

    def _messages(self, rows: pa.RecordBatch) -> list[Any]:
        from feast.types import Float64
        from feast.utils import _convert_arrow_to_proto

        for feature in self.view.features:
            if feature.dtype == Float64 and pa.types.is_float32(rows.column(feature.name).type):  # Feast takes those for Float32 only
                place = rows.schema.get_field_index(feature.name)
                rows = rows.set_column(place, feature.name, rows.column(place).cast(pa.float64()))
        try:
            # Of a table Feast takes the first chunk only, and says nothing: hence a RecordBatch.
            messages: list[Any] = _convert_arrow_to_proto(rows, self.view, self._key_types)
        except (TypeError, ValueError, AssertionError) as e:
            raise ConfigError(f"view {self.view.name!r} has values that its fields do not declare, or that Feast cannot store: {e}") from e
        return messages

    def _check(self, messages: list[Any]) -> Written:
        """Compare what the store gives back with what it was given."""
        stored = self._read([key for key, _, _, _ in messages])
        written = older = 0
        lost = []
        for (key, values, event, _), (at, found) in zip(messages, stored, strict=True):
            if found is not None and _bits(values) == _bits({name: found[name] for name in values if name in found}):
                written += 1
            elif at is not None and _aware(at) >= _aware(event):
                older += 1
            else:
                lost.append(" ".join(str(v.string_val or v.int64_val or v.int32_val) for v in key.entity_values))
        if lost:
            raise UnavailableError(
                f"the online store took {len(messages)} rows of view {self.view.name!r} and does not give back {len(lost)} of them "
                f"({', '.join(lost[:NAMED_MAX])}{', …' if len(lost) > NAMED_MAX else ''}); is it full, or evicting? Then run again"
            )
        return Written(written, older)

    def _read(self, keys: list[Any]) -> list[tuple[datetime | None, dict[str, Any] | None]]:
        with available(self.store):
            found = self._provider.online_read(self.store.config, self.view, keys)
        # Redis' store gives a time of 1970 and unset values for an entity that it does not know.
        return [(None, None) if at is None or _aware(at).timestamp() == 0 else (at, values) for at, values in found]


@contextmanager
def available(store: FeatureStore) -> Iterator[None]:
    """Errors of the connection to the online store, as UnavailableError."""
    import redis

    try:
        yield
    except (sqlite3.Error, redis.RedisError, OSError) as e:
        raise UnavailableError(f"online store {store.config.online_store.type} fails: {e}") from e


def _bits(values: dict[str, Any]) -> dict[str, bytes]:
    return {name: value.SerializeToString() for name, value in values.items()}


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Write = Callable[[pa.RecordBatch], Written]
