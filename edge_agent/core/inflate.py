"""Bounded decompression of payloads.

- A payload gives at most `limit` bytes, whatever its own header says: one that holds more is refused, not unpacked.
- The payloads of one batch give at most BATCH_BYTES_MAX together, or RATIO_MAX times their own bytes where that is more: a batch full of
  zip bombs is refused piece by piece, and one of many large readings is not.
- Exactly one stream, whole and with nothing behind it: what is cut off or followed by other bytes is malformed.
"""

from __future__ import annotations

import zlib

import zstandard

from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.contract.stream import Compression

BATCH_BYTES_MAX = 32 * 1024 * 1024
RATIO_MAX = 32  # JSON of sensors is packed to a fifth or a twentieth
WINDOW_BYTES_MAX = 8 * 1024 * 1024  # of zstd: what a frame may ask for before it gives anything

_WINDOW_BITS = {Compression.GZIP: 31, Compression.ZLIB: 15}


class Inflater:
    """Decompresses the payloads of one stream; call `begin` before each batch."""

    def __init__(self, compression: Compression, limit: int) -> None:
        self._compression, self._limit = compression, limit
        self._zstd = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
        self._left = self._batch_limit = BATCH_BYTES_MAX

    def begin(self, packed_bytes: int) -> None:
        """A new batch: `packed_bytes` are those of its payloads as they came."""
        self._left = self._batch_limit = max(BATCH_BYTES_MAX, RATIO_MAX * packed_bytes)

    def inflate(self, payload: bytes) -> bytes:
        """The bytes of one payload.

        Raises:
            PayloadError: they are too many, or the payload is not compressed as the contract says.
        """
        limit = min(self._limit, self._left)
        out = self._zstd_bytes(payload, limit) if self._compression is Compression.ZSTD else self._zlib_bytes(payload, limit)
        self._left -= len(out)
        return out

    def again(self, payload: bytes) -> bytes:
        """The bytes of a payload that was inflated before; they count only once."""
        left, self._left = self._left, self._limit
        try:
            return self.inflate(payload)
        finally:
            self._left = left

    def _zlib_bytes(self, payload: bytes, limit: int) -> bytes:
        machine = zlib.decompressobj(_WINDOW_BITS[self._compression])
        try:
            out = machine.decompress(payload, limit + 1)
        except zlib.error as e:
            raise self._malformed(str(e)) from e
        if len(out) > limit:
            raise self._oversize()
        if not machine.eof or machine.unused_data:
            raise self._malformed("bytes behind its end" if machine.eof else "it is cut off")
        return out

    def _zstd_bytes(self, payload: bytes, limit: int) -> bytes:
        try:
            if len(self._zstd.stream_reader(payload).read(limit + 1)) > limit:
                raise self._oversize()
            machine = self._zstd.decompressobj()  # has no limit, but now we know how much comes
            out = machine.decompress(payload)
        except zstandard.ZstdError as e:
            raise self._malformed(str(e)) from e
        if not machine.eof or machine.unused_data:
            raise self._malformed("bytes behind its end" if machine.eof else "it is cut off")
        return out

    def _oversize(self) -> PayloadError:
        if self._left < self._limit:
            return PayloadError(Reason.OVERSIZE, f"payloads of one batch decompress to more than {self._batch_limit} bytes")
        return PayloadError(Reason.OVERSIZE, f"payload decompresses to more than {self._limit} bytes")

    def _malformed(self, why: str) -> PayloadError:
        return PayloadError(Reason.MALFORMED, f"not {self._compression}: {why}")
