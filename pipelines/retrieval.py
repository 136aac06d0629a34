"""A result of the offline store: worked out when it is asked for, as a table or in batches, and written where Feast wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pandas as pd
import pyarrow as pa
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from edge_agent.contract.errors import ConfigError
from pipelines.feature_sources import Source
from pipelines.partitioned import Deadline

REMOTE_FILE_ROWS = 1_000_000


@dataclass(frozen=True)
class Result:
    """What Feast wants to know of a join besides its rows."""

    on_demand: list[OnDemandFeatureView] = field(default_factory=list)
    full_feature_names: bool = False
    metadata: RetrievalMetadata | None = None


class AsOfRetrievalJob(RetrievalJob):
    """`work` yields the tables that make up the result; `timeout` (seconds) is looked at between pieces of work."""

    def __init__(self, work: Callable[[Deadline], Iterator[pa.Table]], config: RepoConfig, result: Result | None = None) -> None:
        self._work = work
        self._config = config
        self._result = result or Result()

    def batches(self, timeout: float | None = None) -> Iterator[pa.Table]:
        """The rows some at a time, so that `pull_all` of a large source never lies in memory; without on-demand features."""
        return self._work(Deadline(timeout))

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return pa.concat_tables(self.batches(timeout))

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    @property
    def full_feature_names(self) -> bool:
        return self._result.full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._result.on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._result.metadata

    def to_sql(self) -> str:
        raise NotImplementedError("this offline store joins without SQL; use to_arrow(), to_df() or persist()")

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result, on-demand features included: to a Parquet file, into an empty directory, or as a Delta table.

        Raises:
            SavedDatasetLocationAlreadyExists: something is there and may not be overwritten.
        """
        if not isinstance(storage, SavedDatasetFileStorage):
            raise ConfigError(
                f"saved dataset storage is {type(storage).__name__}; this offline store writes to SavedDatasetFileStorage only"
            )
        place = Source.of(storage.to_data_source(), self._config)
        if place.exists():
            if not allow_overwrite:
                raise SavedDatasetLocationAlreadyExists(location=place.path)
            if not place.delta and not place.is_file():
                raise ConfigError(
                    f"{place.path} is a directory; a directory is not overwritten: name a .parquet file, Delta, or another path"
                )
        place.write(self.to_arrow(timeout=timeout))

    def supports_remote_storage_export(self) -> bool:
        return self._config.offline_store.staging_location is not None

    def to_remote_storage(self) -> list[str]:
        """Write the result as Parquet files below `staging_location`; their paths.

        Raises:
            ConfigError: `offline_store.staging_location` is not set.
        """
        location = self._config.offline_store.staging_location
        if location is None:
            raise ConfigError("offline_store.staging_location in feature_store.yaml is not set; results are exported below it")
        folder = Source.of(FileSource(path=location, s3_endpoint_override=self._config.offline_store.staging_endpoint), self._config)
        table = self.to_arrow()
        starts = range(0, max(table.num_rows, 1), REMOTE_FILE_ROWS)
        return [folder.write(table.slice(start, REMOTE_FILE_ROWS)) for start in starts]
