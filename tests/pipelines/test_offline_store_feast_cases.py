"""What Feast's own universal tests of offline stores ask for, on our store (their cases, our words).

Orders of customers with drivers, from a place to a place: a view per entity, one place view used twice under other names and keys, a
view without an entity, one with mapped fields, and an on-demand view with request data.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

pytest.importorskip("feast")

from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, SnowflakeSource, ValueType
from feast.errors import (
    EntityTimestampInferenceException,
    FeastEntityDFMissingColumnsError,
    RequestDataNotFoundInEntityDfException,
    SavedDatasetLocationAlreadyExists,
)
from feast.feature_logging import FeatureServiceLoggingSource, LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.transformation.pandas_transformation import PandasTransformation
from feast.types import Float32, Float64, Int32, Int64, String

from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from tests.pipelines.feast_repos import TIME, feature_store, seconds, write

HOUR = 3_600
driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
place = Entity(name="place", join_keys=["location_id"], value_type=ValueType.INT32)


def add(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"plus": inputs["conv_rate"] + inputs["val_to_add"], "unasked": inputs["conv_rate"]})


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("feast")
    store = feature_store(folder)
    write(
        folder / "drivers.parquet",
        {
            "driver_id": pa.array([1, 1, 2, 1], pa.int64()),
            "event_timestamp": seconds([0, 10 * HOUR, 10 * HOUR, 10 * HOUR]),
            "created": seconds([0, 10 * HOUR, 10 * HOUR, 30 * HOUR]),  # driver 1 was corrected 20 hours later
            "conv_rate": pa.array([0.5, 1.5, 2.5, 3.5], pa.float32()),
            "avg_daily_trips": pa.array([5, 15, 25, 35], pa.int32()),
        },
    )
    write(folder / "customers.parquet", {"customer_id": ["a", "b"], "event_timestamp": seconds([0, HOUR]), "balance": [1.0, 2.0]})
    write(
        folder / "places.parquet",
        {"location_id": pa.array([7, 8], pa.int32()), "event_timestamp": seconds([0, 0]), "temperature": pa.array([70, 80], pa.int32())},
    )
    write(folder / "global.parquet", {"event_timestamp": seconds([0, 5 * HOUR]), "num_rides": pa.array([100, 200], pa.int32())})
    write(folder / "mapped.parquet", {"id": pa.array([1, 2]), "at": seconds([0, 0]), "made": seconds([0, 0]), "column_name": ["x", "y"]})

    def source(name: str, **more: Any) -> FileSource:
        return FileSource(name=name, path=f"{name}.parquet", **{"timestamp_field": "event_timestamp", **more})

    day = timedelta(days=1)
    drivers = FeatureView(
        name="driver_stats",
        entities=[driver],
        ttl=day,
        source=source("drivers", created_timestamp_column="created"),
        schema=[Field(name="conv_rate", dtype=Float32), Field(name="avg_daily_trips", dtype=Int32)],
    )
    customers = FeatureView(
        name="customer_profile", entities=[customer], ttl=day, source=source("customers"), schema=[Field(name="balance", dtype=Float64)]
    )
    places = FeatureView(name="location", entities=[place], source=source("places"), schema=[Field(name="temperature", dtype=Int32)])
    everyone = FeatureView(
        name="global_stats", entities=[], ttl=day, source=source("global"), schema=[Field(name="num_rides", dtype=Int32)]
    )
    mapping = {"id": "driver_id", "at": "seen_at", "made": "made_at", "column_name": "feature_name"}
    mapped = FeatureView(
        name="field_mapping",
        entities=[driver],
        source=source("mapped", timestamp_field="seen_at", created_timestamp_column="made_at", field_mapping=mapping),
        schema=[Field(name="feature_name", dtype=String)],
    )
    on_demand = OnDemandFeatureView(
        name="added",
        sources=[drivers[["conv_rate"]], RequestSource(name="request", schema=[Field(name="val_to_add", dtype=Int64)])],
        schema=[Field(name="plus", dtype=Float64), Field(name="unasked", dtype=Float64)],
        feature_transformation=PandasTransformation(udf=add, udf_string="add"),
        mode="pandas",
    )
    service = FeatureService(
        name="trip",
        features=[
            places.with_name("origin").with_join_key_map({"location_id": "origin_id"}),
            places.with_name("destination").with_join_key_map({"location_id": "destination_id"}),
        ],
    )
    store.apply([driver, customer, place, drivers, customers, places, everyone, mapped, on_demand, service])
    return store


def orders(**more: Any) -> pd.DataFrame:
    columns = {
        "order_id": [100, 101, 102, 100],
        "driver_id": [1, 2, 3, 1],
        "customer_id": ["a", "b", None, "a"],
        "origin_id": [7, 8, 9, 7],
        "destination_id": [8, 8, 7, 8],
        "event_timestamp": pd.to_datetime([12 * HOUR, 11 * HOUR, 12 * HOUR, 12 * HOUR], unit="s", utc=True),
    }
    return pd.DataFrame(columns | more)


ALL = [
    "driver_stats:conv_rate",
    "driver_stats:avg_daily_trips",
    "customer_profile:balance",
    "global_stats:num_rides",
    "field_mapping:feature_name",
]


@pytest.mark.parametrize("full", [False, True])
def test_many_views_entities_and_an_on_demand_view(repo: Any, full: bool) -> None:
    labels = orders(val_to_add=[0, 1, 2, 3])
    job = repo.get_historical_features(entity_df=labels, features=[*ALL, "added:plus"], full_feature_names=full)
    found = job.to_arrow().to_pydict()
    names = {ref: ref.replace(":", "__") if full else ref.split(":")[1] for ref in [*ALL, "added:plus"]}
    assert set(found) == set(labels.columns) | set(names.values())
    assert found["order_id"] == [100, 101, 102, 100]
    assert found[names["driver_stats:conv_rate"]] == [3.5, 2.5, None, 3.5]
    assert found[names["driver_stats:avg_daily_trips"]] == [35, 25, None, 35]
    assert found[names["customer_profile:balance"]] == [1.0, 2.0, None, 1.0]
    assert found[names["global_stats:num_rides"]] == [200, 200, 200, 200]
    assert found[names["field_mapping:feature_name"]] == ["x", "y", None, "x"]
    assert found[names["added:plus"]] == [3.5, 3.5, None, 6.5]
    assert job.to_df().equals(job.to_arrow().to_pandas())


def test_one_view_twice_under_other_names_and_keys(repo: Any) -> None:
    found = repo.get_historical_features(orders(), repo.get_feature_service("trip"), full_feature_names=True).to_arrow()
    assert found["origin__temperature"].to_pylist() == [70, 80, None, 70]
    assert found["destination__temperature"].to_pylist() == [80, 80, 70, 80]


def test_only_what_was_known_at_the_label_s_time(repo: Any) -> None:
    """Driver 1's correction was made 30 hours after the start, driver 2's row with its event."""
    refs = ["driver_stats:conv_rate", "customer_profile:balance"]
    found = repo.get_historical_features(orders(), refs, filter_by_created_timestamp=True).to_arrow()
    assert found["conv_rate"].to_pylist() == [1.5, 2.5, None, 1.5]
    assert found["balance"].to_pylist() == [1.0, 2.0, None, 1.0]  # no created time: unaffected


@pytest.mark.parametrize("kind", ["arrow", "sql", "text times", "naive", "new york", "nanoseconds"])
def test_labels_come_in_many_forms(repo: Any, kind: str, tmp_path: Path) -> None:
    labels: Any = orders()[["driver_id", "event_timestamp"]]
    if kind == "arrow":
        labels = pa.Table.from_pandas(labels)
    elif kind == "sql":
        labels.to_parquet(tmp_path / "orders.parquet")
        labels = f"SELECT driver_id, event_timestamp FROM '{tmp_path}/orders.parquet' ORDER BY driver_id = 3, driver_id = 2"
    elif kind == "text times":
        labels = labels.assign(event_timestamp=["1970-01-01T12:00:00Z", "1970-01-01T12:00:00+01:00", "1970-01-01", "1970-01-01T11:00:00"])
    elif kind == "naive":
        labels = labels.assign(event_timestamp=labels["event_timestamp"].dt.tz_localize(None))
    elif kind == "new york":
        labels = labels.assign(event_timestamp=labels["event_timestamp"].dt.tz_convert("America/New_York"))
    else:
        labels = labels.assign(event_timestamp=labels["event_timestamp"].astype("datetime64[ns, UTC]") + pd.Timedelta(1, "ns"))
    found = repo.get_historical_features(labels, ["driver_stats:conv_rate"]).to_arrow().to_pydict()
    assert sorted(found["driver_id"]) == [1, 1, 2, 3]
    by_driver = set(zip(found["driver_id"], found["conv_rate"], strict=True))
    assert by_driver == {(1, 3.5), (2, 2.5), (3, None)}


def test_empty_labels_give_empty_features(repo: Any) -> None:
    found = repo.get_historical_features(orders().head(0), ALL).to_arrow()
    assert found.num_rows == 0 and "conv_rate" in found.column_names


def test_missing_columns_are_named(repo: Any) -> None:
    with pytest.raises(FeastEntityDFMissingColumnsError, match="driver_id"):
        repo.get_historical_features(orders().drop(columns="driver_id"), ALL)
    with pytest.raises(EntityTimestampInferenceException):
        repo.get_historical_features(orders().drop(columns="event_timestamp"), ALL)
    for labels in (orders(), pa.Table.from_pandas(orders())):
        with pytest.raises(RequestDataNotFoundInEntityDfException, match="val_to_add"):
            repo.get_historical_features(labels, ["added:plus"])
    with pytest.raises(ConfigError, match="conv_rate"):
        repo.get_historical_features(orders(conv_rate=0.0), ALL)
    with pytest.raises(KeyError):
        repo.get_historical_features(orders(), ["driver_stats:balance"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("SELECT * FROM nowhere", "SQL that DuckDB cannot run: .*nowhere"),
        ("SELECT 1 AS driver_id, 'yesterday' AS event_timestamp", "no time in ISO 8601: .*yesterday"),
        ("SELECT 1 AS driver_id, 5 AS event_timestamp", "event times of the labels are int32"),
    ],
)
def test_labels_that_have_no_times_say_why(repo: Any, labels: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        repo.get_historical_features(labels, ["driver_stats:conv_rate"])


def test_labels_without_any_time_get_nothing(repo: Any) -> None:
    asked = pa.table({"driver_id": [1], "event_timestamp": pa.nulls(1)})
    assert repo.get_historical_features(asked, ["driver_stats:conv_rate"]).to_arrow()["conv_rate"].to_pylist() == [None]


def test_text_never_matches_a_number(repo: Any) -> None:
    with pytest.raises(ConfigError, match="driver_id"):
        repo.get_historical_features(orders(driver_id=["1", "2", "3", "1"]), ALL).to_arrow()


def test_without_labels_the_views_own_rows_are_the_labels(repo: Any) -> None:
    refs = ["driver_stats:conv_rate", "field_mapping:feature_name", "global_stats:num_rides"]
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, 10, tzinfo=UTC)
    found = repo.get_historical_features(features=refs, start_date=first, end_date=last).to_arrow().to_pydict()
    rows = list(zip(found["driver_id"], found["conv_rate"], found["feature_name"], found["num_rides"], strict=True))
    assert rows == [(1, 0.5, "x", 100), (2, None, "y", 100), (1, 3.5, "x", 200), (2, 2.5, "y", 200)]
    with pytest.raises(ConfigError, match="share their join keys"):
        repo.get_historical_features(features=["driver_stats:conv_rate", "customer_profile:balance"], start_date=first, end_date=last)


def test_saved_dataset_gives_the_join_back_and_is_not_overwritten(repo: Any, tmp_path: Path) -> None:
    job = repo.get_historical_features(orders(), ALL)
    storage = SavedDatasetFileStorage(path=str(tmp_path / "saved.parquet"))
    saved = repo.create_saved_dataset(job, "saved", storage)
    columns = ["driver_id", "customer_id", "event_timestamp", *(ref.split(":")[1] for ref in ALL)]
    order = ["event_timestamp", "driver_id"]
    expected = job.to_df().sort_values(order).reset_index(drop=True)[columns]
    pd.testing.assert_frame_equal(saved.to_df().sort_values(order).reset_index(drop=True)[columns], expected, check_dtype=False)
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        repo.create_saved_dataset(job, "saved", storage)
    repo.create_saved_dataset(job, "saved", storage, allow_overwrite=True)


def test_timeout_is_kept(repo: Any) -> None:
    with pytest.raises(UnavailableError, match="timeout of -1 s"):
        repo.get_historical_features(orders(), ALL).to_arrow(timeout=-1)


def test_export_writes_parquet_below_the_staging_location(repo: Any, tmp_path: Path) -> None:
    job = repo.get_historical_features(orders(), ALL)
    assert not job.supports_remote_storage_export()
    with pytest.raises(ConfigError, match="staging_location"):
        job.to_remote_storage()
    job._config = repo.config.model_copy(deep=True)
    job._config.offline_store.staging_location = str(tmp_path / "out")
    assert job.supports_remote_storage_export()
    assert pads.dataset(job.to_remote_storage()).to_table().equals(job.to_arrow())


@pytest.mark.parametrize("shape", ["file", "folder"])
def test_rows_written_are_found_and_wrong_ones_refused(tmp_path: Path, shape: str) -> None:
    store = feature_store(tmp_path)
    path = tmp_path / ("trips.parquet" if shape == "file" else "trips")
    columns = {
        "driver_id": pa.array([1], pa.int64()),
        "event_timestamp": seconds([0]),
        "created": seconds([0]),
        "trips": pa.array([5], pa.int32()),
    }
    write(path if shape == "file" else path / "first.parquet", columns)
    source = FileSource(name="trips", path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created")
    view = FeatureView(name="stats", entities=[driver], source=source, ttl=timedelta(hours=1), schema=[Field(name="trips", dtype=Int32)])
    store.apply([driver, view])
    at = pd.to_datetime([3 * HOUR, 4 * HOUR], unit="s", utc=True)
    asked = pd.DataFrame({"driver_id": [1, 1], "event_timestamp": at})
    assert store.get_historical_features(asked, ["stats:trips"]).to_arrow()["trips"].to_pylist() == [None, None]
    rows = pd.DataFrame({"trips": [6, 7], "created": at, "event_timestamp": at, "driver_id": [1, 1]})  # in another order
    store.write_to_offline_store("stats", rows)
    assert store.get_historical_features(asked, ["stats:trips"]).to_arrow()["trips"].to_pylist() == [6, 7]
    with pytest.raises(ValueError, match="missing_expected_columns: \\['trips'\\]"):
        store.write_to_offline_store("stats", rows.drop(columns="trips"))
    with pytest.raises(ContractError, match=r"columns missing \['trips'\], unknown \['x'\]"):
        type(store._get_provider().offline_store).offline_write_batch(
            store.config, view, pa.Table.from_pandas(rows.rename(columns={"trips": "x"})), None
        )
    assert not list(tmp_path.rglob(".*.parquet.*"))


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("by", [None, ["__log_date"]])
def test_logged_features_come_back(repo: Any, tmp_path: Path, as_path: bool, by: list[str] | None) -> None:
    service = FeatureService(
        name="logged",
        features=[repo.get_feature_view("driver_stats")[["conv_rate"]]],
        logging_config=LoggingConfig(destination=FileLoggingDestination(path=str(tmp_path / "logs"), partition_by=by)),
    )
    repo.apply([service])
    schema = FeatureServiceLoggingSource(service, repo.project).get_schema(repo.registry)
    values = {"driver_id": [1, 2], "driver_stats__conv_rate": [0.5, None], "__request_id": ["r1", "r2"]}
    values |= {"__log_timestamp": seconds([5, 86_400]), "__log_date": pa.array([0, 1], pa.int32()).cast(pa.date32())}
    logs = pa.table([pa.array(values.get(f.name, [None, None])).cast(f.type) for f in schema], schema=schema)
    for piece in (logs.slice(0, 1), logs.slice(1)):
        if as_path:
            (tmp_path / "chunk").mkdir(exist_ok=True)
            write(tmp_path / "chunk/x.parquet", {name: piece[name] for name in piece.column_names})
        repo.write_logged_features(tmp_path / "chunk" if as_path else piece, service)
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 3, tzinfo=UTC)
    job = repo._get_provider().retrieve_feature_service_logs(service, first, last, repo.config, repo.registry)
    found = job.to_arrow().sort_by("__request_id")
    assert found["__request_id"].to_pylist() == ["r1", "r2"]
    assert found["driver_stats__conv_rate"].to_pylist() == [0.5, None]
    assert found.schema.field("__log_timestamp").type == TIME


def test_pull_latest_of_a_view_without_entities(repo: Any) -> None:
    source = repo.get_feature_view("global_stats").batch_source
    store = repo._get_provider().offline_store
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 2, tzinfo=UTC)
    found = store.pull_latest_from_table_or_query(repo.config, source, [], ["num_rides"], "event_timestamp", None, first, last)
    assert found.to_arrow().to_pydict() | {"event_timestamp": None} == {"num_rides": [200], "event_timestamp": None, "__dummy_id": [""]}
    assert store.get_monitoring_max_timestamp(repo.config, source, "event_timestamp") == datetime(1970, 1, 1, 5, tzinfo=UTC)


def test_other_sources_are_refused_before_anything_is_read(repo: Any) -> None:
    store = repo._get_provider().offline_store
    with pytest.raises(ConfigError, match="SnowflakeSource"):
        store.validate_data_source(repo.config, SnowflakeSource(name="p", query="SELECT 1", timestamp_field="t"))
    with pytest.raises(ConfigError, match="no time column 'nope'"):
        store.validate_data_source(repo.config, FileSource(name="x", path="drivers.parquet", timestamp_field="nope"))
    store.validate_data_source(repo.config, FileSource(name="x", path="not there yet", timestamp_field="t"))
    with pytest.raises(NotImplementedError, match="without SQL"):
        repo.get_historical_features(orders(), ALL).to_sql()
