"""Memory that the C library keeps when it is freed: given back to the system now and then.

glibc's malloc gives back what lies free at the end of a heap only, and of that only what exceeds a limit which it raises by itself, to
twice the largest piece that was ever freed (megabytes here); and every thread has a heap of its own. So after each fault that lets
readings pile up (a broker that is away, and sends all at once) the agent stays as large as it ever was, one heap after the other, and
looks as if it leaked.

- `malloc_trim` gives back every page that holds nothing, wherever it lies; but of a thread's heap not what lies free at its end. That
  takes 0.3 ms of processor time after a burst and 0.04 ms otherwise, while limits that let `free` itself give back cost something at
  every batch.
- So all threads share one heap. Its lock costs nothing that can be measured: Python's threads take turns anyway.
"""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8  # malloc.h


class Heap:
    """The heap of this process, for threads that begin after this. With another C library than glibc (musl gives back by itself) it
    does nothing.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._trim = getattr(libc, "malloc_trim", None)
        if self._trim is not None:
            libc.mallopt(M_ARENA_MAX, 1)

    def give_back(self) -> None:
        """Let the system have the pages that hold nothing; other threads go on, unless they allocate just then."""
        if self._trim is not None:
            self._trim(0)
