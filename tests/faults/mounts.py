"""File systems that a test makes and breaks: loop-mounted ext4 and XFS, tmpfs. All need root.

A loop disk is mounted where only this process and its children see it. Otherwise every mount namespace that others make meanwhile
(each `ip netns exec` makes one) holds a copy: unmounting then ends nothing, and what the kernel still had to write for the
file system before the cut lands, seconds later, in the one after it. A first sign of it were buffers that lost a page.

with LoopDisk(tmp_path, "ext4") as disk:
    ...                 # work in disk.path
    disk.power_cut()    # nothing that was not on the platter is there any more
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import SYSTEM_PATH

_FS_IOC_SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
_NO_LOG_FLUSH = 2
_FIBMAP, _FIGETBSZ = 1, 2
_CLONE_NEWNS = 0x00020000
PATIENCE_S = 30.0
SIZES_MB = {"ext4": 64, "xfs": 320}  # XFS makes none below 300
_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}


class LoopDisk:
    """A file system of its own in an image file. Skips the test where the kernel or the tools do not have it."""

    def __init__(self, folder: Path, kind: str, options: str = "", name: str = "disk") -> None:
        self.path = folder / name
        self._image = folder / f"{kind}.img"
        self._kind, self._options = kind, options
        self._loops: list[str] = []

    def __enter__(self) -> LoopDisk:
        make = _MAKE[self._kind]
        if not shutil.which(make[0], path=SYSTEM_PATH):
            pytest.skip(f"needs {make[0]}: make system-deps")
        if not _kernel_has(self._kind):
            pytest.skip(f"this kernel has no {self._kind}: neither built in nor as a module")
        _enter_own_namespace()
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(SIZES_MB[self._kind] << 20)
        _run(*make, str(self._image))
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True)
        for loop in self._loops:
            subprocess.run(["losetup", "-d", loop], check=False, capture_output=True)

    def mount(self) -> None:
        """Mount it, on a loop device of its own, as after a start of the machine."""
        loop = _run("losetup", "--find", "--show", str(self._image))
        self._loops.append(loop)
        options = ["-o", self._options] if self._options else []
        _patiently("mount", "-t", self._kind, *options, loop, str(self.path))

    def power_cut(self) -> None:
        """Cut the power and start the machine again. Freeze who writes first: it would see errors, which no power cut shows."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """Mount it again; nothing may use it any more."""
        _run("umount", str(self.path))
        _run("losetup", "-d", self._loops.pop())
        assert not _run("losetup", "-j", str(self._image)), f"{self._image} is still in use: somebody else holds its mount"
        self.mount()

    def lose_half(self, file: Path) -> None:
        """From the middle of a file on, the disk gives nothing back (EIO), as with bad sectors."""
        with file.open("rb") as opened:
            (size,) = struct.unpack("I", fcntl.ioctl(opened, _FIGETBSZ, struct.pack("I", 0)))
            middle = file.stat().st_size // size // 2
            (block,) = struct.unpack("I", fcntl.ioctl(opened, _FIBMAP, struct.pack("I", middle)))
        self.restart()  # nothing of it is in memory any more
        os.truncate(self._image, block * size)

    def turn_read_only(self) -> None:
        """What ext4 does at an error in its own structures (mount with errors=remount-ro)."""
        Path(f"/sys/fs/ext4/{Path(self._loops[-1]).name}/trigger_fs_error").write_text("1")

    def replace(self) -> None:
        """Mount it afresh over one that is still in use, as an operator does after such an error."""
        _run("umount", "-l", str(self.path))
        self.mount()


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A small file system in memory: a disk that is soon full."""
    path.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


@functools.cache
def _enter_own_namespace() -> None:
    """Let the mounts of this thread, and of the processes that it starts, be seen by nobody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS) == 0, f"unshare: {os.strerror(ctypes.get_errno())}"
    _run("mount", "--make-rprivate", "/")


def _kernel_has(kind: str) -> bool:
    if kind in Path("/proc/filesystems").read_text().split():
        return True
    return bool(shutil.which("modprobe", path=SYSTEM_PATH)) and not subprocess.run(["modprobe", kind], capture_output=True).returncode


def _patiently(*command: str) -> None:
    """Run a mount; XFS refuses while one of the same file system is about to go."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            _run(*command)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": SYSTEM_PATH})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()
