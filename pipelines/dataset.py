"""dataset: what the model learns from: each label with the features that were known at its time.

- Features come from Feast's historical features (`pipelines.offline_store`): nothing from after a label can reach it.
- Labels without features are dropped and counted; the target is the label, at most `label_max`.
- The newest features of every entity go to Feast's online store in the same step: importing Feast alone takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from edge_agent.contract.errors import ConfigError
from pipelines import cluster, stage
from pipelines.cli import progress
from pipelines.features import EVENT_TIME
from pipelines.params import Params
from pipelines.stage import Context

FEATURE_REPO = Path("feature_repo")
LABEL, TARGET = "label", "target"


def work(context: Context) -> None:
    """Write the dataset, and bring the online store up to date."""
    progress("joining labels and features (Feast, point in time)")
    out = context.folder("dataset")
    found = cluster.run(build, context.project, context.features, context.labels, context.params, context.contract.entity, out)
    stage.write_json(out / "dataset.json", found)
    progress(f"{found['rows']} rows of {found['entities']} engines; {found['labels_without_features']} labels had no features")


def build(project: Path, features: Path, labels: Path, params: Params, entity: str, out: Path) -> dict[str, Any]:
    """Join, write, materialise; what dataset.json will say.

    Raises:
        ConfigError: no label has features.
    """
    store, view = open_store(project)
    wanted = pq.read_table(labels).rename_columns({"entity": entity, EVENT_TIME: "event_timestamp"})
    refs = [f"{params.view}:{name}" for name in params.spec.names]
    joined = store.get_historical_features(entity_df=wanted.to_pandas(), features=refs).to_arrow()
    dataset, dropped = finish(joined, params, entity)
    if not dataset.num_rows:
        raise ConfigError(
            f"none of the {wanted.num_rows} labels of stream {params.stream!r} has features at most {params.dataset.ttl_s} s old; "
            f"compare the engines and times of `fenceline labels add` with the readings, or raise dataset.ttl_s"
        )
    pq.write_table(dataset, out / "dataset.parquet", compression="zstd")
    online = materialise(store, view, features)
    return {
        "rows": dataset.num_rows,
        "entities": len(pc.unique(dataset[entity])),
        "labels_without_features": dropped,
        "online_until": online,
    }


def open_store(project: Path) -> tuple[Any, Any]:
    """Feast's store of the project with its definitions applied, and the feature view."""
    os.environ.setdefault("FEAST_USAGE", "False")
    from feast import FeatureStore

    repo = project / FEATURE_REPO
    (repo / "data").mkdir(parents=True, exist_ok=True)
    found = importlib.util.spec_from_file_location("feature_definitions", repo / "feature_definitions.py")
    if found is None or found.loader is None or not (repo / "feature_definitions.py").exists():
        raise ConfigError(f"{repo}/feature_definitions.py does not exist; copy feature_repo/ into the project")
    definitions = importlib.util.module_from_spec(found)
    found.loader.exec_module(definitions)
    store = FeatureStore(repo_path=str(repo))
    store.apply([definitions.entity, definitions.view])
    return store, definitions.view


def finish(joined: pa.Table, params: Params, entity: str) -> tuple[pa.Table, int]:
    """Drop labels without features, clip, sort; the dataset and the number of labels dropped."""
    names = params.spec.names
    # A label that met a window has at least one feature; without a match all are null.
    matched = pc.is_valid(joined[names[0]])
    for name in names[1:]:
        matched = pc.or_(matched, pc.is_valid(joined[name]))
    kept = joined.filter(pc.and_(matched, pc.is_valid(joined[LABEL])))
    target = pc.min_element_wise(kept[LABEL].cast(pa.float64()), pa.scalar(params.dataset.label_max))
    columns = {
        entity: kept[entity],
        EVENT_TIME: kept["event_timestamp"].cast(pa.timestamp("us", "UTC")),
        LABEL: kept[LABEL].cast(pa.float64()),
        TARGET: target,
        **{name: kept[name] for name in names},
    }
    table = pa.table(columns).sort_by([(entity, "ascending"), (EVENT_TIME, "ascending")])
    return table, joined.num_rows - kept.num_rows


def materialise(store: Any, view: Any, features: Path) -> str:
    """Write each entity's newest features to the online store; the time of the newest."""
    times = pyarrow.dataset.dataset(features).to_table(columns=[EVENT_TIME])[EVENT_TIME]
    span = pc.min_max(times)
    first, last = span["min"].as_py(), span["max"].as_py()
    store.materialize(start_date=first - timedelta(seconds=1), end_date=last, feature_views=[view.name], disable_event_timestamp=False)
    return str(last.isoformat())


if __name__ == "__main__":
    sys.exit(stage.main("dataset", work))
