"""snapshot: the lake as it is now, in two Parquet files, and the table versions that name it.

- Runs every time; the stages after it run only if what it writes has changed.
- `spec.json`, `code.json` and `champion.json` say what else the later stages rest on that DVC cannot see: code of own functions, the
  contract, the code of Fenceline and of libraries (outside the project), and who is champion in MLflow. A registration that this MLflow
  does not know is forgotten, so that register runs again.
- `readings.parquet` is sorted by device, epoch and the order in which the device saw the readings. Equal rows give an equal file, however
  they lie in the lake's. It is written as it is read, in memory that does not grow with the readings (`cloud.sorting`).
- `lake_version.json` says which Delta versions were read: with them anyone can read the same rows again while the lake keeps those versions
  (30 days; see docs/lake.md), and after that from this snapshot. It is no dependency of a later stage: compaction gives a table
  a new version without changing a row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from cloud.lake import Lake
from cloud.roots import Roots
from cloud.sorting import sorted_rows
from cloud.tracking_server import errors_told
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.stream import StreamContract
from pipelines import cluster, stage, tracking
from pipelines.cli import progress
from pipelines.params import Params
from pipelines.stage import Context

ROW_GROUP = 65_536
ORIGIN = ("device", "epoch", "lane", "ordinal", "row", "score", "model", "arrived_at")
"""What the pipeline keeps of a reading beside the fields of its contract."""
ROOMS = ("edge_agent/contract", "edge_agent/core", "pipelines")
"""Where the code lies that computes after the snapshot. What reads the lake is not among it: the snapshot shows what was read."""
LIBRARIES = ("feast", "numpy", "onnx", "onnxruntime", "polars", "pyarrow", "scikit-learn")


@errors_told()
def work(context: Context) -> None:
    """Write the snapshot, and what else the later stages depend on."""
    versions = pick_versions(Lake(context.lake), context)
    progress(f"lake {context.lake}, stream {context.params.stream}: " + ", ".join(f"{k}@{v}" for k, v in versions.items()))
    out = context.folder("snapshot")
    found = cluster.run(write_snapshot, context.lake, out, context.params, context.contract, versions)
    stage.write_json(context.lake_version, found)
    write_spec(context)
    write_code(context)
    tracking.leave_run(context)
    store = tracking.client(context)
    write_champion(context, store)
    forget_foreign_registration(context, store)
    progress(f"{found['rows']} readings, {found['labels']} labels")


def pick_versions(lake: Lake, context: Context) -> dict[str, int]:
    """The current version of each lane to read.

    Raises:
        ConfigError: the lake has nothing to learn from, or not the lanes that params.yaml asks for.
    """
    stream, lanes = context.params.stream, context.params.snapshot.lanes
    versions = lake.versions(stream)
    if not versions:
        raise _empty(context, "holds no readings")
    missing = sorted(set(lanes) - set(versions))
    if missing:
        raise ConfigError(
            f"snapshot.lanes asks for {', '.join(missing)}, but the lake {context.lake} has {stream!r} only in "
            f"{', '.join(versions)}; change snapshot.lanes in pipelines/params.yaml (empty: all)"
        )
    labels = lake.labels(stream)
    if labels is None or not labels.num_rows:
        raise ConfigError(
            f"the lake {context.lake} holds no labels for stream {stream!r}; add what the model shall learn with "
            "`fenceline labels add FILE`, then train again"
        )
    return {lane: version for lane, version in versions.items() if not lanes or lane in lanes}


def write_snapshot(roots: Roots, out: Path, params: Params, contract: StreamContract, versions: dict[str, int]) -> dict[str, Any]:
    """Read the lake at `versions` and write both files; what lake_version.json will say."""
    lake = Lake(roots)
    columns = [f.name for f in contract.fields] + list(ORIGIN)
    rows = write_readings(lake, params.stream, versions, columns, params.snapshot.memory_mb, out / "readings.parquet")
    if not rows:
        raise ConfigError(
            f"the lake {roots} has only empty tables of stream {params.stream!r} ({', '.join(versions)}); send readings first"
        )
    version = lake.labels_version(params.stream)
    labels = lake.labels(params.stream, version)
    assert labels is not None  # pick_versions saw them, and labels are never taken away
    labels = labels.select(["entity", "event_time", "label"]).sort_by([("entity", "ascending"), ("event_time", "ascending")])
    pq.write_table(labels, out / "labels.parquet", compression="zstd", row_group_size=ROW_GROUP)
    return {
        "stream": params.stream,
        "lanes": versions,
        "labels_version": version,
        "rows": rows,
        "labels": labels.num_rows,
        "contract_version": contract.version,
    }


def write_readings(lake: Lake, stream: str, versions: dict[str, int], columns: Sequence[str], memory_mb: int, path: Path) -> int:
    """Write columns of a stream's readings, sorted by device, epoch and the order seen; how many there are, and no file if none.

    Beside the file there must be room for the rows a second time, not compressed as well, while they are sorted.

    Raises:
        UnavailableError: the lake does not read, or there is no room.
    """
    beside, rows = path.with_name(f".{path.name}"), 0
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with ExitStack() as stack:
            writer: pq.ParquetWriter | None = None
            for group in sorted_rows(lake, stream, versions, columns, ROW_GROUP, memory_mb, beside / "sort"):
                writer = writer or stack.enter_context(pq.ParquetWriter(beside / path.name, group.schema, compression="zstd"))
                writer.write_table(group, ROW_GROUP)
                rows += group.num_rows
        if rows:
            (beside / path.name).replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return rows


def write_spec(context: Context) -> None:
    """Write down what features are made with."""
    contract = hashlib.sha256((context.project / context.params.contract).read_bytes()).hexdigest()
    stage.write_json(context.spec, {"features": msgspec.to_builtins(context.params.spec), "contract_sha256": contract})


def write_code(context: Context) -> None:
    """Write down what computes.

    The digest is one for all stages: which module each of them comes to is more than a person could keep true in dvc.yaml. A stage
    that runs again for nothing gives what it gave, so what comes after it does not.
    """
    here = Path(__file__).parents[1]
    sources = sorted(path for room in ROOMS for path in (here / room).rglob("*.py"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(here)}\n" for path in sources]
    code = hashlib.sha256("".join(lines).encode()).hexdigest()
    stage.write_json(context.code, {"code_sha256": code, "libraries": {name: metadata.version(name) for name in LIBRARIES}})


def write_champion(context: Context, store: Any) -> None:
    """Write down who is champion now."""
    stage.write_json(context.champion, tracking.champion(store, context.params.register.model))


def forget_foreign_registration(context: Context, store: Any) -> None:
    """Let register run again if what it registered last is not in this MLflow (another server, or a new state directory).

    Raises:
        UnavailableError: MLflow does not say.
    """
    path = context.build / "register/registered.json"
    if not path.exists():
        return
    last = json.loads(path.read_text())
    if tracking.registered(store, last["model"], last["version"]) != {"version": last["version"], "run_id": last["run_id"]}:
        shutil.rmtree(path.parent)


def _empty(context: Context, what: str) -> ConfigError:
    return ConfigError(
        f"the lake {context.lake} {what} of stream {context.params.stream!r}; start a stack (`fenceline up`), send readings "
        "(`fenceline replay FILE` or a device), see them arrive (`fenceline status`), then train again"
    )


if __name__ == "__main__":
    sys.exit(stage.main("snapshot", work))
