"""The point-in-time join itself: which feature row each label gets. NumPy and Polars, no files.

- A label gets the row with its keys and the latest event time not after its own; none if that row is older than `ttl`
  (exactly `ttl` old still counts). Null keys and null times match nothing.
- `known_by`: a row that was created after the label's time did not exist yet, and neither did one without a created time.
- Of rows with equal keys and event time the latest created one counts, of fully equal ones the content decides: the answer
  never depends on the order or the cut of the rows.
- Rows may come in pieces: `prune` keeps those that are somebody's answer within their piece, at most one per label. What it
  drops is nobody's answer in the whole, so join(prune(a) + prune(b)) = join(a + b). Memory limits and clusters rest on it.

How: keys become dense numbers in sorted order, (key, time) one int64. Rows are sorted by it (most files are already), labels
find their row by binary search, and only then are the values of that row fetched. For `known_by`, rows are sorted by the
time from which they are visible, and a running maximum of their rank says which is the best of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

Ints = npt.NDArray[np.int64]

KEY, AT, CREATED = "__key", "__at", "__created"
_COMPARED, _PLACE = "__compared", "__place"
NOBODY = -1
_LEAST = -(2**63)
_CODES_MAX = 2**62
_RUN_ROWS = 4


@dataclass(frozen=True)
class Rule:
    """`ttl` in the unit of all times, 0 for any age; `known_by` needs the column CREATED."""

    ttl: int = 0
    known_by: bool = False


@dataclass(frozen=True)
class Labels:
    """Who asks: sorted by key number and time. `rows` are their places in the table they came from."""

    keys: pl.DataFrame
    ids: Ints
    at: Ints
    rows: Ints

    @classmethod
    def of(cls, keys: pl.DataFrame, at: pl.Series) -> Labels:
        """Number the keys (one column per join key, perhaps none) of labels with times `at`, null where a label has none."""
        distinct = keys.unique().drop_nulls().sort(keys.columns) if keys.width else keys
        ids = numbered(keys, distinct) if keys.width else pl.Series(np.zeros(len(at), np.int64))
        asked = pl.DataFrame({KEY: ids, AT: at}).with_row_index("row")
        known = pl.when(pl.col(AT).is_not_null()).then(KEY).fill_null(NOBODY)
        asked = asked.with_columns(known.alias(KEY), pl.col(AT).fill_null(pl.col(AT).max()).fill_null(0)).sort(KEY, AT)
        return cls(distinct, *(asked[name].cast(pl.Int64).to_numpy() for name in (KEY, AT, "row")))

    def part(self, number: int, parts: int) -> Labels:
        """The labels of every `parts`-th key."""
        mine = self.ids % parts == number
        return Labels(self.keys, self.ids[mine], self.at[mine], self.rows[mine])

    def span(self) -> tuple[int, int] | None:
        """The first and last time of labels that can have an answer; None if none can."""
        at = self.at[self.ids != NOBODY]
        return (int(at.min()), int(at.max())) if len(at) else None


def numbered(keys: pl.DataFrame, distinct: pl.DataFrame) -> pl.Series:
    """The place of each row in `distinct`, null where it is not there.

    Files are mostly sorted by entity, so a run of equal keys is looked up once.
    """
    changes = keys.select(pl.any_horizontal(pl.all().ne_missing(pl.all().shift()))).to_series().to_numpy(writable=True)
    changes[:1] = True
    runs = np.flatnonzero(changes)
    heads = keys[runs] if len(runs) < keys.height // _RUN_ROWS else keys
    places = heads.join(distinct.with_row_index(KEY), on=keys.columns, how="left", maintain_order="left")[KEY].cast(pl.Int64)
    return places if heads is keys else places.gather(np.cumsum(changes) - 1)


def candidates(features: pl.DataFrame, labels: Labels, rule: Rule) -> pl.DataFrame:
    """Rows with a key that somebody asks for and with the times they need: the label's key columns become KEY."""
    names = labels.keys.columns
    ids = numbered(features.select(names), labels.keys) if names else pl.Series(np.zeros(features.height, np.int64))
    found = features.drop(names).with_columns(ids.alias(KEY))
    needed = [KEY, AT, CREATED] if rule.known_by else [KEY, AT]
    return found.drop_nulls(needed) if any(found[name].null_count() for name in needed) else found


def join(features: pl.DataFrame, labels: Labels, rule: Rule) -> pl.DataFrame:
    """The values (all columns but KEY, AT, CREATED) that each label gets, in the order of `labels.rows`; null for no answer."""
    found = pl.Series(winners(features, labels, rule)).replace(NOBODY, None).cast(pl.get_index_type())
    # Two steps: rows are near each other in the order of the labels' keys and times, not in that of their places.
    values = features.select(pl.col(values_of(features)).gather(found))
    return values[np.argsort(labels.rows)]


def prune(features: pl.DataFrame, labels: Labels, rule: Rule) -> pl.DataFrame:
    """The rows that at least one label gets."""
    kept = np.unique(winners(features, labels, rule))
    return features[kept[kept != NOBODY]]


def winners(features: pl.DataFrame, labels: Labels, rule: Rule) -> Ints:
    """For each label the place of its row in `features` (as `candidates` gives them), or NOBODY."""
    if not features.height or not len(labels.ids):
        return np.full(len(labels.ids), NOBODY)
    ids, at = features[KEY].to_numpy(), features[AT].to_numpy()
    codes, asked = _codes(ids, at, labels)
    ranked = _ranked(codes, features)
    if rule.known_by:
        codes, asked = _codes(ids, np.maximum(at, features[CREATED].to_numpy()), labels)
        ranked, codes = _best_visible(codes, ranked)
    else:
        codes = codes[ranked]
    place = np.searchsorted(codes, asked, side="right") - 1
    found = ranked[np.maximum(place, 0)]
    answers = (place >= 0) & (labels.ids != NOBODY) & (ids[found] == labels.ids)
    if rule.ttl:
        # What is older than its label by more than an int64 holds fits a uint64.
        answers &= labels.at.view(np.uint64) - at[found].view(np.uint64) <= np.uint64(rule.ttl)
    return np.where(answers, found, NOBODY)


def newest(frame: pl.DataFrame, keys: list[str], times: list[str], values: list[str]) -> pl.DataFrame:
    """Of each entity (null keys are one too) the row with the latest of the first of the times, then of the next, then by content.

    `join` settles ties in the same way.
    """
    for name in times:
        at = pl.col(name).cast(pl.Int64).fill_null(_LEAST)
        frame = frame.filter(at == (at.max().over(keys) if keys else at.max()))
    if not keys:
        return (frame.sort(values) if values else frame).tail(1)
    twice = frame.select(pl.struct(keys).is_duplicated()).to_series()
    if not twice.any():
        return frame
    return frame.sort(values).unique(keys, keep="last", maintain_order=True) if values else frame.unique(keys)


def values_of(features: pl.DataFrame) -> list[str]:
    return [name for name in features.columns if name not in (KEY, AT, CREATED)]


def _codes(ids: Ints, at: Ints, labels: Labels) -> tuple[Ints, Ints]:
    """(key, time) of rows and of labels as one number each, in the same order."""
    first = min(int(at.min()), int(labels.at.min()))
    span = max(int(at.max()), int(labels.at.max())) - first + 1
    rows, asked = at, labels.at
    if span * max(labels.keys.height, 1) > _CODES_MAX:  # many keys over a long time: numbers of times instead of times
        times, numbers = np.unique(np.concatenate([at, labels.at]), return_inverse=True)
        first, span = 0, len(times)
        rows, asked = numbers[: len(at)], numbers[len(at) :]
    return ids * span + (rows - first), labels.ids * span + (asked - first)


def _ranked(codes: Ints, features: pl.DataFrame) -> Ints:
    """Places of the rows from the least to the best: by key and time, then created time, then content."""
    order = np.arange(len(codes)) if (codes[1:] >= codes[:-1]).all() else np.argsort(codes)
    compared = codes[order]
    for columns in ([CREATED] if CREATED in features.columns else [], values_of(features)):
        same = compared[1:] == compared[:-1]
        if not same.any():
            break
        tied = np.append(same, False) | np.append(False, same)
        rows = features[order[tied]].select(*columns, pl.Series(_COMPARED, compared[tied]), pl.Series(_PLACE, order[tied]))
        rows = rows.sort(_COMPARED, *columns)
        order[tied] = rows[_PLACE].to_numpy()
        # Numbers that rise along the order and are nobody else's.
        compared[tied] = rows.select(pl.struct(_COMPARED, *columns).rle_id()).to_series().cast(pl.Int64).to_numpy() - _CODES_MAX
    return order


def _best_visible(codes: Ints, ranked: Ints) -> tuple[Ints, Ints]:
    """The best row among those visible at each moment, and the moments in order. A later key outranks all before it."""
    rank = np.empty_like(ranked)
    rank[ranked] = np.arange(len(ranked))
    order = np.argsort(codes, kind="stable")
    return ranked[np.maximum.accumulate(rank[order])], codes[order]
