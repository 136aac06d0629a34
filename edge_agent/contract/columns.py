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
    specs: list[_Spec] = []
    chunks: list[bytes] = []
    for name, column in table.items():
        if len(column) != rows:
            raise ContractError(f"column {name!r} has {len(column)} rows, the block has {rows}")
        spec, data = _encode_column(name, column)
        specs.append(spec)
        chunks.extend(data)
    head = _encode_specs(specs)
    return b"".join([len(head).to_bytes(4, "little"), head, *chunks])


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


def _encode_column(name: str, column: Column) -> tuple[_Spec, list[bytes]]:
    if isinstance(column, Strings):
        used = np.zeros(len(column.values), np.int64)
        used[column.codes] = 1
        spec = _Spec(name, "s", values=[column.values[c] for c in np.flatnonzero(used).tolist()])
        return spec, [_pack((used.cumsum() - 1)[column.codes], spec)]
    if column.dtype == np.int64:
        spec = _Spec(name, "i")
        return spec, [_pack(column, spec)]  # type: ignore[arg-type]
    return _encode_floats(name, np.ascontiguousarray(column, np.float64))


def _encode_floats(name: str, values: Floats) -> tuple[_Spec, list[bytes]]:
    bits = values.view(np.int64)
    absent = bits == _NAN_BITS
    missing = bool(absent.any())
    present = values[~absent] if missing else values
    scaled = _as_decimal(present)
    if scaled is None:
        spec = _Spec(name, "r", width=8)
        return spec, [_shuffle(bits.view(np.uint64), 8)]
    integers, scale = scaled
    spec = _Spec(name, "d", scale=scale, missing=missing)
    mask = [np.packbits(absent).tobytes()] if missing else []
    return spec, [*mask, _pack(integers, spec)]


def _as_decimal(values: Floats) -> tuple[Ints, int] | None:
    """Integers k and a scale such that k / 10**scale equals `values` in every bit, or None."""
    if not len(values):
        return np.zeros(0, np.int64), 0
    if not np.abs(values).max() < _EXACT_MAX:  # so it is for NaN too
        return None
    step = max(1, len(values) // 16)
    sample = values[::step]
    for scale in range(SCALE_MAX + 1):
        if (step == 1 or _decimal(sample, scale) is not None) and (integers := _decimal(values, scale)) is not None:
            return integers, scale
    return None


def _decimal(values: Floats, scale: int) -> Ints | None:
    power = 10.0**scale
    scaled = np.rint(values * power)
    if np.abs(scaled).max() >= _EXACT_MAX:
        return None
    integers = scaled.astype(np.int64)
    # Comparing bits keeps -0.0 apart from 0.0.
    same = (integers / power).view(np.int64) == values.view(np.int64)
    return integers if same.all() else None


def _pack(integers: Ints, spec: _Spec) -> bytes:
    """Difference, zigzag and shuffle; notes order and width in `spec`. Differences wrap, so nothing is lost."""
    candidates = [integers, first := _differences(integers), _differences(first)]
    spec.order = int(np.argmin([np.abs(c.astype(np.float64)).sum() for c in candidates]))
    chosen = candidates[spec.order]
    zigzag = ((chosen << 1) ^ (chosen >> 63)).view(np.uint64)
    top = int(zigzag.max()) if len(zigzag) else 0
    spec.width = (top.bit_length() + 7) // 8
    return _shuffle(zigzag, spec.width)


def _differences(integers: Ints) -> Ints:
    """Each less the one before it, the first less 0 (what `np.diff` with `prepend` takes much longer for)."""
    differences = integers.copy()
    differences[1:] -= integers[:-1]
    return differences


def _shuffle(words: npt.NDArray[np.uint64], width: int) -> bytes:
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


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
