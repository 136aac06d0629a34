"""A Feast offline store for Parquet and Delta: point-in-time joins that are exact, fast and bounded in memory.

Named in feature_store.yaml by its class path. Why our own: see DESIGN, section 6, and decision 26. The rules of a join:

- Each label gets, from each feature view, the feature row with the same join keys and the latest event time that is not after
  the label's; none if that is older than the view's `ttl` (a feature exactly `ttl` old still counts; no ttl: any age).
- Of feature rows with the same keys and event time, the one with the latest created time counts: a late correction wins.
  With `filter_by_created_timestamp` only rows that had been created by the label's time are looked at: what came late leaks nothing.
- Every label comes back exactly once, in the order given, with NULL where there is nothing to join. Null keys match nothing.
- Times without a zone are UTC. Nanoseconds count where the labels or the rows have them.

How it works: `asof` joins, `feature_sources` reads and writes, `feature_query` brings labels and rows into one form,
`partitioned` bounds memory and uses a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from feast.data_source import DataSource
from feast.errors import EntityTimestampInferenceException, FeastEntityDFMissingColumnsError, RequestDataNotFoundInEntityDfException
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_NAME, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.file_source import FileLoggingDestination
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import compute_non_entity_date_range

from edge_agent.contract.errors import ConfigError, ContractError
from pipelines import partitioned
from pipelines.feature_query import Asked, Query, View
from pipelines.feature_sources import Source, arrow
from pipelines.partitioned import Deadline
from pipelines.pulls import Pull, seen
from pipelines.retrieval import AsOfRetrievalJob, Result

EVENT_TIMESTAMP = "event_timestamp"
_MB = 1_000_000


class AsOfOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store:` in feature_store.yaml.

    `batch_mb`: how much of the features is held at a time (the whole takes two to three times that, and the labels).
    `partitions`: 0 works in this process, more deals a join out over that many Ray tasks (RAY_ADDRESS, or a local Ray).
    `filter_by_created_timestamp`: for every join, also those that do not ask for it.
    `staging_location`: where `to_remote_storage` writes; `staging_endpoint`: its S3 endpoint.
    """

    type: Literal["pipelines.offline_store.AsOfOfflineStore"] = "pipelines.offline_store.AsOfOfflineStore"
    batch_mb: int = 768
    partitions: int = 0
    filter_by_created_timestamp: bool = False
    staging_location: str | None = None
    staging_endpoint: str | None = None


class AsOfOfflineStore(OfflineStore):
    """The store; Feast calls most of it as static methods."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """The point-in-time join of `entity_df` (a frame, an Arrow table, or SQL that DuckDB understands) with the views.

        Without `entity_df` the labels are the keys and event times of the views' own rows from `start_date` to `end_date`.

        Raises:
            ConfigError: a source, a column or a type does not fit; the message says which.
        """
        known_by = filter_by_created_timestamp or config.offline_store.filter_by_created_timestamp
        views = [view_of(view, feature_refs, full_feature_names, known_by, config) for view in feature_views]
        if entity_df is None:
            table = seen(views, *compute_non_entity_date_range(feature_views, start_date, end_date), time=EVENT_TIMESTAMP)
        else:
            table = _labels(entity_df)
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        time = _check_columns(table, views, on_demand)
        times = _timestamps(table[time])
        asked = Asked.of(table.select(sorted({key for view in views for key in view.keys})), times)

        def work(deadline: Deadline) -> Iterator[pa.Table]:
            result = table
            for view in views:
                values = _joined(Query.of(view, asked), config, deadline)
                for name in view.values:
                    result = result.append_column(name, values[name])
            yield result

        span = pc.min_max(times)
        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in table.column_names if name != time],
            min_event_timestamp=span["min"].as_py(),
            max_event_timestamp=span["max"].as_py(),
        )
        return AsOfRetrievalJob(work, config, Result(on_demand, full_feature_names, metadata))

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
        source = Source.of(data_source, config)
        pull = Pull(source, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column, start_date, end_date)

        def work(deadline: Deadline) -> Iterator[pa.Table]:
            for table in pull.newest_rows(_bytes_max(config), deadline):
                dummy = pa.array([DUMMY_ENTITY_VAL] * table.num_rows, pa.string())
                yield table if join_key_columns else table.append_column(DUMMY_ENTITY_ID, dummy)

        return AsOfRetrievalJob(work, config)

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
        source = Source.of(data_source, config)
        pull = Pull(source, join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column, start_date, end_date)
        return AsOfRetrievalJob(lambda deadline: pull.all_rows(_bytes_max(config), deadline), config)

    @staticmethod
    def offline_write_batch(config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None) -> None:
        """Append rows to the view's source, or begin it with them.

        Raises:
            ContractError: the columns are not those of the source.
        """
        source = Source.of(feature_view.batch_source, config)
        source.append(_as_stored(table, source, feature_view.name) if source.exists() else table)
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig, data: pa.Table | Path, source: LoggingSource, logging_config: LoggingConfig, registry: BaseRegistry
    ) -> None:
        """Add logged features (a table, or a directory of Parquet files) to the destination's directory, in its partitions."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise ConfigError(
                f"logged features go to a {type(destination).__name__}; this offline store writes to FileLoggingDestination only"
            )
        rows = pyarrow.dataset.dataset(data) if isinstance(data, Path) else data
        Source.of(destination.to_data_source(), config).add_partitioned(rows, destination.partition_by or [])

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """`feast apply` refuses what this store cannot read. A source that is not there yet is fine.

        Raises:
            ConfigError: another kind of source, or one without its time column.
        """
        source = Source.of(data_source, config)
        stored = {new: old for old, new in data_source.field_mapping.items()}
        time = stored.get(data_source.timestamp_field, data_source.timestamp_field)
        if time and source.exists() and time not in (names := source.schema().names):
            raise ConfigError(f"data source {data_source.name!r}: {source.path} has no time column {time!r}; it has {', '.join(names)}")

    def get_table_column_names_and_types_from_data_source(self, config: RepoConfig, data_source: DataSource) -> Iterable[tuple[str, str]]:
        """Names and Arrow types of the columns, those of hive partitions included."""
        return [(column.name, str(column.type)) for column in Source.of(data_source, config).schema()]

    @staticmethod
    def get_monitoring_max_timestamp(config: RepoConfig, data_source: DataSource, timestamp_field: str) -> datetime | None:
        """The latest event time; None without rows."""
        source = Source.of(data_source, config)
        latest = source.collect(source.scan().select(pl.col(timestamp_field).max())).item()
        return latest.replace(tzinfo=UTC) if latest is not None and latest.tzinfo is None else latest


def view_of(view: FeatureView, refs: list[str], full_feature_names: bool, known_by: bool, config: RepoConfig) -> View:
    """Where a view's columns lie; Feast's names are those after the source's field mapping."""
    projection, source = view.projection, view.batch_source
    place = Source.of(source, config)
    assert source is not None
    stored = {new: old for old, new in source.field_mapping.items()}
    wanted = [name for prefix, _, name in (ref.partition(":") for ref in refs) if prefix == projection.name_to_use()]
    shown = f"{projection.name_alias or projection.name}__" if full_feature_names else ""
    keys = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
    if not keys and view.entities not in ([], [DUMMY_ENTITY_NAME]):  # a join without keys would give everybody's newest row
        raise ConfigError(f"feature view {view.name!r} has entities {view.entities} but no join keys yet; apply it first")
    return View(
        name=projection.name_to_use(),
        source=place,
        keys={projection.join_key_map.get(key, key): stored.get(key, key) for key in keys},
        values={shown + name: stored.get(name, name) for name in wanted},
        time=stored.get(source.timestamp_field, source.timestamp_field),
        created=stored.get(source.created_timestamp_column, source.created_timestamp_column) or None,
        ttl_us=view.ttl // timedelta(microseconds=1) if view.ttl else 0,
        known_by=known_by,
    )


def _labels(entity_df: pd.DataFrame | pa.Table | str) -> pa.Table:
    if isinstance(entity_df, str):
        with duckdb.connect() as connection:
            try:
                return connection.sql(entity_df).to_arrow_table()
            except duckdb.Error as e:
                raise ConfigError(f"entity_df is SQL that DuckDB cannot run: {e}") from e
    if isinstance(entity_df, pa.Table):
        return entity_df
    if isinstance(entity_df, pd.DataFrame):
        return pa.Table.from_pandas(entity_df, preserve_index=False)
    raise ConfigError(f"entity_df is a {type(entity_df).__name__}; give a pandas DataFrame, an Arrow table or SQL")


def _check_columns(labels: pa.Table, views: list[View], on_demand: list[OnDemandFeatureView]) -> str:
    """The labels' time column; raises when a column is missing or there twice."""
    names = labels.column_names
    times = [field.name for field in labels.schema if pa.types.is_timestamp(field.type)]
    if EVENT_TIMESTAMP not in names and len(times) != 1:
        raise EntityTimestampInferenceException(EVENT_TIMESTAMP)
    keys = {key for view in views for key in view.keys}
    if missing := keys - set(names):
        raise FeastEntityDFMissingColumnsError(keys, missing)
    for view in on_demand:
        for name in view.get_request_data_schema():
            if name not in names:
                raise RequestDataNotFoundInEntityDfException(feature_name=name, feature_view_name=view.name)
    if twice := [name for view in views for name in view.values if name in names]:
        raise ConfigError(
            f"the labels have columns with the names of features: {', '.join(twice)}; rename them, or ask for full_feature_names"
        )
    return EVENT_TIMESTAMP if EVENT_TIMESTAMP in names else times[0]


def _timestamps(times: pa.ChunkedArray) -> pa.ChunkedArray:
    """Timestamps as they are; dates and text in ISO 8601 become some."""
    kind = times.type.value_type if pa.types.is_dictionary(times.type) else times.type
    if pa.types.is_timestamp(kind):
        return times
    if pa.types.is_date(kind) or pa.types.is_null(kind):
        return times.cast(pa.timestamp("us"))
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(f"event times of the labels are {kind}; give timestamps, dates, or text in ISO 8601")
    try:
        return pa.chunked_array([pa.array(pd.to_datetime(times.to_pandas(), utc=True, format="ISO8601"))])
    except ValueError as e:
        raise ConfigError(f"event times of the labels are text that is no time in ISO 8601: {str(e).splitlines()[0]}") from e


def _joined(query: Query, config: RepoConfig, deadline: Deadline) -> pa.Table:
    settings = config.offline_store
    if settings.partitions:
        return arrow(partitioned.on_ray(query, settings.partitions, _bytes_max(config), deadline))
    return arrow(partitioned.here(query, _bytes_max(config), deadline))


def _as_stored(table: pa.Table, source: Source, view: str) -> pa.Table:
    """The rows with the columns of the source, in its order and types. Nanoseconds are cut off where it has none."""
    schema = source.schema()
    missing, extra = sorted(set(schema.names) - set(table.column_names)), sorted(set(table.column_names) - set(schema.names))
    if missing or extra:
        raise ContractError(f"rows for feature view {view!r} do not fit {source.path}: columns missing {missing}, unknown {extra}")
    columns = [table[field.name].cast(options=pc.CastOptions(field.type, allow_time_truncate=True)) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _bytes_max(config: RepoConfig) -> int:
    return int(config.offline_store.batch_mb) * _MB
