"""Live features: windows of readings that have just reached the lake, pushed to Feast's online store within seconds.

    python -m pipelines.live          # fenceline features live

- It follows the lake's commits (`cloud.follow`), puts readings behind those it has (`pipelines.tails`) and pushes the newest features of
  each entity through the view's push source: the bits that the features stage will give for the same reading.
- Devices that it has not heard of since it started are read from the lake first.
- At least once: how far it came is noted after the push. Pushing again changes nothing, and an older value never replaces a newer one.
- A process that others have left behind, as the definition of the view has changed, ends: its values would be of the old one.
- The first run, and one with another definition of the view or another store, starts with the first commit: nothing is left out.
- While lake or store are away it waits and goes on from where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cloud.follow import Follower, Piece
from cloud.lake import Lake
from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError
from edge_agent.contract.feature_spec import WindowKind
from pipelines import cli
from pipelines.feature_store import open_repo
from pipelines.features import CREATED_TIME
from pipelines.marks import begin, check_current, read_mark, write_mark
from pipelines.online_writer import BATCH_ROWS, OnlineWriter, Written
from pipelines.stage import Context, load_context
from pipelines.tails import Tails

log = logging.getLogger(__name__)

POLL_S = 0.2
RETRY_S = (0.2, 10.0)
STATUS_S = 1.0
FRESHNESS_KEPT = 10_000

Push = Callable[[pa.RecordBatch], Written]


class LiveMark(msgspec.Struct, frozen=True):
    """The version of each lane up to which everything is pushed."""

    definition: str
    seen: dict[str, int]


class Status(msgspec.Struct):
    """What this process has done; others read it from a file. Freshness: seconds from a reading's arrival to its features online."""

    pid: int
    ready: bool = False
    readings: int = 0
    pushed: int = 0
    older: int = 0
    seen: dict[str, int] = {}
    freshness_p50_s: float | None = None
    freshness_p99_s: float | None = None
    updated_us: int = 0


def status_path(state: Path) -> Path:
    """Where a live process writes its Status."""
    return state / "run/features-live.json"


@dataclass
class Live:
    """The loop. `definition` names what the values depend on."""

    follower: Follower
    tails: Tails
    push: Push
    mark_path: Path
    definition: str
    status: Status = field(default_factory=lambda: Status(os.getpid()))

    def __post_init__(self) -> None:
        self._freshness: deque[float] = deque(maxlen=FRESHNESS_KEPT)

    def step(self, stop: threading.Event | None = None) -> int:
        """Push what has been committed since, piece by piece until `stop`; the number of readings.

        Raises:
            UnavailableError: lake or store are away; what was not pushed comes again.
        """
        readings = 0
        for piece in self.follower.pieces():
            readings += piece.rows.num_rows
            self._take(piece)
            self.follower.done(piece)
            self.status.seen = dict(self.follower.seen)
            write_mark(self.mark_path, LiveMark(self.definition, self.status.seen))
            if stop is not None and stop.is_set():
                break
        return readings

    def run(self, stop: threading.Event, status_file: Path) -> None:
        """Step until asked to stop."""
        wait_s, status_due = POLL_S, 0.0
        retry_s = RETRY_S[0]
        while not stop.wait(wait_s):
            try:
                wait_s, retry_s, self.status.ready = 0.0 if self.step(stop) else POLL_S, RETRY_S[0], True
            except UnavailableError as e:
                log.warning("features waiting retry_s=%.1f reason=%s", retry_s, e)
                wait_s, retry_s, self.status.ready = retry_s, min(2 * retry_s, RETRY_S[1]), False
            if time.monotonic() >= status_due:
                self._write_status(status_file)
                status_due = time.monotonic() + STATUS_S

    def _take(self, piece: Piece) -> None:
        if not piece.rows.num_rows:
            return
        pairs = piece.rows.group_by(["device", "epoch"]).aggregate([])
        devices = set(zip(pairs["device"].to_pylist(), pairs["epoch"].to_pylist(), strict=True))
        if strange := devices - self.tails.devices:
            self.tails.warm(strange, self.follower.of_devices(sorted({device for device, _ in strange})))
        newest = self.tails.add(piece.rows)
        done = Written()
        for batch in newest.combine_chunks().to_batches(BATCH_ROWS):
            done += self.push(batch)
        self._freshness.extend(_ages_s(newest))
        self.status.readings += piece.rows.num_rows
        self.status.pushed, self.status.older = self.status.pushed + done.written, self.status.older + done.older

    def _write_status(self, path: Path) -> None:
        self.status.updated_us = time.time_ns() // 1_000
        if self._freshness:
            self.status.freshness_p50_s, self.status.freshness_p99_s = np.quantile(self._freshness, [0.5, 0.99]).tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(self.status))
        temporary.replace(path)


def _ages_s(rows: pa.Table) -> list[float]:
    """How long ago the newest readings of pushed rows reached the lake."""
    now_us = time.time_ns() // 1_000
    ages: Any = pc.subtract(now_us, rows[CREATED_TIME].cast(pa.int64()))
    return (ages.to_numpy() / 1e6).tolist()


def build(context: Context, skip_history: bool = False) -> Live:
    """The loop of a project, going on from where the last one came.

    Args:
        skip_history: start with what comes from now on; the rest is left to `fenceline features materialise`.

    Raises:
        ConfigError: the project has no feature repository, its view takes no push, or its windows are not trailing.
    """
    kind = context.params.features.windows
    if kind is not WindowKind.TRAILING:
        raise ConfigError(
            f"features.windows is {kind}, and live windows are trailing: a block that comes late could take a closed window back; "
            "bring windows that close online with fenceline train and fenceline features materialise"
        )
    repo = open_repo(context.project)
    source: Any = repo.views[repo.view.name].stream_source
    if source is None:
        raise ConfigError(f"feature view {repo.view.name!r} has no push source; give it source=PushSource(…) in feature_definitions.py")
    tails = Tails(context.contract, context.params.spec, functions=context.params.functions)
    writer = OnlineWriter(repo.store, repo.views[repo.view.name])
    mark_path, current = repo.data / "live.json", begin(repo, writer)
    mark = read_mark(mark_path, LiveMark)
    known = mark is not None and mark.definition == current
    follower = Follower(Lake(context.lake), context.params.stream, tails.columns, mark.seen if known and mark is not None else None)
    if skip_history and not known:
        follower.skip()

    def push(rows: pa.RecordBatch) -> Written:
        check_current(repo, writer.view, current)
        return writer.push(source.name, rows)

    return Live(follower, tails, push, mark_path, current)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.live", description="Keep online features fresh from the lake.")
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="directory with feature_repo/ (default: here)")
    parser.add_argument("--state", type=Path, help="state directory (default: FENCELINE_STATE, then fenceline.toml)")
    parser.add_argument("--skip-history", action="store_true", help="on the first run, start with what comes from now on")
    parser.add_argument("--once", action="store_true", help="push what is there, print what was done, and end")
    parser.add_argument("--json", action="store_true", help="print the result of --once as JSON")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        context = load_context(args.project.absolute(), args.state)
        live = build(context, args.skip_history)
        if args.once:
            live.step(stop)
            done = live.status
            cli.out(msgspec.json.encode(done).decode() if args.json else f"{done.readings} readings, {done.pushed} entities online")
        else:
            live.run(stop, status_path(context.state))
    except FencelineError as e:
        cli.err(f"live features: {e}")
        return 2 if isinstance(e, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
