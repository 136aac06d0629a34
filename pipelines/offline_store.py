"""A Feast offline store for Parquet and Delta: point-in-time joins with DuckDB's ASOF JOIN.

Named in feature_store.yaml by its class path. Why our own: see DESIGN, section 6 (the stock stores lose rows, run out of memory, or
take minutes for what this does in a second). The rules of a historical join:

- Each entity row gets, from each feature view, the feature row with the same join keys and the latest event time that is not after
  the entity row's; none if that is older than the view's `ttl` (a feature exactly `ttl` old still counts; no ttl: any age).
- Of feature rows with the same keys and event time, the one with the latest created time counts: a late correction wins.
- Every entity row comes back exactly once, in the order given, with NULL where there is nothing to join.
- Times are compared as microseconds UTC; times without a zone are UTC. Nanoseconds of an entity row are cut off, so
  that nothing from its future can match.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from feast.data_format import DeltaFormat
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.file_source import FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage

TIME = pa.timestamp("us", "UTC")
_ROW, _AT, _CREATED = "__row", "__at", "__created"


class AsOfOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store:` in feature_store.yaml. Without limits DuckDB takes all cores and 80 % of the memory."""

    type: Literal["pipelines.offline_store.AsOfOfflineStore"] = "pipelines.offline_store.AsOfOfflineStore"
    threads: int | None = None
    memory_limit: str | None = None


class AsOfRetrievalJob(RetrievalJob):
    """A query that runs when its result is asked for."""

    def __init__(
        self,
        query: Callable[[], pa.Table],
        on_demand: list[OnDemandFeatureView] | None = None,
        full_feature_names: bool = False,
        metadata: RetrievalMetadata | None = None,
        repo_path: Path | None = None,
    ) -> None:
        self._query = query
        self._on_demand = on_demand or []
        self._full_feature_names = full_feature_names
        self._metadata = metadata
        self._repo_path = repo_path

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._query()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._query().to_pandas()

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result to one Parquet file."""
        if not isinstance(storage, SavedDatasetFileStorage):
            raise TypeError(f"saved dataset storage is {type(storage).__name__}; this store writes to SavedDatasetFileStorage only")
        path = Path(FileSource.get_uri_for_file_path(self._repo_path, storage.file_options.uri))
        if path.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.to_arrow(), path)


class AsOfOfflineStore(OfflineStore):
    """The store; Feast calls it with static methods only."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """The point-in-time join of `entity_df` (a frame, or SQL that DuckDB understands) with the views."""
        if entity_df is None:
            raise NotImplementedError("this offline store joins features to entity rows; pass entity_df instead of a range of time")
        frame = _connect(config).sql(entity_df).df() if isinstance(entity_df, str) else entity_df
        time_column = infer_event_timestamp_from_entity_df(dict(frame.dtypes.items()))
        times = pd.to_datetime(frame[time_column], utc=True).dt.floor("us")
        joins = [_Join.of(view, feature_refs, full_feature_names, config) for view in feature_views]

        def query() -> pa.Table:
            return _as_of(_connect(config), pa.Table.from_pandas(frame, preserve_index=False), times, joins)

        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[c for c in frame.columns if c != time_column],
            min_event_timestamp=times.min().to_pydatetime(),
            max_event_timestamp=times.max().to_pydatetime(),
        )
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return AsOfRetrievalJob(query, on_demand, full_feature_names, metadata, config.repo_path)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of each entity with start_date <= event time <= end_date."""
        columns = [*join_key_columns, *feature_name_columns]
        times = [c for c in (timestamp_field, created_timestamp_column) if c]
        partition = f"PARTITION BY {_names(join_key_columns)}" if join_key_columns else ""

        def query() -> pa.Table:
            connection = _connect(config)
            source = _source(connection, data_source, config, "source")
            picked = connection.sql(
                f"SELECT {_names(columns)}, {_times(times)} FROM {source} WHERE {_between(timestamp_field, start_date, end_date)} "
                f"QUALIFY row_number() OVER ({partition} ORDER BY {_newest(times, feature_name_columns)}) = 1"
            )
            return _finish(picked, times, dummy=not join_key_columns)

        return AsOfRetrievalJob(query, repo_path=config.repo_path)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """All rows with start_date <= event time <= end_date; None leaves that side open."""
        columns = [*join_key_columns, *feature_name_columns]
        times = [c for c in (timestamp_field, created_timestamp_column) if c]

        def query() -> pa.Table:
            connection = _connect(config)
            source = _source(connection, data_source, config, "source")
            picked = connection.sql(
                f"SELECT {_names(columns)}, {_times(times)} FROM {source} WHERE {_between(timestamp_field, start_date, end_date)}"
            )
            return _finish(picked, times)

        return AsOfRetrievalJob(query, repo_path=config.repo_path)


class _Join:
    """How one feature view is joined: where it lies, and which columns are keys and features."""

    def __init__(self, view: FeatureView, features: dict[str, str], keys: dict[str, str], config: RepoConfig) -> None:
        self.view, self.features, self.keys, self.config = view, features, keys, config
        self.source: Any = view.batch_source
        self.ttl_us = round(view.ttl.total_seconds() * 1e6) if view.ttl else 0

    @classmethod
    def of(cls, view: FeatureView, refs: list[str], full_feature_names: bool, config: RepoConfig) -> _Join:
        if view.batch_source is None:
            raise ValueError(f"feature view {view.name!r} has no batch source")
        prefix = view.projection.name_to_use()
        stored = {new: old for old, new in view.batch_source.field_mapping.items()}
        wanted = [ref.split(":", 1)[1] for ref in refs if ref.split(":", 1)[0] == prefix]
        features = {(f"{prefix}__{f}" if full_feature_names else f): stored.get(f, f) for f in wanted}
        names = [e.name for e in view.entity_columns if e.name != DUMMY_ENTITY_ID]
        keys = {view.projection.join_key_map.get(n, n): stored.get(n, n) for n in names}
        return cls(view, features, keys, config)

    def candidates(self, connection: duckdb.DuckDBPyConnection, name: str) -> str:
        """SQL for the feature rows, one for each combination of keys and event time."""
        source = _source(connection, self.source, self.config, name)
        time = self.source.timestamp_field
        times = [c for c in (time, self.source.created_timestamp_column) if c]
        keys = list(self.keys.values())
        features = list(dict.fromkeys(self.features.values()))
        return (
            f"SELECT {_names([*keys, *features])}{', ' if keys or features else ''}epoch_us({_name(time)}) AS {_AT} FROM {source} "
            f"WHERE {_name(time)} IS NOT NULL "
            f"QUALIFY row_number() OVER (PARTITION BY {_names([*keys, time])} ORDER BY {_newest(times[1:], features)}) = 1"
        )


def _as_of(connection: duckdb.DuckDBPyConnection, entities: pa.Table, times: pd.Series, joins: list[_Join]) -> pa.Table:
    at = pa.array(times.astype("datetime64[us, UTC]")).cast(pa.int64())
    numbered = entities.append_column(_ROW, pa.array(range(entities.num_rows), pa.int64())).append_column(_AT, at)
    connection.register("entities", numbered)
    result = entities
    for i, join in enumerate(joins):
        on = [f"e.{_name(theirs)} = f.{_name(ours)}" for theirs, ours in join.keys.items()] + [f"e.{_AT} >= f.{_AT}"]
        fresh = f"e.{_AT} - f.{_AT} <= {join.ttl_us}" if join.ttl_us else "TRUE"
        picked = [f"CASE WHEN {fresh} THEN f.{_name(stored)} END AS {_name(shown)}" for shown, stored in join.features.items()]
        found = connection.sql(
            f"SELECT {', '.join([f'e.{_ROW}', *picked])} FROM entities e "
            f"ASOF LEFT JOIN ({join.candidates(connection, f'features_{i}')}) f ON {' AND '.join(on)} ORDER BY e.{_ROW}"
        ).to_arrow_table()
        for name in join.features:
            result = result.append_column(name, found[name])
    return result


def _connect(config: RepoConfig) -> duckdb.DuckDBPyConnection:
    limits = config.offline_store
    connection = duckdb.connect()
    if limits.threads:
        connection.execute(f"SET threads = {int(limits.threads)}")
    if limits.memory_limit:
        connection.execute("SET memory_limit = ?", [limits.memory_limit])
    return connection


def _source(connection: duckdb.DuckDBPyConnection, source: DataSource, config: RepoConfig, name: str) -> str:
    """Make the source readable; what to write behind FROM."""
    if not isinstance(source, FileSource):
        raise TypeError(f"data source {source.name!r} is {type(source).__name__}; this store reads FileSource (Parquet or Delta)")
    path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    if isinstance(source.file_format, DeltaFormat):
        connection.register(name, DeltaTable(path).to_pyarrow_dataset())
        return name
    connection.from_parquet(str(Path(path) / "**/*.parquet") if Path(path).is_dir() else path).create_view(name)
    return name


def _finish(picked: duckdb.DuckDBPyRelation, times: list[str], dummy: bool = False) -> pa.Table:
    """The result, with its times as timestamps again."""
    table = picked.to_arrow_table()
    for name in times:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(TIME))
    return table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * table.num_rows, pa.string())) if dummy else table


def _times(columns: list[str]) -> str:
    return ", ".join(f"epoch_us({_name(c)}) AS {_name(c)}" for c in columns)


def _newest(times: list[str], features: list[str]) -> str:
    """The order in which the first row wins; equal times are settled by content, so that the answer is always the same."""
    order = [f"epoch_us({_name(c)}) DESC NULLS LAST" for c in times]
    return ", ".join([*order, f"hash({_names(features)}) DESC" if features else "1"])


def _between(column: str, start: datetime | None, end: datetime | None) -> str:
    bounds = [f"epoch_us({_name(column)}) {sign} {_us(t)}" for sign, t in ((">=", start), ("<=", end)) if t is not None]
    return " AND ".join(bounds) or "TRUE"


def _us(time: datetime) -> int:
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    delta = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _names(columns: list[str]) -> str:
    return ", ".join(_name(c) for c in columns)


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
