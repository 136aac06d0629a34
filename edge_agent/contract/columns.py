"""Columns of readings and their lossless, compact byte form.

A table is a dict of equally long columns. A column is

- float64, NaN meaning "missing", - int64 (integers; timestamps as microseconds since 1970 UTC),
- or `Strings`, dictionary-encoded text.

Sensor values are decimal numbers with few digits, slowly changing. So a float column whose values are all
exactly `k / 10**scale` is stored as the integers k; integers are stored as differences (of order 0, 1 or 2,
whichever is smallest), zigzagged, and their bytes shuffled into planes, of which only those in use are kept.
A float column that is not decimal keeps its float64 bits. zstd then works on the planes of all columns at once.
The byte shuffle follows Blosc, the decimal scaling ALP (Afroozeh et al., 2023), both in their simplest form.

>>> table = {"t": np.array([21.5, 21.4, np.nan])}
>>> decode_columns(encode_columns(table, 3), 3)["t"].tolist()
[21.5, 21.4, nan]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.contract.stream import FIELDS_MAX

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Strings:
    """Text column: row i holds `values[codes[i]]`."""

    codes: npt.NDArray[np.int32]
    values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Strings:
        return Strings(self.codes[rows], self.values)

    def tolist(self) -> list[str]:
        return [self.values[c] for c in self.codes.tolist()]

    @classmethod
    def of(cls, texts: list[str]) -> Strings:
        """Dictionary-encode `texts`; the dictionary is in order of first appearance."""
        values = tuple(dict.fromkeys(texts))
        index = dict(zip(values, range(len(values)), strict=True))
        return cls(np.fromiter(map(index.__getitem__, texts), np.int32, len(texts)), values)


Column = Floats | Ints | Strings
Table = dict[str, Column]

SCALE_MAX = 9
CELLS_MAX = 8 * 1024 * 1024  # of a table: a column of zeros takes no bytes, but memory when it is decoded
CELLS_AT_ONCE = 16 * 1024  # of a matrix that is encoded at once: more do not fit a processor's cache
_EXACT_MAX = float(2**53)
_NAN_BITS = np.array([np.nan]).view(np.int64)[0]


class _Spec(msgspec.Struct, array_like=True):
    """How one column lies in the bytes. kind: d decimal, i integer, r raw float64, s strings."""

    name: str
    kind: str
    scale: int = 0
    order: int = 0
    width: int = 0
    missing: bool = False
    values: list[str] = []


_encode_specs = msgspec.msgpack.Encoder().encode
_decode_specs = msgspec.msgpack.Decoder(list[_Spec]).decode


def take(table: Table, rows: Any) -> Table:
    """The rows of `table` picked by an index array, mask or slice."""
    return {name: column[rows] for name, column in table.items()}


def concat(tables: list[Table]) -> Table:
    """Stack tables that have the same columns."""
    if len(tables) == 1:
        return tables[0]
    return {name: _concat_column([t[name] for t in tables]) for name in tables[0]}


def _concat_column(parts: list[Column]) -> Column:
    if isinstance(parts[0], Strings):
        return Strings.of([text for part in parts for text in part.tolist()])
    return np.concatenate(parts)  # type: ignore[arg-type]


def check_size(columns: int, rows: int) -> None:
    """ContractError: a table of so many columns and rows does not fit a block."""
    if columns > FIELDS_MAX + 8 or columns * rows > CELLS_MAX:
        raise ContractError(f"{columns} columns of {rows} rows; at most {FIELDS_MAX + 8} columns and {CELLS_MAX} cells fit a block")


def encode_columns(table: Table, rows: int) -> bytes:
    """Encode a table of `rows` rows (not yet compressed).

    Raises:
        ContractError: a column has another length, or there are more of them or of cells than fit a block.
    """
    check_size(len(table), rows)
    for name, column in table.items():
        if len(column) != rows:
            raise ContractError(f"column {name!r} has {len(column)} rows, the block has {rows}")
    names, step = list(table), max(1, CELLS_AT_ONCE // max(1, rows))
    made = [one for at in range(0, len(names), step) for one in _encode_together({n: table[n] for n in names[at : at + step]}, rows)]
    head = _encode_specs([spec for spec, _ in made])
    return b"".join([len(head).to_bytes(4, "little"), head, *(data for _, all_data in made for data in all_data)])


def decode_columns(data: bytes, rows: int, only: str | None = None) -> Table:
    """The inverse of `encode_columns`, bit for bit; of one column alone if `only` names it, which is several times as fast.

    Raises:
        ContractError: the bytes are not an encoded table of `rows` rows.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    try:
        specs = _decode_specs(data[4:end])
    except UNREADABLE as e:
        raise ContractError(f"column headers: {e}") from e
    check_size(len(specs), rows)
    parts: list[_Part] = []
    for spec in specs:
        parts.append(_part(spec, data, end, rows))
        end = parts[-1].stop
    if end != len(data):
        raise ContractError(f"{len(data) - end} bytes too many after the last column")
    return _decode_parts([part for part in parts if only in (None, part.spec.name)], data, rows)


def _encode_together(table: Table, rows: int) -> Iterable[tuple[_Spec, list[bytes]]]:
    """Columns of equal length as rows of one matrix: a block may have few rows, and NumPy's time then goes into calls."""
    made: dict[str, tuple[_Spec, list[bytes]]] = {name: (_Spec(name, "d"), []) for name in table}
    floats: dict[str, Any] = {}
    integers: defaultdict[int, list[tuple[str, Ints]]] = defaultdict(list)  # by length: values that are missing are left out
    for name, column in table.items():
        spec, _ = made[name]
        if isinstance(column, Strings):
            spec.kind = "s"
            spec.values, codes = _used(column)
            integers[rows].append((name, codes))
        elif column.dtype == np.int64:
            spec.kind = "i"
            integers[rows].append((name, column.astype(np.int64, copy=False)))
        else:
            floats[name] = column
    for name, absent, bits, decimal in _floats_as_integers(floats):
        spec, data = made[name]
        if decimal is None:
            spec.kind, spec.width = "r", 8
            data.append(_shuffle(bits.view(np.uint64), 8))
            continue
        spec.scale, spec.missing = decimal[1], absent is not None
        if absent is not None:
            data.append(np.packbits(absent).tobytes())
        integers[len(decimal[0])].append((name, decimal[0]))
    for alike in integers.values():
        _pack([made[name] for name, _ in alike], [column for _, column in alike])
    return made.values()


def _used(column: Strings) -> tuple[list[str], Ints]:
    """The values that a column has, and its codes among them."""
    used = np.zeros(len(column.values), np.int64)
    used[column.codes] = 1
    return [column.values[c] for c in np.flatnonzero(used).tolist()], (used.cumsum() - 1)[column.codes]


def _floats_as_integers(floats: dict[str, Any]) -> Iterator[tuple[str, npt.NDArray[np.bool_] | None, Ints, tuple[Ints, int] | None]]:
    """Of each column: its name, where it has no value (None: nowhere), its bits, and what it has as integers and their scale, if it can."""
    if not floats:
        return
    columns = np.stack(list(floats.values())).astype(np.float64, copy=False)
    bits = columns.view(np.int64)
    absent = bits == _NAN_BITS
    alike: defaultdict[int, list[int]] = defaultdict(list)
    for i, gone in enumerate(np.count_nonzero(absent, axis=1).tolist()):
        alike[gone].append(i)
    names = list(floats)
    for gone, of in alike.items():
        present = np.stack([columns[i][~absent[i]] for i in of]) if gone else _rows(columns, of)
        for i, decimal in zip(of, _as_decimals(present), strict=True):
            yield names[i], absent[i] if gone else None, bits[i], decimal


def _rows(values: Floats, rows: Sequence[int] | Ints) -> Floats:
    """These rows of `values`, which are not copied if they are all of them."""
    return values if len(rows) == len(values) else values[rows]


def _as_decimals(values: Floats) -> list[tuple[Ints, int] | None]:
    """For each row of `values`: integers k and a scale such that k / 10**scale equals it in every bit, if there are any."""
    found: list[tuple[Ints, int] | None] = [None] * len(values)
    wanted = np.abs(values).max(axis=1, initial=0.0) < _EXACT_MAX  # not of NaN
    step = max(1, values.shape[1] // 16)
    for scale in range(SCALE_MAX + 1):
        left = np.flatnonzero(wanted)
        if not len(left):
            break
        if step > 1:  # a sample tells most
            left = left[_decimals(_rows(values, left)[:, ::step], scale)[1]]
        integers, exact = _decimals(_rows(values, left), scale)
        for i, row in zip(left[exact].tolist(), np.flatnonzero(exact).tolist(), strict=True):
            found[i] = integers[row], scale
        wanted[left[exact]] = False
    return found


def _decimals(values: Floats, scale: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Each row of `values` as integers of this scale, and which rows they equal."""
    power = 10.0**scale
    scaled = np.rint(values * power)
    fits = np.abs(scaled).max(axis=1, initial=0.0) < _EXACT_MAX
    if not fits.all():
        scaled[~fits] = 0.0
    integers = scaled.astype(np.int64)
    # Comparing bits keeps -0.0 apart from 0.0.
    same = (integers / power).view(np.int64) == values.view(np.int64)
    return integers, fits & same.all(axis=1)


def _pack(made: list[tuple[_Spec, list[bytes]]], columns: list[Ints]) -> None:
    """Difference, zigzag and shuffle each column; its order and width are noted. Differences wrap, so nothing is lost."""
    orders = np.empty((3, len(columns), len(columns[0])), np.int64)
    for row, column in zip(orders[0], columns, strict=True):
        row[:] = column
    for less, more in ((orders[0], orders[1]), (orders[1], orders[2])):
        more[:, :1] = less[:, :1]
        np.subtract(less[:, 1:], less[:, :-1], out=more[:, 1:])
    best = np.abs(orders.astype(np.float64)).sum(axis=2).argmin(axis=0)
    chosen = orders[best, np.arange(len(columns))]
    zigzag = ((chosen << 1) ^ (chosen >> 63)).view(np.uint64)
    tops = zigzag.max(axis=1, initial=0)
    for (spec, data), row, order, top in zip(made, zigzag, best.tolist(), tops.tolist(), strict=True):
        spec.order, spec.width = order, (top.bit_length() + 7) // 8
        data.append(_shuffle(row, spec.width))


def _shuffle(words: npt.NDArray[np.uint64], width: int) -> bytes:
    return words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


class _Part(NamedTuple):
    """Where a column's words lie in the bytes: `present` of them, fewer than there are rows if some are `absent`."""

    spec: _Spec
    start: int
    stop: int
    present: int
    absent: npt.NDArray[np.bool_] | None


def _part(spec: _Spec, data: bytes, start: int, rows: int) -> _Part:
    if spec.kind not in ("d", "i", "r", "s"):
        raise ContractError(f"column {spec.name!r}: unknown kind {spec.kind!r}")
    if not (0 <= spec.width <= 8 and 0 <= spec.scale <= SCALE_MAX and 0 <= spec.order <= 2):
        raise ContractError(f"column {spec.name!r}: width {spec.width}, scale {spec.scale} or order {spec.order} is out of bounds")
    if spec.missing and spec.kind != "d":
        raise ContractError(f"column {spec.name!r}: only decimal columns have gaps, this one is of kind {spec.kind!r}")
    absent: npt.NDArray[np.bool_] | None = None
    count = rows
    if spec.missing:
        stop = start + (rows + 7) // 8
        absent = np.unpackbits(np.frombuffer(_slice(data, start, stop, spec), np.uint8), count=rows).astype(np.bool_)
        count, start = rows - int(absent.sum()), stop
    stop = start + count * spec.width
    if stop > len(data):
        raise _cut_short(spec, stop, data)
    return _Part(spec, start, stop, count, absent)


def _decode_parts(parts: list[_Part], data: bytes, rows: int) -> Table:
    """All columns together, as rows of one matrix: a block has few rows, and NumPy's time goes into calls."""
    planes = np.frombuffer(data, np.uint8)
    cells = np.zeros((len(parts), rows, 8), np.uint8)
    for cell, (spec, start, stop, count, _) in zip(cells, parts, strict=True):
        if spec.width:
            cell[:count, : spec.width] = planes[start:stop].reshape(spec.width, count).T
    words = cells.view("<u8")[:, :, 0]
    integers = (words >> np.uint64(1)).view(np.int64)
    integers ^= -(words & np.uint64(1)).view(np.int64)
    for order in (1, 2):
        if chosen := [i for i, part in enumerate(parts) if part.spec.order >= order]:
            integers[chosen] = np.cumsum(integers[chosen], axis=1, dtype=np.int64)
    decimals = integers / np.array([10.0**part.spec.scale for part in parts])[:, None]
    return {part.spec.name: _column(part, words[i], integers[i], decimals[i], rows) for i, part in enumerate(parts)}


def _column(part: _Part, words: npt.NDArray[np.uint64], integers: Ints, decimals: Floats, rows: int) -> Column:
    spec, absent = part.spec, part.absent
    if spec.kind == "r":
        return words.view(np.float64)
    if spec.kind == "i":
        return integers
    if spec.kind == "s":
        if rows and not (integers.min() >= 0 and integers.max() < len(spec.values)):
            raise ContractError(f"column {spec.name!r}: a code is outside its dictionary")
        return Strings(integers.astype(np.int32), tuple(spec.values))
    if absent is None:
        return decimals
    column = np.full(rows, np.nan)
    column[~absent] = decimals[: part.present]
    return column


def _slice(data: bytes, start: int, stop: int, spec: _Spec) -> bytes:
    if stop > len(data):
        raise _cut_short(spec, stop, data)
    return data[start:stop]


def _cut_short(spec: _Spec, stop: int, data: bytes) -> ContractError:
    return ContractError(f"column {spec.name!r} ends at byte {stop}, the block at {len(data)}")
