"""The clock: wall time, time since boot, and whether the kernel holds wall time to be synchronised."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

_ADJTIMEX_ERROR = 5  # TIME_ERROR: the clock is not synchronised
_TIMEX_BYTES = 208


@dataclass(frozen=True)
class Moment:
    """Now, in microseconds: since 1970 UTC as far as the device knows, and since boot."""

    wall_us: int
    monotonic_us: int
    synced: bool


class Clock:
    """`boot` is the kernel's random id of this boot: monotonic times compare only within one boot."""

    def __init__(self) -> None:
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def now(self) -> Moment:
        state = self._libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return Moment(time.time_ns() // 1_000, time.monotonic_ns() // 1_000, state not in (-1, _ADJTIMEX_ERROR))
