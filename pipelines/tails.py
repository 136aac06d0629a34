"""The last readings of every entity, and from them the newest features: what the features stage would give, without reading it all again.

- Readings may come late and out of order: they take their place in the order in which the device saw them, and the windows of those
  behind them are made again.
- A tail belongs to a device, its epoch and an entity, as windows do. It holds twice a window's rows: the newest reading may
  stand up to a window before the end. A reading whose window reaches behind a tail that was cut gives no features, and one from
  before the cut is left out.
- Features are made by `edge_agent.core.features`, so they have the bits of the device and of the features stage.
- A row was known at the latest arrival among the readings that its window may hold.
- The newest features are those that `materialise` takes: of one time the row that was known last, then by content; none with a time
  that Feast cannot store.
- At most KEYS_MAX tails; the devices longest unheard are forgotten first, and whoever feeds this reads them from the lake again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows, entities_max
from edge_agent.core.functions import NO_FUNCTIONS, Functions
from pipelines.arrival import ARRIVED
from pipelines.asof import newest
from pipelines.features import CREATED_TIME, EVENT_TIME
from pipelines.online_writer import TIMES_US

KEYS_MAX = 50_000
ORIGIN = ("device", "epoch", "lane", "sequence", "row")
"""The name of a reading."""
SEEN = ("ordinal", "row")
"""The order in which a device saw its readings."""

Device = tuple[str, str]
"""A device and its epoch."""


class Tails:
    """The tails of one stream."""

    def __init__(self, contract: StreamContract, spec: FeatureSpec, keys_max: int = KEYS_MAX, functions: Functions = NO_FUNCTIONS) -> None:
        self.fields, self._functions = spec.fields, functions
        self.columns = list(dict.fromkeys([*ORIGIN, *SEEN, contract.entity, contract.event_time, ARRIVED, *self.fields]))
        self.devices: set[Device] = set()
        """Those whose tails are here."""
        self._spec, self._contract, self._keys_max = spec, contract, keys_max
        self._key = ["device", "epoch", contract.entity]
        self._rows: pl.DataFrame | None = None
        self._turn = 0

    def warm(self, devices: Iterable[Device], tables: Iterable[pa.Table]) -> None:
        """Take what the lake holds of devices that are not here yet, as history."""
        for table in tables:
            self._merge(table, fresh=False)
        self.devices.update(devices)

    def add(self, table: pa.Table) -> pa.Table:
        """Take readings of devices that are here; the newest features of each tail that changed.

        Returns:
            entity, event_time, created_time and the features; times in microseconds UTC.
        """
        touched = self._merge(table, fresh=True)
        parts = [self._newest(part) for part in self._portions(touched)]
        self._forget()
        return pa.concat_tables([*parts, self._schema().empty_table()])

    def _merge(self, table: pa.Table, fresh: bool) -> pl.DataFrame:
        """Put readings in their places; the tails that changed, before they are cut."""
        self._turn += 1
        flags = {"fresh": pl.lit(fresh), "cut": pl.lit(False), "turn": pl.lit(self._turn, pl.Int64)}
        new = pl.DataFrame(table.select(self.columns)).with_columns(**flags)
        old = new.clear() if self._rows is None else self._rows
        new = self._behind_the_cut(old, new)
        keys = new.select(self._key).unique()
        joined = pl.concat([old.join(keys, on=self._key, how="semi"), new]).with_columns(pl.col("turn").max().over(self._key))
        joined = joined.unique(subset=ORIGIN, keep="last", maintain_order=True).sort([*self._key, *SEEN])
        size, place = pl.len().cast(pl.Int64).over(self._key), pl.int_range(pl.len()).over(self._key)
        kept = 2 * self._spec.window_rows
        joined = joined.with_columns(place=place, size=size, cut=pl.col("cut").any().over(self._key))
        tails = joined.filter(pl.col("place") >= pl.col("size") - kept)
        tails = tails.with_columns(cut=pl.col("cut") | (pl.col("size") > kept), fresh=pl.lit(False)).drop("place", "size")
        self._rows = pl.concat([old.join(keys, on=self._key, how="anti"), tails]).rechunk()
        return joined

    def _behind_the_cut(self, old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
        """The readings that no cut tail begins after: between those and the tail readings are missing."""
        starts = old.filter("cut").group_by(self._key).agg(pl.col(name).first().alias(f"first_{name}") for name in SEEN)
        ordinal, row = (pl.col(name) - pl.col(f"first_{name}") for name in SEEN)
        found = new.join(starts, on=self._key, how="left", maintain_order="left")
        return found.filter(ordinal.is_null() | (ordinal > 0) | ((ordinal == 0) & (row >= 0))).select(new.columns)

    def _portions(self, touched: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Parts that `Windows` can hold: it forgets entities beyond its limit."""
        limit = entities_max(self._spec)
        touched = touched.with_columns(tail=pl.struct(self._key).rle_id())
        for start in range(0, int(touched["tail"].max() or 0) + 1, limit):  # type: ignore[arg-type]
            part = touched.filter(pl.col("tail").is_between(start, start + limit, closed="left"))
            if part.height:
                yield part

    def _newest(self, rows: pl.DataFrame) -> pa.Table:
        """The newest features of each tail that holds a fresh row."""
        first = pl.when(pl.col("fresh")).then(pl.col("place")).min().over("tail")
        whole = (~pl.col("cut")) | (pl.col("place") >= self._spec.window_rows - 1)
        known = pl.col(ARRIVED).rolling_max(self._spec.window_rows, min_samples=1).over("tail")
        rows = rows.with_columns(made=(pl.col("place") >= first).fill_null(False), whole=whole, known=known)
        made = rows.filter("made")
        features = self._features(rows.filter(~pl.col("made")), made)
        entity, time, names = self._contract.entity, self._contract.event_time, self._spec.names
        made = made.with_columns(pl.Series(name, values) for name, values in zip(names, features.T, strict=True))
        made = made.filter("whole", pl.col(time).to_physical().is_between(*TIMES_US))
        picked = newest(made, ["tail"], [time, "known"], names).sort("tail")
        columns = [picked[entity].to_arrow().cast(pa.string()), *(picked[name].to_arrow() for name in (time, "known", *names))]
        return pa.table(columns, schema=self._schema())

    def _features(self, before: pl.DataFrame, made: pl.DataFrame) -> Floats:
        windows = Windows(self._spec, self._functions)
        windows.warm(*self._columns_of(before))
        return windows.push(*self._columns_of(made)).features

    def _columns_of(self, rows: pl.DataFrame) -> tuple[Strings, np.ndarray, Table]:
        """What `Windows` takes: each tail is an entity of its own."""
        codes = rows["tail"].to_numpy().astype(np.int32)
        low = int(codes.min()) if len(codes) else 0
        names = tuple(str(i) for i in range(low, int(codes.max()) + 1)) if len(codes) else ()
        columns: Table = {name: rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in self.fields}
        return Strings(codes - low, names), rows[self._contract.event_time].to_physical().to_numpy(), columns

    def _forget(self) -> None:
        """Drop the devices longest unheard, if there are too many tails."""
        rows = self._rows
        if rows is None:
            return
        keys = rows.group_by("device", "epoch").agg(tails=pl.col(self._contract.entity).n_unique(), turn=pl.col("turn").max())
        if keys["tails"].sum() <= self._keys_max:
            return
        kept = keys.sort("turn", descending=True).filter(pl.col("tails").cum_sum() <= self._keys_max)
        self._rows = rows.join(kept, on=["device", "epoch"], how="semi")
        self.devices = set(kept.select("device", "epoch").iter_rows())

    def _schema(self) -> pa.Schema:
        time = pa.timestamp("us", "UTC")
        keys = [(self._contract.entity, pa.string()), (EVENT_TIME, time), (CREATED_TIME, time)]
        return pa.schema([*keys, *((name, pa.float64()) for name in self._spec.names)])
