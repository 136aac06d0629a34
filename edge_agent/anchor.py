"""The last believed position, kept in memory that outlives the agent but not the device's boot.

- After a restart of the agent, positions are held against it: a jump that was impossible before is impossible still. The disk must not
  hold it (a stream may be `zone-only`), so it lies in RUNTIME_DIRECTORY (systemd) or /dev/shm, both in memory, readable by this user only.
- Without such a place it is not kept, and the first position after a restart is believed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE
from edge_agent.core.fix import Position

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class Anchor:
    """The place in memory for the agent of `device` with this state directory."""

    def __init__(self, device: str, state_dir: Path) -> None:
        runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        folder = Path(runtime) if runtime else SHARED_MEMORY
        name = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:16]
        self._path = folder / f"fenceline-{device}-{name}.position" if folder.is_dir() else None
        self._written: Position | None = None

    def read(self) -> Position | None:
        """The position that the last agent of this boot believed, if there was one."""
        if self._path is None:
            return None
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for a writer
        except OSError:
            return None
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
                log.warning("remembered position refused path=%s owner=%s", self._path, status.st_uid)
                return None
            try:
                return msgspec.json.decode(file.read(4_096), type=Position)
            except UNREADABLE as e:
                log.warning("remembered position unreadable path=%s error=%s", self._path, e)
                return None

    def write(self, position: Position | None) -> None:
        """Remember this one, if it is new."""
        if self._path is None or position is None or position == self._written:
            return
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(msgspec.json.encode(position))
            part.replace(self._path)
        except OSError as e:  # no memory, or somebody else's file: only the check after a restart is lost
            log.warning("position not remembered path=%s error=%s", self._path, e)
            self._path = None
        self._written = position
