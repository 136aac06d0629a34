"""score: recompute a model's scores from the lake, and compare them with what the devices computed.

    python -m pipelines.score --state .fenceline --bundle model.bundle --json

- Batch inference on Ray: each device's readings, in the order it saw them, through the same windows and the same model. Readings are sorted
  into a file as for the snapshot; a task reads batches of it and holds one, so memory does not grow with the readings.
- A reading is compared if it carries a score and the digest of exactly this bundle.
- A device's windows can only be rebuilt if all its readings are in the lake; `missing_readings` counts holes in its numbering
  (readings that still wait for an allowed endpoint, for example).
- Exit 1 if the largest difference is above `--max-diff`, or nothing could be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cloud.lake import Lake
from edge_agent.contract.bundle import Bundle, read_bundle
from edge_agent.contract.errors import ConfigError, FencelineError
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from edge_agent.core.functions import Functions
from pipelines import cli, cluster
from pipelines.features import count_by_device, deal, plain, read_devices, readings_of
from pipelines.scoring import Scorer, scorer
from pipelines.snapshot import write_readings
from pipelines.stage import Context, load_context, private

MAX_DIFF = 1e-6
NAMES = ("device", "epoch", "lane", "sequence", "row")
"""What names a row of the lake for ever."""


@dataclass(frozen=True)
class Compared:
    """How far the devices' scores are from ours, over rows scored with the bundle; `max_abs_diff` is None if no row was."""

    rows_scored: int = 0
    rows_with_model: int = 0
    rows_compared: int = 0
    max_abs_diff: float | None = None
    rows_not_equal: int = 0
    rows_scored_by_one: int = 0

    def __add__(self, other: Compared) -> Compared:
        worst = [c.max_abs_diff for c in (self, other) if c.max_abs_diff is not None]
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "max_abs_diff"}
        return Compared(**sums, max_abs_diff=float(np.max(worst)) if worst else None)


def recompute(context: Context, bundle_path: Path, out: Path | None = None) -> dict[str, Any]:
    """Score all readings of the bundle's stream and compare; Ray must be connected.

    Args:
        out: where to write the scores (Parquet: the names of each row, the entity, its event time, `score` and `device_score`).

    Raises:
        ConfigError: a file is not there or cannot be made, the bundle is not for the project's stream, or the lake has no readings.
        BundleError: the file is not a bundle.
        UnavailableError: the lake does not read, or the project's disk has no room for the readings.
    """
    data = _read(bundle_path)
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}")
    bundle, digest = read_bundle(data), hashlib.sha256(data).hexdigest()
    contract, manifest = context.contract, bundle.manifest
    if manifest.stream != contract.stream:
        raise ConfigError(f"{bundle_path} is for stream {manifest.stream!r}; the project's stream is {contract.stream!r}")
    columns = dict.fromkeys([*manifest.features.fields, contract.entity, contract.event_time, "ordinal", "score", "model", *NAMES])
    lake = Lake(context.lake)
    private(context.build)
    with tempfile.TemporaryDirectory(prefix=".score-", dir=context.build) as folder:
        readings = Path(folder) / "readings.parquet"
        versions, memory_mb = lake.versions(contract.stream), context.params.snapshot.memory_mb
        if not versions or not write_readings(lake, contract.stream, versions, list(columns), memory_mb, readings):
            raise ConfigError(f"the lake {context.lake} holds no readings of stream {contract.stream!r}; nothing to score")
        counts = count_by_device(readings)
        groups = deal(counts, context.params.features.parts)
        parts = [Path(folder) / f"scores-{i:03d}.parquet" for i in range(len(groups))]
        calls = [
            (readings, devices, contract, context.params.functions, bundle, digest, part if out else None)
            for devices, part in zip(groups, parts, strict=True)
        ]
        done = [result for _, result in cluster.as_done(score_devices, calls)]
        if out is not None:
            _join(parts, out)
    return {
        "bundle_sha256": digest,
        **asdict(sum((compared for compared, _ in done), Compared())),
        "model": manifest.model,
        "model_version": manifest.model_version,
        "missing_readings": sum(missing for _, missing in done),
        "devices": len(counts),
    }


def score_devices(
    readings: Path, devices: list[str], contract: StreamContract, functions: Functions, bundle: Bundle, digest: str, out: Path | None
) -> tuple[Compared, int]:
    """Score some devices, and write that down if asked to.

    Returns:
        How the scores compare; how many readings a device numbered but the lake lacks, up to the newest that it has.
    """
    spec, score = bundle.manifest.features, scorer(bundle.model)
    compared, missing = Compared(), 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        batches = read_devices(readings, devices, contract.entity, pq.read_schema(readings).names)
        for _, of_epoch in groupby(batches, key=lambda rows: (rows["device"][0].as_py(), rows["epoch"][0].as_py())):
            windows, numbered = Windows(spec, functions), 0
            for rows in of_epoch:
                scored = score_rows(rows, contract, windows, score)
                compared += compare(scored, digest)
                missing -= numbered + rows.num_rows
                numbered = rows["ordinal"][-1].as_py() + 1
                missing += numbered
                if out is not None:
                    table = scored.drop_columns(["model"])
                    writer = writer or stack.enter_context(pq.ParquetWriter(out, table.schema))
                    writer.write_table(table)
    return compared, missing


def score_rows(rows: pa.Table, contract: StreamContract, windows: Windows, score: Scorer) -> pa.Table:
    """The names, entity, time, `device_score`, `model` and recomputed `score` of the next rows of a device and epoch.

    A window's score stands on the row of the reading that it was done with, as on the device (`edge_agent.scoring`).
    """
    made = windows.push(*readings_of(rows, contract, windows.spec))
    scores = np.full(rows.num_rows, np.nan)
    scores[made.rows] = score(made.features)
    keys = [*NAMES, contract.entity, contract.event_time, "model"]
    table = {**{k: rows[k] for k in keys}, "device_score": rows["score"], "score": pa.array(scores, from_pandas=True)}
    return plain(pa.table(table))


def compare(scored: pa.Table, digest: str) -> Compared:
    """The devices' scores beside ours, of rows scored with the bundle of this digest."""
    own = pc.fill_null(pc.equal(scored["model"], digest), False)
    ours, theirs = pc.is_valid(scored["score"]), pc.is_valid(scored["device_score"])
    compared = scored.filter(pc.and_(own, pc.and_(ours, theirs)))
    difference = np.abs(compared["device_score"].to_numpy() - compared["score"].to_numpy())
    return Compared(
        rows_scored=scored.num_rows,
        rows_with_model=int(pc.sum(own).as_py() or 0),
        rows_compared=compared.num_rows,
        max_abs_diff=float(difference.max()) if len(difference) else None,
        rows_not_equal=int(np.count_nonzero(difference)),
        rows_scored_by_one=int(pc.sum(pc.and_(own, pc.xor(ours, theirs))).as_py() or 0),
    )


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.score", description="Recompute scores from the lake and compare them with the devices'."
    )
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle file that devices run")
    parser.add_argument("--state", type=Path, help="state directory (default: FENCELINE_STATE, then fenceline.toml)")
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="directory with pipelines/params.yaml (default: here)")
    parser.add_argument("--out", type=Path, help="write every score to this Parquet file")
    parser.add_argument("--max-diff", type=float, default=MAX_DIFF, help=f"largest difference allowed (default {MAX_DIFF})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        context = load_context(args.project.absolute(), args.state)
        with cluster.connected():
            report = recompute(context, args.bundle, args.out)
    except FencelineError as e:
        cli.err(f"score: {e}")
        return 2 if isinstance(e, ConfigError) else 1
    cli.out(json.dumps(report) if args.json else "\n".join(f"{k:18} {v}" for k, v in report.items()))
    return 0 if report["rows_compared"] and report["max_abs_diff"] <= args.max_diff else 1


def _join(parts: list[Path], out: Path) -> None:
    """Write the rows of all parts to one file."""
    with pq.ParquetWriter(out, pq.read_schema(parts[0])) as writer:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                writer.write_batch(batch)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"bundle {path} does not read: {e.strerror}") from e


if __name__ == "__main__":
    sys.exit(main())
