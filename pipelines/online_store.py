"""Feast online stores that keep the newest value, whoever writes last: SQLite and Redis.

Named in feature_store.yaml by class path. Feast's own SQLite store lets the last writer win and keeps event times in whole seconds; its
Redis store refuses a correction that has the event time of what it corrects, and two writers can cross between its look and its
write. The rule here is one atomic step in the database, so materialisation, live windows and `feast materialize` may write at once:

- A row replaces what is stored of its entity unless that has a higher (event time, created time), in microseconds UTC. A row
  without a created time counts as created before all others.
- What the stores hold otherwise is laid out as Feast's own, so that Feast reads it.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pandas as pd
from feast import Entity, FeatureView, RepoConfig
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import _mmh3, _redis_key, compute_table_id, compute_versioned_name, extract_text_and_num
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.utils import to_naive_utc
from google.protobuf.timestamp_pb2 import Timestamp

from edge_agent.contract.errors import ConfigError

Row = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
Progress = Callable[[int], Any]

BUSY_MS = 30_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FEATURES = "fenceline_features"
"""A table of our own: the feature names that a view's table holds, at most."""


class NewestSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """`online_store:` in feature_store.yaml."""

    type: Literal["pipelines.online_store.NewestSqliteOnlineStore"] = "pipelines.online_store.NewestSqliteOnlineStore"  # type: ignore[assignment]


class NewestSqliteOnlineStore(SqliteOnlineStore):
    """One row per entity and feature, with its times in microseconds in two columns of its own."""

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            if config.online_store.vector_enabled or config.online_store.enable_openai_compatible_store:
                raise ConfigError(f"online store {config.online_store.type} holds no vectors; use Feast's own sqlite store for them")
            connection: sqlite3.Connection = super()._get_conn(config)
            connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        return self._conn  # type: ignore[return-value]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Make and drop tables, and the values of features that a view no longer has.

        A table that Feast's own store made is made new: its times are too coarse to compare with.
        """
        connection = self._get_conn(config)
        foreign = [t for t in tables_to_keep if not _has_times(connection, _table(config, t))]
        super().update(config, [*tables_to_delete, *foreign], [], entities_to_delete, entities_to_keep, partial)
        super().update(config, [], tables_to_keep, [], [], partial)
        for table in foreign:
            connection.execute(f"ALTER TABLE {_table(config, table)} ADD COLUMN event_us INTEGER")
            connection.execute(f"ALTER TABLE {_table(config, table)} ADD COLUMN created_us INTEGER")
        connection.execute(f"CREATE TABLE IF NOT EXISTS {_FEATURES} (view TEXT PRIMARY KEY, names TEXT NOT NULL)")
        for table in tables_to_keep:
            self._drop_unknown(connection, _table(config, table), sorted(f.name for f in table.features))

    def _drop_unknown(self, connection: sqlite3.Connection, table: str, names: list[str]) -> None:
        """Looking through a large table takes long, and `feast apply` is frequent: only when the names have changed."""
        known, now = connection.execute(f"SELECT names FROM {_FEATURES} WHERE view = ?", [table]).fetchone(), json.dumps(names)
        if known == (now,):
            return
        with connection:
            connection.execute(f"DELETE FROM {table} WHERE feature_name NOT IN (SELECT value FROM json_each(?))", [now])
            connection.execute(f"INSERT OR REPLACE INTO {_FEATURES} VALUES (?, ?)", [table, now])

    def online_write_batch(self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Progress | None) -> None:
        """Write rows, those that are older than what is stored left out; all in one transaction."""
        columns = ("entity_key", "feature_name", "value", "value_text", "event_ts", "created_ts", "event_us", "created_us")
        updates = ", ".join(f"{c} = excluded.{c}" for c in columns[2:])
        connection = self._get_conn(config)
        with connection:
            connection.executemany(
                f"INSERT INTO {_table(config, table)} AS old ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
                f"ON CONFLICT(entity_key, feature_name) DO UPDATE SET {updates} "
                "WHERE (old.event_us, old.created_us) <= (excluded.event_us, excluded.created_us)",
                _cells(config, data),
            )
        if progress:
            progress(len(data))

    def online_read(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], requested_features: list[str] | None = None
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """The values of each entity and their event time; (None, None) for one that is not there.

        Features are those asked for, or all that the view has now: another process may not know yet that one was taken out.
        """
        names = requested_features or [feature.name for feature in table.features]
        keys = [_key(config, key) for key in entity_keys]
        found = self._get_conn(config).execute(
            f"SELECT entity_key, feature_name, value, event_us FROM {_table(config, table)} "
            f"WHERE entity_key IN ({','.join('?' * len(keys))}) AND feature_name IN ({','.join('?' * len(names))}) ORDER BY entity_key",
            [*keys, *names],
        )
        rows = {key: list(group) for key, group in itertools.groupby(found, key=lambda row: row[0])}
        return [_values(rows.get(key, [])) for key in keys]


def _table(config: RepoConfig, view: FeatureView) -> str:
    """The quoted name of a view's table."""
    name: str = compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    return '"' + name.replace('"', '""') + '"'


def _has_times(connection: sqlite3.Connection, table: str) -> bool:
    return any(column[1] == "event_us" for column in connection.execute(f"PRAGMA table_info({table})"))


def _cells(config: RepoConfig, data: list[Row]) -> Iterator[tuple[Any, ...]]:
    for entity_key, values, event, created in data:
        key, event_us, created_us = _key(config, entity_key), _us(event), _us(created)
        known = _known(created)
        event, created = to_naive_utc(event), None if known is None else to_naive_utc(known)  # as Feast's own store keeps them
        for name, value in values.items():
            yield key, name, value.SerializeToString(), extract_text_and_num(value, False)[0], event, created, event_us, created_us


def _values(rows: list[tuple[bytes, str, bytes, int]]) -> tuple[datetime | None, dict[str, Value] | None]:
    if not rows:
        return None, None
    return _EPOCH + timedelta(microseconds=rows[0][3]), {name: Value.FromString(value) for _, name, value, _ in rows}


def _key(config: RepoConfig, entity_key: EntityKey) -> bytes:
    key: bytes = serialize_entity_key(entity_key, entity_key_serialization_version=config.entity_key_serialization_version)
    return key


def _known(time: datetime | None) -> datetime | None:
    """Feast makes a NaT of a missing time, which passes for a datetime."""
    return None if time is pd.NaT else time


def _us(time: datetime | None) -> int:
    """Microseconds since 1970; a time without a zone is UTC."""
    time = _known(time)
    if time is None:
        return 0
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


class NewestRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """`online_store:` in feature_store.yaml."""

    type: Literal["pipelines.online_store.NewestRedisOnlineStore"] = "pipelines.online_store.NewestRedisOnlineStore"  # type: ignore[assignment]


_SET_IF_NEWER = """
local at = redis.call('HGET', KEYS[1], ARGV[1])
if at and redis.call('HEXISTS', KEYS[1], ARGV[2]) == 1 then
  local event, created = string.match(at, '^(%-?%d+) (%-?%d+)$')
  event, created = tonumber(event), tonumber(created)
  local event_new, created_new = tonumber(ARGV[3]), tonumber(ARGV[4])
  if event > event_new or (event == event_new and created > created_new) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3] .. ' ' .. ARGV[4], unpack(ARGV, 6))
if ARGV[5] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[5]) end
return 1
"""
"""ARGV: the fields of our times and of Feast's, event and created µs, seconds to live, then field, value, ... . A hash without Feast's
time was emptied by Feast, and ours is of the past. Lua counts in doubles: exact for microseconds until the year 2255."""


class NewestRedisOnlineStore(RedisOnlineStore):
    """One hash per entity; beside Feast's time of a view lies ours, with the created time."""

    def online_write_batch(self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Progress | None) -> None:
        """Write rows, those that are older than what is stored left out; one round trip."""
        _check_redis(config)
        client = self._get_client(config.online_store)
        script = client.register_script(_SET_IF_NEWER)
        with client.pipeline(transaction=False) as pipe:
            for key, arguments in _commands(config, table, data):
                script(keys=[key], args=arguments, client=pipe)
            pipe.execute()
        if progress:
            progress(len(data))

    async def online_write_batch_async(self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Progress | None) -> None:
        """The same for Feast's feature server."""
        _check_redis(config)
        client = await self._get_client_async(config.online_store)
        script = client.register_script(_SET_IF_NEWER)
        async with client.pipeline(transaction=False) as pipe:
            for key, arguments in _commands(config, table, data):
                await script(keys=[key], args=arguments, client=pipe)
            await pipe.execute()
        if progress:
            progress(len(data))


def _check_redis(config: RepoConfig) -> None:
    if config.online_store.redis_type == RedisType.redis_cluster:
        raise ConfigError("redis_type redis_cluster: this store writes with a script to one server or a sentinel's master; use one of them")


def _commands(config: RepoConfig, view: FeatureView, data: list[Row]) -> Iterator[tuple[bytes, list[Any]]]:
    name = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
    fields = {feature.name: _mmh3(f"{name}:{feature.name}") for feature in view.features}
    for entity_key, values, event, created in data:
        at, time_field = _us(event), f"_ts:{name}"
        time = Timestamp(seconds=at // 1_000_000, nanos=at % 1_000_000 * 1_000)
        stored = [x for feature, value in values.items() for x in (fields[feature], value.SerializeToString())]
        key = _redis_key(config.project, entity_key, entity_key_serialization_version=config.entity_key_serialization_version)
        seconds = config.online_store.key_ttl_seconds or 0
        yield key, [f"_at:{name}", time_field, at, _us(created), seconds, time_field, time.SerializeToString(), *stored]
