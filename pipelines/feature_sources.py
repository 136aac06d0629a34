"""Where feature rows lie: Parquet (a file, a directory, hive partitions) or Delta, on a local disk or in S3.

- Reading is lazy (Polars): only the columns that are asked for, and only row groups whose times can matter.
- A directory's rows are those of its files `*.parquet`, at any depth. Names that begin with "." or "_" are not read, as everywhere: half
  written files have them.
- A Delta source is read at its newest version, or at the one that the source's tag `delta_version` names.
- S3: the source's `s3_endpoint_override` or AWS_ENDPOINT_URL, AWS_REGION, and the keys in AWS_ACCESS_KEY_ID and
  AWS_SECRET_ACCESS_KEY, or for a source with the tag `credentials: EU` in EU_AWS_ACCESS_KEY_ID and so on (`cloud.roots`).
- A batch is appended as a new file of a directory or a new Delta commit: readers see all of it or nothing. A source that is one
  Parquet file is written anew, and then put in the old one's place. A pinned Delta version takes no rows: nobody would read them.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError
from feast.data_format import DeltaFormat, ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource
from feast.repo_config import RepoConfig

from cloud.roots import S3, Bucket, Root
from edge_agent.contract.errors import ConfigError, UnavailableError

DELTA_VERSION, CREDENTIALS = "delta_version", "credentials"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Source:
    """`files` are those of a directory when it was looked at; `rows` limits it to (first row, number of rows): the share of one task."""

    name: str
    path: str
    delta: bool = False
    version: int | None = None
    storage: dict[str, str] = field(default_factory=dict, repr=False)
    files: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None

    @classmethod
    def of(cls, source: DataSource | None, config: RepoConfig) -> Source:
        """What Feast calls a file source.

        Raises:
            ConfigError: it is another kind of source, or has another format.
        """
        if not isinstance(source, FileSource):
            what = f"data source {source.name!r} is a {type(source).__name__}" if source else "the feature view has no batch source"
            raise ConfigError(f"{what}; this offline store reads FileSource (Parquet or Delta): give the view a FileSource as batch source")
        if not isinstance(source.file_format, ParquetFormat | DeltaFormat | None):
            raise ConfigError(
                f"data source {source.name!r} is in {type(source.file_format).__name__}; this offline store reads Parquet and Delta"
            )
        version = source.tags.get(DELTA_VERSION)
        if version is not None and not version.isdecimal():
            raise ConfigError(f"tag {DELTA_VERSION} of data source {source.name!r} is {version!r}; it must be a version number such as 12")
        path = FileSource.get_uri_for_file_path(config.repo_path, source.path)
        delta = isinstance(source.file_format, DeltaFormat)
        storage = storage_of(path, source.s3_endpoint_override, source.tags.get(CREDENTIALS, ""))
        return cls(source.name, path, delta, int(version) if version else None, storage)

    def scan(self) -> pl.LazyFrame:
        """All rows, to be read later.

        Raises:
            ConfigError: nothing is there.
        """
        with self._explained():
            if self.delta:
                table = DeltaTable(self.path, version=self.version, storage_options=self.storage or None)
                frame = pl.scan_delta(table, storage_options=self._polars_storage())
            elif self.is_file():
                frame = self._scan_parquet(self.path, glob=False, hive_partitioning=False)
            else:
                frame = self._scan_directory()
            frame.collect_schema()
        return frame.slice(*self.rows) if self.rows else frame

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All rows, for other engines to read piece by piece. Errors are those of the libraries."""
        if self.delta:
            return DeltaTable(self.path, version=self.version, storage_options=self.storage or None).to_pyarrow_dataset()
        return pyarrow.dataset.dataset(self._place(), format="parquet", partitioning="hive", filesystem=self._filesystem())

    def batches(self, frame: pl.LazyFrame, rows: int) -> Iterator[pl.DataFrame]:
        """The rows of a frame over `scan`, some `rows` at a time."""
        with self._explained():
            yield from frame.collect_batches(chunk_size=rows, maintain_order=False)

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """The rows of a frame over `scan`, all at once."""
        with self._explained():
            return frame.collect()

    def pinned(self) -> Source:
        """What is there now: the same rows in the same order however often it is read, whoever adds some meanwhile."""
        with self._explained():
            if self.delta:
                return replace(self, version=DeltaTable(self.path, version=self.version, storage_options=self.storage or None).version())
            return self if self.is_file() else replace(self, files=self._files())

    def parts(self, number: int) -> list[Source]:
        """At most `number` sources that hold all rows between them."""
        pinned = self.pinned()
        total = int(self.collect(pinned.scan().select(pl.len())).item())
        each = max(-(-total // number), 1)
        return [replace(pinned, rows=(first, each)) for first in range(0, total, each)] or [pinned]

    def schema(self) -> pa.Schema:
        """Names and Arrow types of the columns."""
        return arrow(self.collect(self.scan().head(0))).schema

    def exists(self) -> bool:
        if self.delta:
            return DeltaTable.is_deltatable(self.path, storage_options=self.storage or None)
        found = self._filesystem().get_file_info(self._place())
        return bool(found.type != pyarrow.fs.FileType.NotFound)

    def is_file(self) -> bool:
        """One Parquet file, rather than a directory of them."""
        if self.delta:
            return False
        found = self._filesystem().get_file_info(self._place()).type
        return found == pyarrow.fs.FileType.File or (found != pyarrow.fs.FileType.Directory and self.path.endswith(".parquet"))

    def append(self, table: pa.Table) -> None:
        """Add rows; the columns must be those of the source.

        Raises:
            ConfigError: the source is pinned to a version.
        """
        if self.version is not None:
            raise ConfigError(
                f"data source {self.name!r} is pinned to version {self.version} of {self.path} (tag {DELTA_VERSION}): rows added there "
                f"would never be read; take the tag away first"
            )
        with self._explained():
            if self.delta:
                write_deltalake(self.path, table, mode="append", storage_options=self.storage or None)
            elif self.is_file() and self.exists():
                self._rewrite(table)
            elif self.exists() and (by := self._partitions(self._files()[0])):
                self.add_partitioned(table, list(by))
            else:
                self.write(table)

    def write(self, table: pa.Table) -> str:
        """Write rows to this file, to a new file of this directory, or as a new version of this Delta table; the path written."""
        with self._explained():
            if self.delta:
                write_deltalake(self.path, table, mode="overwrite", schema_mode="overwrite", storage_options=self.storage or None)
                return self.path
            place = self._place() if self.is_file() else f"{self._place().rstrip('/')}/{uuid.uuid4().hex}.parquet"
            with self._writer(place, table.schema) as writer:
                writer.write_table(table)
        return S3 * self._s3 + place

    def add_partitioned(self, rows: Any, by: list[str]) -> None:
        """Add a table or a dataset to this directory, in hive partitions by some columns."""
        name = f"{'' if self._s3 else '.'}{uuid.uuid4().hex}-"  # an object in S3 appears when it is complete
        with self._explained():
            try:
                pyarrow.dataset.write_dataset(
                    rows,
                    self._place(),
                    format="parquet",
                    partitioning=by or None,
                    partitioning_flavor="hive" if by else None,
                    basename_template=name + "{i}.parquet",
                    existing_data_behavior="overwrite_or_ignore",
                    filesystem=self._filesystem(),
                )
            except BaseException:
                for half in self._hidden(name):
                    half.unlink()
                raise
            for complete in self._hidden(name):
                complete.rename(complete.with_name(complete.name[1:]))

    def _hidden(self, name: str) -> list[Path]:
        """The files of a local directory that begin so."""
        return [] if self._s3 else list(Path(self._place()).rglob(f"{name}*.parquet"))

    def _scan_parquet(self, place: str | list[str], **more: Any) -> pl.LazyFrame:
        return pl.scan_parquet(
            place,
            missing_columns="insert",
            extra_columns="ignore",
            storage_options=self._polars_storage(),
            credential_provider=None,
            **more,
        )

    def _scan_directory(self) -> pl.LazyFrame:
        """The files by name; hive partitions are the folders below this directory, not those above it."""
        files = list(self.files or self._files())
        by = self._partitions(files[0])
        scan = self._scan_parquet(files, glob=False, hive_partitioning=bool(by))
        if not by or "=" not in self.path:
            return scan
        types, folders = scan.collect_schema(), itertools.groupby(files, key=lambda file: file.rpartition("/")[0])
        frames = []  # Polars would take the folders above for partitions too
        for _, inside in folders:
            names = list(inside)
            values = {name: pl.lit(value).cast(types[name]) for name, value in self._partitions(names[0]).items()}
            frames.append(self._scan_parquet(names, glob=False, hive_partitioning=False).with_columns(**values))
        return pl.concat(frames, how="diagonal")

    def _files(self) -> tuple[str, ...]:
        """Paths of the directory's Parquet files, sorted."""
        place = self._place().rstrip("/") + "/"
        inside = self._filesystem().get_file_info(pyarrow.fs.FileSelector(place, recursive=True))
        paths = [i.path for i in inside if i.type == pyarrow.fs.FileType.File and i.path.endswith(".parquet")]
        found = sorted(path for path in paths if not any(map(_is_hidden, path.removeprefix(place).split("/"))))
        if not found:
            raise ConfigError(f"data source {self.name!r} at {self.path} holds no Parquet file; run the step that writes it")
        return tuple(S3 * self._s3 + path for path in found)

    def _polars_storage(self) -> dict[str, Any] | None:
        """Polars wants the same with whole numbers as such."""
        return {name: int(value) if value.isdecimal() else value for name, value in self.storage.items()} or None

    def _partitions(self, file: str) -> dict[str, str | None]:
        """The columns by which this directory is partitioned and their values in a file, from the names of its folders."""
        folders = file.removeprefix(self.path.rstrip("/") + "/").split("/")[:-1]
        found = {name: unquote(value) for name, equals, value in (folder.partition("=") for folder in folders) if equals}
        return {name: None if value == HIVE_NULL else value for name, value in found.items()}

    def _rewrite(self, table: pa.Table) -> None:
        old = pq.ParquetFile(self._place(), filesystem=self._filesystem())
        added = table.cast(old.schema_arrow)
        with self._writer(self._place(), old.schema_arrow) as writer:
            for group in range(old.num_row_groups):
                writer.write_table(old.read_row_group(group))
            writer.write_table(added)

    @contextmanager
    def _writer(self, place: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """A writer whose file appears when it is complete; an object in S3 does so by itself."""
        files = self._filesystem()
        hidden = place
        if not self._s3:
            target = Path(place)
            files.create_dir(str(target.parent), recursive=True)
            hidden = str(target.with_name(f".{target.name}.{uuid.uuid4().hex}"))
        try:
            with pq.ParquetWriter(hidden, schema, filesystem=files, compression="zstd") as writer:
                yield writer
            if hidden != place:
                files.move(hidden, place)
        except BaseException:
            if hidden != place:
                Path(hidden).unlink(missing_ok=True)
            raise

    @property
    def _s3(self) -> bool:
        return self.path.startswith(S3)

    def _place(self) -> str:
        return self.path.removeprefix(S3)

    def _filesystem(self) -> Any:
        if not self._s3:
            return pyarrow.fs.LocalFileSystem()
        names = {
            "access_key": "AWS_ACCESS_KEY_ID",
            "secret_key": "AWS_SECRET_ACCESS_KEY",
            "session_token": "AWS_SESSION_TOKEN",
            "region": "AWS_REGION",
            "endpoint_override": "AWS_ENDPOINT_URL",
        }
        return pyarrow.fs.S3FileSystem(**{ours: self.storage[theirs] for ours, theirs in names.items() if theirs in self.storage})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the libraries as ours, with the name and the path of the source."""
        try:
            yield
        except (FileNotFoundError, TableNotFoundError) as e:
            raise ConfigError(
                f"data source {self.name!r} at {self.path} does not exist; run the step that writes it, or correct its path"
            ) from e
        except (pl.exceptions.PolarsError, pa.ArrowInvalid) as e:
            kind = UnavailableError if self._s3 else ConfigError  # an object store that fails, or a file that is not what it should be
            raise kind(f"data source {self.name!r} at {self.path} cannot be read or written: {e}") from e
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"data source {self.name!r} at {self.path} could not be read or written: {e}") from e


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_")) and "=" not in name


def storage_of(path: str, endpoint: str | None, credentials: str) -> dict[str, str]:
    """How an S3 path is reached, as the lake's own roots are: `credentials` is the prefix of the variables with the keys."""
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL", "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return Root(path, Bucket(endpoint, region, credentials, allow_http=endpoint.startswith("http://"))).storage_options() or {}


def arrow(frame: pl.DataFrame) -> pa.Table:
    """The frame in the types that Feast knows: string rather than large_string, list rather than large_list."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(pa.schema([f.with_type(_plain(f.type)) for f in table.schema]))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    return pa.list_(_plain(kind.value_type)) if pa.types.is_large_list(kind) else kind
