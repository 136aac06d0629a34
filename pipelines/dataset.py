"""dataset: what the model learns from: each label with the features that were known at its time.

- Features are those of the model's feature service, as of each label's time (`pipelines.offline_store`): nothing from after a label can
  reach it. With `known_by_then` also nothing that arrived after it, however early it was measured.
- Labels without features are dropped and counted; the target is the label, at most `label_max`.
- The newest features of every entity go to Feast's online store in the same step: importing Feast alone takes seconds.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.errors import ConfigError
from pipelines import cluster, stage
from pipelines.cli import progress
from pipelines.feature_store import open_repo
from pipelines.features import EVENT_TIME
from pipelines.materialise import materialise
from pipelines.params import Params
from pipelines.stage import Context

LABEL, TARGET = "label", "target"


def work(context: Context) -> None:
    """Write the dataset, and bring the online store up to date."""
    progress("joining labels and features (Feast, point in time)")
    out = context.folder("dataset")
    found = cluster.run(build, context.project, context.labels, context.params, context.contract.entity, out)
    stage.write_json(out / "dataset.json", found)
    progress(f"{found['rows']} rows of {found['entities']} engines; {found['labels_without_features']} labels had no features")


def build(project: Path, labels: Path, params: Params, entity: str, out: Path) -> dict[str, Any]:
    """Join, write, materialise; what dataset.json will say.

    Raises:
        ConfigError: no label has features, or there is no feature repository.
        UnavailableError: the online store fails.
    """
    repo = open_repo(project)
    wanted = pq.read_table(labels).rename_columns({"entity": entity, EVENT_TIME: "event_timestamp"})
    joined = repo.store.get_historical_features(
        entity_df=wanted.to_pandas(), features=repo.service, filter_by_created_timestamp=params.dataset.known_by_then
    ).to_arrow()
    dataset, dropped = finish(joined, params, entity)
    if not dataset.num_rows:
        raise ConfigError(
            f"none of the {wanted.num_rows} labels of stream {params.stream!r} has features at most {params.dataset.ttl_s} s old; "
            f"compare the engines and times of `fenceline labels add` with the readings, or raise dataset.ttl_s"
        )
    pq.write_table(dataset, out / "dataset.parquet", compression="zstd")
    online = materialise(repo, repo.views[params.view], say=progress)
    return {
        "rows": dataset.num_rows,
        "entities": len(pc.unique(dataset[entity])),
        "labels_without_features": dropped,
        "online_until": None if online.newest_us is None else datetime.fromtimestamp(online.newest_us / 1e6, UTC).isoformat(),
    }


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


if __name__ == "__main__":
    sys.exit(stage.main("dataset", work))
