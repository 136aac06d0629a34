"""Bring each entity's newest features from a view's batch source into Feast's online store.

    python -m pipelines.materialise --view turbofan_windows          # fenceline features materialise

Rules:

- The newest row of an entity is that with the highest event time, then created time. An older value never replaces a newer one: the
  online stores of `pipelines.online_store` see to it, whoever else writes meanwhile.
- Incremental: a run takes the rows that were created after the last one, or whose event time it left out (`until`). A row may
  become visible some time after it was created, so runs overlap by OVERLAP_S; what is written twice is the same. A source without
  a created time is read whole, and rows without one are taken by every run.
- The mark of how far a run came is set when all of it is read back from the store. A run that breaks off leaves the mark, and the
  next does it again.
- The run is a full one if the definition of the view or the store has changed since the last, which also takes the old values away
  (`pipelines.marks`), or if the store no longer has what the last one wrote there.
- Bounded memory: `pipelines.newest` reads the source with a limit and spills to disk; rows go on in batches.
- Entities that have left the source stay online until `rebuild`. Feast gives back values of any age, with their time: a reader compares it
  with the view's ttl (`key_ttl_seconds` lets Redis forget them by itself).
- Rows without a key or an event time, or with a time that Feast cannot store, are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa

from edge_agent.contract.errors import ConfigError, FencelineError
from pipelines import cli
from pipelines.feature_store import Repo, open_repo
from pipelines.marks import begin, read_mark, write_mark
from pipelines.newest import Wanted, microseconds, newest_of
from pipelines.online_writer import OnlineWriter, Written

if TYPE_CHECKING:
    from feast import FeatureView

OVERLAP_S = 600
"""How long after its created time a row may become visible in the source."""
PROBES = 64
PROGRESS_S = 2.0

Say = Callable[[str], None]


class Mark(msgspec.Struct, frozen=True):
    """How far the last whole run came: all rows that were created by then, and whose time is not later than `event_us`, have been
    looked at. `probes` are keys that it wrote."""

    definition: str
    created_us: int
    event_us: int
    probes: dict[str, list[Any]]


@dataclass(frozen=True)
class Materialised:
    """What a run did: `written + older == entities`.

    `full` says why all rows were taken, if they were. `newest_us` is the highest event time online so far, in microseconds UTC.
    """

    view: str
    full: str
    entities: int
    written: int
    older: int
    without_key: int
    newest_us: int | None
    seconds: float


def materialise(
    repo: Repo, view: FeatureView, until: datetime | None = None, full: bool = False, rebuild: bool = False, say: Say = lambda line: None
) -> Materialised:
    """Materialise one view.

    Args:
        until: rows with a later event time are left for a later run; None: none.
        full: take all rows, not only those that are new.
        rebuild: take all values away first, also those of entities that have left the source.
        say: gets each line of progress.

    Raises:
        ConfigError: the view's source is not there.
        UnavailableError: the store fails, or does not give back what was written; run again.
    """
    started = time.monotonic()
    path = repo.data / "materialised" / f"{view.name}.json"
    writer = OnlineWriter(repo.store, view)
    definition = begin(repo, writer)
    mark = None if rebuild else read_mark(path, Mark)
    why = "asked for" if full or rebuild else _why_full(mark, definition, writer)
    if rebuild:
        path.unlink(missing_ok=True)
        writer.empty()
    before = mark if mark is not None and not why else Mark(definition, 0, 0, {})
    until_us = None if until is None else microseconds(until)
    wanted = Wanted(until_us) if why else Wanted(until_us, before.created_us - OVERLAP_S * 1_000_000, before.event_us)
    with newest_of(repo, view, wanted) as rows:
        say(f"{view.name}: {rows.entities} entities ({f'all: {why}' if why else 'what is new'})")
        done, probes = _write(writer, rows.batches(), rows.entities, view, say)
    newest_us = max(before.event_us, rows.event_us)
    covered_us = newest_us if until_us is None else min(newest_us, until_us)  # what `until` left out may be older than what is online
    write_mark(path, Mark(definition, max(before.created_us, rows.created_us), covered_us, probes or before.probes))
    _tell_feast(repo, view, newest_us)
    seconds = round(time.monotonic() - started, 3)
    return Materialised(view.name, why, rows.entities, done.written, done.older, rows.without_key, newest_us or None, seconds)


def _write(
    writer: OnlineWriter, batches: Iterator[pa.RecordBatch], total: int, view: FeatureView, say: Say
) -> tuple[Written, dict[str, list[Any]]]:
    """Write all batches; the counts, and some keys by which a later run sees whether the store still has them."""
    done, due = Written(), time.monotonic() + PROGRESS_S
    probes: dict[str, list[Any]] = {}
    keys = [e.name for e in view.entity_columns]
    for batch in batches:
        done += writer.write(batch)
        probes = probes or {name: batch.column(name).slice(0, PROBES).to_pylist() for name in keys}
        if time.monotonic() >= due:
            due = time.monotonic() + PROGRESS_S
            say(f"{view.name}: {done.written + done.older} of {total} entities")
    return done, probes


def _why_full(mark: Mark | None, definition: str, writer: OnlineWriter) -> str:
    """Why all rows have to be written, or nothing."""
    if mark is None:
        return "the first run"
    if mark.definition != definition:
        return "the view or the store has changed"
    lost = writer.missing(pa.table(mark.probes)) if mark.probes else 0
    return f"the store has lost {lost} of {len(next(iter(mark.probes.values())))} entities looked at" if lost else ""


def _tell_feast(repo: Repo, view: FeatureView, event_us: int) -> None:
    """Let Feast's registry know, so that its UI shows it and `feast materialize-incremental` goes on from here."""
    if not event_us:
        return
    reached = datetime.fromtimestamp(event_us / 1e6, UTC)
    current: Any = repo.store.get_feature_view(view.name)
    start = current.most_recent_end_time or datetime(1970, 1, 1, tzinfo=UTC)
    if start < reached:
        repo.store.registry.apply_materialization(current, repo.store.project, start, reached)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.materialise", description="Bring the newest features online.")
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="directory with feature_repo/ (default: here)")
    parser.add_argument("--view", metavar="NAME", help="a feature view (default: all that go online)")
    parser.add_argument("--until", type=datetime.fromisoformat, metavar="ISO_TIME", help="leave later event times for a later run")
    parser.add_argument("--full", action="store_true", help="take all rows, not only those that are new")
    parser.add_argument("--rebuild", action="store_true", help="take all values away first, also those of entities that are gone")
    parser.add_argument("--json", action="store_true", help="print what was done with each view as a JSON list; progress goes to stderr")
    args = parser.parse_args(argv)
    try:
        repo = open_repo(args.project.absolute())
        done = [materialise(repo, view, args.until, args.full, args.rebuild, cli.err) for view in repo.named(args.view)]
    except FencelineError as e:
        cli.err(f"materialise: {e}")
        return 2 if isinstance(e, ConfigError) else 1
    cli.out(json.dumps([asdict(result) for result in done]) if args.json else "\n".join(map(_report, done)))
    return 0


def _report(done: Materialised) -> str:
    newest = "nothing" if done.newest_us is None else datetime.fromtimestamp(done.newest_us / 1e6, UTC).isoformat()
    left_out = f", {done.without_key} rows without a key, or a time of the years 2 to 9998, left out" if done.without_key else ""
    return f"{done.view}: {done.written} entities online, {done.older} had newer values{left_out}; up to {newest}, in {done.seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
