"""Starts a program that ends when its parent ends: `python tether.py PARENT_PID PROGRAM ARGUMENT…`.

The kernel sends SIGTERM to the program when the parent dies, also by SIGKILL. Ctrl-C does not reach it: the parent stops its
children in order. A program of its own, because code between fork and exec in a process with threads may deadlock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tethered(command: list[str]) -> list[str]:
    """The command that runs `command` tied to this process; start it from a thread that lives as long as it shall."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    parent = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before prctl took effect
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])
