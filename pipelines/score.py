"""score: recompute a model's scores from the lake, and compare them with what the devices computed.

    python -m pipelines.score --state .fenceline --bundle model.bundle --json

- Batch inference on Ray: each device's readings, in the order it saw them, through the same windows and the same model.
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
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cloud.lake import Lake
from edge_agent.contract.bundle import read_bundle
from edge_agent.contract.errors import ConfigError, FencelineError
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.contract.stream import StreamContract
from edge_agent.core.functions import Functions
from pipelines import cli, cluster
from pipelines.features import deal, runs, windows_of
from pipelines.scoring import score
from pipelines.stage import Context, load_context

MAX_DIFF = 1e-6
NAMES = ("device", "epoch", "lane", "sequence", "row")
"""What names a row of the lake for ever."""


def recompute(context: Context, bundle_path: Path, out: Path | None = None) -> dict[str, Any]:
    """Score all readings of the bundle's stream and compare; Ray must be connected.

    Args:
        out: where to write the scores (Parquet: the names of each row, the entity, its event time, `score` and `device_score`).

    Raises:
        ConfigError: a file is not there or cannot be made, the bundle is not for the project's stream, or the lake has no readings.
        BundleError: the file is not a bundle.
    """
    data = _read(bundle_path)
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}")
    bundle, digest = read_bundle(data), hashlib.sha256(data).hexdigest()
    contract, spec = context.contract, bundle.manifest.features
    if bundle.manifest.stream != contract.stream:
        raise ConfigError(f"{bundle_path} is for stream {bundle.manifest.stream!r}; the project's stream is {contract.stream!r}")
    fields = dict.fromkeys(f.field for f in spec.features)
    columns = dict.fromkeys([*fields, contract.entity, contract.event_time, "ordinal", "score", "model", *NAMES])
    readings = Lake(context.lake).read(contract.stream, columns=list(columns))
    if not readings.num_rows:
        raise ConfigError(f"the lake {context.lake} holds no readings of stream {contract.stream!r}; nothing to score")
    counts = {c["values"]: c["counts"] for c in readings["device"].value_counts().to_pylist()}
    groups = deal(counts, context.params.features.parts)
    parts = [readings.filter(pc.is_in(readings["device"], pa.array(group))) for group in groups]
    calls = [(part, contract, spec, context.params.functions, bundle.model) for part in parts]
    scored = pa.concat_tables([part for _, part in sorted(cluster.as_done(score_devices, calls), key=itemgetter(0))])
    if out is not None:
        pq.write_table(scored.drop_columns(["model"]), out)
    return compare(scored, digest) | {
        "model": bundle.manifest.model,
        "model_version": bundle.manifest.model_version,
        "missing_readings": sum(missing(part) for part in parts),
        "devices": len(counts),
    }


def score_devices(readings: pa.Table, contract: StreamContract, spec: FeatureSpec, functions: Functions, model: bytes) -> pa.Table:
    """The names, entity, time, `device_score`, `model` and recomputed `score` of readings sorted by device, epoch and order seen.

    A window's score stands on the row of the reading that it was done with, as on the device (`edge_agent.scoring`).
    """
    made = windows_of(readings, contract, spec, functions)
    scores = np.full(readings.num_rows, np.nan)
    scores[made.rows] = score(model, made.features)
    keys = [*NAMES, contract.entity, contract.event_time, "model"]
    return pa.table({**{k: readings[k] for k in keys}, "device_score": readings["score"], "score": pa.array(scores, from_pandas=True)})


def compare(scored: pa.Table, digest: str) -> dict[str, Any]:
    """How far the devices' scores are from ours, over rows scored with the bundle of this digest."""
    own = pc.fill_null(pc.equal(scored["model"], digest), False)
    ours, theirs = pc.is_valid(scored["score"]), pc.is_valid(scored["device_score"])
    compared = scored.filter(pc.and_(own, pc.and_(ours, theirs)))
    difference = np.abs(compared["device_score"].to_numpy() - compared["score"].to_numpy())
    return {
        "bundle_sha256": digest,
        "rows_scored": scored.num_rows,
        "rows_with_model": int(pc.sum(own).as_py() or 0),
        "rows_compared": compared.num_rows,
        "max_abs_diff": float(difference.max()) if len(difference) else None,
        "rows_not_equal": int(np.count_nonzero(difference)),
        "rows_scored_by_one": int(pc.sum(pc.and_(own, pc.xor(ours, theirs))).as_py() or 0),
    }


def missing(readings: pa.Table) -> int:
    """Readings that a device numbered but the lake lacks, up to the newest that it has."""
    ordinals = readings["ordinal"].to_numpy()
    return sum(int(ordinals[end - 1]) + 1 - (end - start) for start, end in runs(readings))


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"bundle {path} does not read: {e.strerror}") from e


if __name__ == "__main__":
    sys.exit(main())
