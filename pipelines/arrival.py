"""When the features of a reading were known: at the latest arrival among the readings that its window may hold.

A reading that arrives late changes the windows behind it. These are news then, though their own readings are not: a training set must not
know them before, and who takes only what is new must not miss them.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

ARRIVED = "arrived_at"


class Known:
    """Follows the readings of devices, in the order seen, and keeps the last arrivals of each entity."""

    def __init__(self, entity: str, window_rows: int) -> None:
        self._key, self._window_rows = ["device", "epoch", entity], window_rows
        self._tails: pl.DataFrame | None = None

    def into(self, rows: pa.Table) -> pa.Table:
        """The rows, with the time at which their features were known in the place of their arrival."""
        new = pl.DataFrame(rows.select([*self._key, ARRIVED])).with_columns(pl.col(self._key).cast(pl.String), new=pl.lit(True))
        old = new.clear() if self._tails is None else self._tails
        both = pl.concat([old, new])
        known = pl.col(ARRIVED).rolling_max(self._window_rows, min_samples=1).over(self._key)
        times = both.select(known, "new").filter("new")[ARRIVED].to_arrow()
        self._tails = both.group_by(self._key, maintain_order=True).tail(max(1, self._window_rows - 1)).with_columns(new=pl.lit(False))
        return rows.set_column(rows.column_names.index(ARRIVED), ARRIVED, times)
