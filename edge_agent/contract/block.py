"""Blocks: readings that are stored and sent together.

Layout, little endian: `b"FLB1"`, header length (u32), header (MessagePack map), zstd of the columns, CRC-32 of
all before it (u32). The header can be read without decompressing. (device, epoch, lane, sequence) names a
block for ever; with the row index it names a reading. A receiver ignores header fields that it does not know.

Two reserved columns go with the readings: `ordinal` counts the readings that this device stored in this stream since
`epoch`, across all lanes, so that sorting by it gives back the order in which the device saw and scored them; `score`
holds the model's output per reading (NaN: not scored) and is there only if a model was active. `latitude` and `longitude` (degrees, NaN:
not known) are there only if the agent's settings give the stream's places away.
"""

from __future__ import annotations

import re
import zlib
from enum import StrEnum

import msgspec
import zstandard

from edge_agent.contract.columns import Table, decode_columns, encode_columns
from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.contract.topics import check_lane, check_name

MAGIC = b"FLB1"
SCORE = "score"
ORDINAL = "ordinal"
LATITUDE, LONGITUDE = "latitude", "longitude"
ROWS_MAX = 65_536
HEADER_BYTES_MAX = 16 * 1024
BLOCK_BYTES_MAX = 8 * 1024 * 1024
RAW_BYTES_MAX = 64 * 1024 * 1024
_DRAWN = re.compile(r"[A-Za-z0-9-]{1,64}")
"""An epoch or a boot id: agents draw hex digits, Linux a UUID."""

NOWHERE = "nowhere"
"""The lane of readings whose zone is not known. No endpoint is allowed for it: they wait."""


class FixQuality(StrEnum):
    """How well the place of capture was known."""

    STATIC = "static"  # the gateway does not move
    FIX = "fix"  # a position fix, fresh and inside one zone
    UNCERTAIN = "uncertain"  # the fix may lie in each of several zones
    NONE = "none"  # no usable fix


class BlockHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a block is.

    Times are microseconds since 1970 UTC, `monotonic_us` since boot. `model` is the SHA-256 of the bundle that
    scored the block, `policy` that of the zones document it was stamped with. `units` names the contract's units (StreamContract.units);
    empty: not said, and then the sealed header lacks the key, as in every block from before there were units.
    """

    device: str
    epoch: str
    lane: str
    sequence: int
    stream: str
    contract_version: str
    rows: int
    first_us: int
    last_us: int
    fix: FixQuality
    policy: str
    boot: str
    monotonic_us: int
    sealed_us: int
    clock_synced: bool
    model: str | None = None
    units: str = ""
    format: int = 1

    @property
    def identity(self) -> tuple[str, str, str, int]:
        """The name of this block for ever: device, epoch, lane, sequence."""
        return self.device, self.epoch, self.lane, self.sequence


_encode = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(BlockHeader).decode


def encode_block(header: BlockHeader, table: Table, level: int = 3) -> bytes:
    """Seal a table of `header.rows` rows into a block.

    Raises:
        ContractError: the table does not fit the header, or a limit is passed.
    """
    _check(header)
    head = _encode_header(header)
    raw = encode_columns(table, header.rows)
    if len(raw) > RAW_BYTES_MAX:  # nobody could read it
        raise ContractError(f"block {header.identity}: {len(raw)} raw bytes; at most {RAW_BYTES_MAX}")
    body = zstandard.ZstdCompressor(level=level).compress(raw)
    block = b"".join([MAGIC, len(head).to_bytes(4, "little"), head, body])
    if len(block) + 4 > BLOCK_BYTES_MAX:
        raise ContractError(f"block of {len(block) + 4} bytes; at most {BLOCK_BYTES_MAX}")
    return block + zlib.crc32(block).to_bytes(4, "little")


def read_header(block: bytes) -> BlockHeader:
    """The header of a block whose CRC is right.

    Raises:
        ContractError: the bytes are not a whole block of format 1.
    """
    return _split(block)[0]


def peek_header(data: bytes) -> BlockHeader:
    """The header that `data`, the start of a block or a damaged one, seems to have: nothing proves that it is right.

    Raises:
        ContractError: there is no header to read.
    """
    end = 8 + int.from_bytes(data[4:8], "little")
    if data[:4] != MAGIC or not 8 < end <= min(len(data), 8 + HEADER_BYTES_MAX):
        raise ContractError(f"{len(data)} bytes starting {data[:4]!r} hold no block header")
    try:
        header = _decode_header(data[8:end])
    except UNREADABLE as e:
        raise ContractError(f"block header: {e}") from e
    _check(header)
    return header


def decode_block(block: bytes, only: str | None = None) -> tuple[BlockHeader, Table]:
    """Header and columns of a block; of the columns only the one that `only` names, if it is given.

    Raises:
        ContractError: the bytes are not a whole block of format 1.
    """
    header, packed = open_block(block)
    return header, decode_columns(unpack(header, packed), header.rows, only)


def open_block(block: bytes) -> tuple[BlockHeader, bytes]:
    """Header and packed columns of a block whose CRC is right.

    Raises:
        ContractError: the bytes are not a whole block of format 1.
    """
    header, start = _split(block)
    return header, block[start:-4]


def unpack(header: BlockHeader, packed: bytes, decompressor: zstandard.ZstdDecompressor | None = None) -> bytes:
    """The columns of a block, for `columns.decode_columns`. Who unpacks many does it with one decompressor, in one thread.

    Raises:
        ContractError: they do not decompress, or to more than RAW_BYTES_MAX.
    """
    try:
        size = zstandard.frame_content_size(packed)  # -1: not said
        if size > RAW_BYTES_MAX:  # zstd would prefer the frame's own word to the limit
            raise ContractError(f"block {header.identity}: {size} raw bytes; at most {RAW_BYTES_MAX}")
        return (decompressor or zstandard.ZstdDecompressor()).decompress(packed, max_output_size=RAW_BYTES_MAX)
    except zstandard.ZstdError as e:
        raise ContractError(f"block {header.identity}: columns do not decompress: {e}") from e


def _encode_header(header: BlockHeader) -> bytes:
    if header.units:
        return _encode(header)
    fields = msgspec.structs.asdict(header)
    del fields["units"]
    return _encode(fields)


def _split(block: bytes) -> tuple[BlockHeader, int]:
    if not 12 <= len(block) <= BLOCK_BYTES_MAX or block[:4] != MAGIC:
        raise ContractError(f"{len(block)} bytes starting {block[:4]!r} are not a block (want {MAGIC!r}, 12 to {BLOCK_BYTES_MAX} bytes)")
    if zlib.crc32(block[:-4]) != int.from_bytes(block[-4:], "little"):
        raise ContractError(f"block of {len(block)} bytes: CRC does not match, the bytes are damaged")
    start = 8 + int.from_bytes(block[4:8], "little")
    if start > min(len(block) - 4, 8 + HEADER_BYTES_MAX):
        raise ContractError(f"block header of {start - 8} bytes; at most {HEADER_BYTES_MAX}, inside the block")
    try:
        header = _decode_header(block[8:start])
    except UNREADABLE as e:
        raise ContractError(f"block header: {e}") from e
    _check(header)
    return header, start


def _check(header: BlockHeader) -> None:
    check_name(header.device, "device")
    check_lane(header.lane)
    check_name(header.stream, "stream")
    for what, name in (("epoch", header.epoch), ("boot", header.boot)):
        if not _DRAWN.fullmatch(name):
            raise ContractError(f"{what} {name[:100]!r} must match {_DRAWN.pattern}")
    if header.format != 1:
        raise ContractError(f"block format {header.format}; this version reads format 1")
    if not 1 <= header.rows <= ROWS_MAX:
        raise ContractError(f"block of {header.rows} rows; 1 to {ROWS_MAX} allowed")
    if header.sequence < 1:
        raise ContractError(f"block sequence {header.sequence}; they start at 1")
