"""The columns of many blocks, decoded at once: what `decode_columns` finds in each, the rows of one block after those of the other.

A block has a few hundred values in each of some thirty columns. Decoded by itself, its time goes into calls of NumPy; here the columns
that lie in the same form (kind, width, order, number of values) are one matrix, whichever block they are from: one call for all of them.

Blocks are stacked whose columns have the same names and types, in the same order (`Layout.shape`). What is damaged or in another form than
`encode_columns` writes today is refused with all that is stacked with it, without saying which it is: decode them one by one then.

>>> data = encode_columns({"t": np.array([21.5, 21.4, np.nan])}, 3)
>>> decode_stacked([read_layout(data, 3), read_layout(data, 3)])["t"].tolist()
[21.5, 21.4, nan, 21.5, 21.4, nan]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import SCALE_MAX, Ints, Strings, Table, check_size, encode_columns
from edge_agent.contract.errors import UNREADABLE, ContractError

__all__ = ["Layout", "decode_stacked", "encode_columns", "read_layout"]

VALUES_AT_ONCE = 65_536
"""Of one form; what a processor's cache holds is several times as fast."""

Matrix = npt.NDArray[np.int64]

_KINDS = frozenset("dirs")
_TYPES = str.maketrans("dr", "ff")
_INTEGER, _DECIMAL, _BITS = range(3)
_FORMS = np.zeros(128, np.int64)  # _INTEGER, but for these
_FORMS[[ord("d"), ord("r")]] = _DECIMAL, _BITS
_POWERS = 10.0 ** np.arange(SCALE_MAX + 1)
_decode_specs = msgspec.msgpack.Decoder(list[tuple[str, str, int, int, int, bool, tuple[str, ...]]]).decode


class Layout(NamedTuple):
    """How the columns of one block lie in `data`; each of the tuples has one item for each column, `kinds` a letter."""

    data: bytes
    rows: int
    start: int
    shape: tuple[tuple[str, ...], str]
    """The names, and the type of each: f float64, i int64, s text."""
    kinds: str
    scales: tuple[int, ...]
    orders: tuple[int, ...]
    widths: tuple[int, ...]
    missing: tuple[bool, ...]
    texts: tuple[tuple[str, ...], ...]


def read_layout(data: bytes, rows: int) -> Layout:
    """The layout of encoded columns of `rows` rows.

    Raises:
        ContractError: there is none, or it is not in today's form.
    """
    start = 4 + int.from_bytes(data[:4], "little")
    try:
        specs = _decode_specs(data[4:start])
    except UNREADABLE as e:
        raise ContractError(f"column headers: {e}") from e
    if not specs:
        raise ContractError("no columns")
    check_size(len(specs), rows)
    names, each, *rest = zip(*specs, strict=True)
    kinds = "".join(each)
    if len(kinds) != len(names) or not _KINDS.issuperset(kinds):
        raise ContractError(f"columns of kinds {each!r}")
    return Layout(data, rows, start, (names, kinds.translate(_TYPES)), kinds, *rest)


def decode_stacked(layouts: Sequence[Layout]) -> Table:
    """The columns of blocks of one shape, stacked.

    Raises:
        ContractError: at least one of the blocks does not decode, or not here.
    """
    stack = _Stack(layouts)
    total = int(stack.rows.sum())
    columns = np.empty((len(stack.names), total), np.int64)
    starts = np.cumsum(stack.rows) - stack.rows
    to = (np.arange(len(stack.names)) * total + starts[:, None]).ravel()
    for parts, values in stack.values():
        count = values.shape[1]
        if (gaps := [i for i, part in enumerate(parts.tolist()) if part in stack.absent]) and total:
            for i in gaps:
                block, column = divmod(int(parts[i]), len(stack.names))
                absent = stack.absent[int(parts[i])]
                cells = columns[column, starts[block] : starts[block] + len(absent)].view(np.float64)
                cells[absent], cells[~absent] = np.nan, values[i].view(np.float64)
            kept = np.setdiff1d(np.arange(len(parts)), gaps)
            parts, values = parts[kept], values[kept]
        if count and len(parts):
            # Row i of this view is the `count` cells from i on. The rows that are written do not overlap.
            np.ndarray((columns.size - count + 1, count), np.int64, columns, strides=(8, 8))[to[parts]] = values
    return {name: _column(stack, i, columns[i]) for i, name in enumerate(stack.names)}


class _Stack:
    """The parts of blocks: one for each block and column, numbered block by block."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        if any(layout.shape != layouts[0].shape for layout in layouts):
            raise ContractError("blocks of several shapes cannot be stacked")
        self.names, self.types = layouts[0].shape
        self.layouts = layouts
        self.rows = np.array([layout.rows for layout in layouts], np.int64)
        try:
            self._scale, self._order, self._width = (np.array([layout[i] for layout in layouts], np.int64) for i in (5, 6, 7))
        except OverflowError as e:
            raise ContractError(f"column headers: {e}") from e
        kinds = "".join([layout.kinds for layout in layouts]).encode()
        self._form = _FORMS[np.frombuffer(kinds, np.uint8)].reshape(len(layouts), len(self.names))
        for name, numbers, most in (("scale", self._scale, SCALE_MAX), ("order", self._order, 2), ("width", self._width, 8)):
            if numbers.size and not (numbers.min() >= 0 and numbers.max() <= most):
                raise ContractError(f"columns: a {name} is out of bounds")
        self._data = np.frombuffer(b"".join([layout.data for layout in layouts]), np.uint8)
        self.absent: dict[int, npt.NDArray[np.bool_]] = {}
        self._count = np.repeat(self.rows[:, None], len(self.names), axis=1)
        self._start = self._starts()

    def _starts(self) -> Matrix:
        """Where each part's words begin; notes the rows that it lacks, and checks that each block's last part ends with the block."""
        lengths = np.array([len(layout.data) for layout in self.layouts])
        first = np.cumsum(lengths) - lengths
        heads = np.array([layout.start for layout in self.layouts])
        masks = np.zeros_like(self._count)
        for block, layout in enumerate(self.layouts):
            for column in [i for i, missing in enumerate(layout.missing) if missing] if any(layout.missing) else ():
                if layout.kinds[column] != "d":
                    raise ContractError(f"column {self.names[column]!r}: only decimal columns have gaps")
                before = int((self._count[block, :column] * self._width[block, :column] + masks[block, :column]).sum())
                mask = layout.data[(start := layout.start + before) : (stop := start + (layout.rows + 7) // 8)]
                if stop > len(layout.data):
                    raise ContractError(f"column {self.names[column]!r} ends at byte {stop}, the block at {len(layout.data)}")
                absent = np.unpackbits(np.frombuffer(mask, np.uint8), count=layout.rows).astype(np.bool_)
                self.absent[block * len(self.names) + column] = absent
                self._count[block, column], masks[block, column] = layout.rows - int(absent.sum()), stop - start
        sizes = self._count * self._width + masks
        ends = np.cumsum(sizes, axis=1)
        if (heads + sizes.sum(axis=1) != lengths).any():
            raise ContractError("columns: a block is longer or shorter than its columns")
        starts: Matrix = (first + heads)[:, None] + ends - sizes + masks
        return starts

    def values(self) -> Iterator[tuple[Ints, Matrix]]:
        """Parts that have the same form, and their values, one row for each part; floats as their bits."""
        keys = ((((self._form * 3 + self._order) * 9) + self._width) << 32 | self._count).ravel()
        by_key = np.argsort(keys, kind="stable")
        found, ends = np.unique(keys[by_key], return_index=True)
        start, power = self._start.ravel(), _POWERS[self._scale].ravel()
        for key, parts in zip(found.tolist(), np.split(by_key, ends[1:]), strict=True):
            form, order, width, count = (key >> 32) // 27, (key >> 32) // 9 % 3, (key >> 32) % 9, key & 0xFFFF_FFFF
            step = max(1, VALUES_AT_ONCE // max(1, count))
            for some in (parts[i : i + step] for i in range(0, len(parts), step)):
                words = self._words(start[some], width, count)
                if form == _BITS:
                    yield some, words.astype(np.uint64).view(np.int64)
                    continue
                integers = ((words >> 1) ^ -(words & 1)).view(words.dtype.str.replace("u", "i"))  # zigzag
                for _ in range(order):
                    integers = np.cumsum(integers, axis=1, dtype=np.int64)
                yield some, (integers / power[some][:, None]).view(np.int64) if form == _DECIMAL else integers.astype(np.int64, copy=False)

    def _words(self, starts: Ints, width: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """The words of parts, from the planes of their bytes; as wide as they need to be."""
        size = next(size for size in (1, 2, 4, 8) if size >= width)
        if not width * count:
            return np.zeros((len(starts), count), f"<u{size}")
        taken = width * count
        planes = np.ndarray((len(self._data) - taken + 1, taken), np.uint8, self._data, strides=(1, 1))[starts]
        if width == 1:
            return planes
        cells = np.zeros((len(starts), count, size), np.uint8)
        for plane in range(width):
            cells[:, :, plane] = planes[:, plane * count : (plane + 1) * count]
        return cells.view(f"<u{size}")[:, :, 0]


def _column(stack: _Stack, column: int, cells: Ints) -> npt.NDArray[np.float64] | Ints | Strings:
    if stack.types[column] == "f":
        return cells.view(np.float64)
    return cells if stack.types[column] == "i" else _texts(stack, column, cells)


def _texts(stack: _Stack, column: int, codes: Ints) -> Strings:
    """The text column of all blocks with one dictionary."""
    texts = [layout.texts[column] for layout in stack.layouts]
    sizes = np.array([len(own) for own in texts])
    if len(codes) and not (codes.min() >= 0 and (codes < np.repeat(sizes, stack.rows)).all()):
        raise ContractError(f"column {stack.names[column]!r}: a code is outside its dictionary")
    index: dict[str, int] = {}
    shared = np.array([index.setdefault(text, len(index)) for own in texts for text in own], np.int32)
    return Strings(shared[codes + np.repeat(np.cumsum(sizes) - sizes, stack.rows)] if len(codes) else codes.astype(np.int32), tuple(index))
