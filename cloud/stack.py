"""The development stack: brokers, ingests, release server, MLflow and API as supervised children of one process.

- All are in one process group and bound to loopback. They end with their parent, however it ends (`cloud.tether`).
- A part that dies is started again, after a wait that doubles each time, and counted. One that was killed on purpose stays down.
- `<state>/stack.json` says where everything listens, while it runs. One stack per state directory (a lock file).
- Children are started by one thread that lives as long as the stack, because the kernel ties a child to the thread that made it.

    with Stack(settings) as stack:
        stack.wait_ready()
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from cloud import brokers
from cloud.api import token
from cloud.config import Settings, start_ticks
from cloud.fleet import Fleet
from cloud.gate import load_contracts
from cloud.parts import Part, broker_part, check_ports, environment, parts
from cloud.tether import tethered
from edge_agent.contract.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

READY_S_MAX = 180.0
POLL_S = 0.1
BACKOFF_S = (0.2, 10.0)
STEADY_S = 30.0  # a part that ran this long starts with the first backoff again
TERM_S_MAX = 8.0
LOG_BYTES_MAX = 16 * 1024 * 1024


@dataclass
class _Child:
    """A part and its process. `held`: down on purpose."""

    part: Part
    process: subprocess.Popen[bytes] | None = None
    held: bool = False
    ready: bool = False
    restarts: int = 0
    backoff_s: float = BACKOFF_S[0]
    started: float = 0.0
    due: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Stack:
    """A stack with these settings. `start`, `wait_ready` and `stop` belong to one thread; the rest may be called from any."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._children = {part.name: _Child(part) for part in parts(settings)}
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="stack")
        self._lock_file: int | None = None
        self._started_s = 0.0
        self._told = True  # stack.json says how it is
        self._failed = False

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Write all configuration and start the children; does not wait for them.

        Raises:
            ConfigError: a port is taken, another stack runs on this state directory, a program is missing, or contracts do not read.
        """
        settings = self.settings
        for directory in (settings.state_dir, settings.run_dir, settings.logs_dir, settings.mlflow_dir, settings.releases_dir):
            directory.mkdir(parents=True, exist_ok=True)
        settings.state_dir.chmod(0o700)
        self._take_lock()
        check_ports(settings)
        load_contracts(settings)  # each ingest would end over it, and be started again, for ever
        brokers.write_configs(settings, Fleet(settings.fleet_db).passwords)
        token(settings)
        self._started_s = time.time()
        self._write_stack_file()
        self._thread.start()

    def wait_ready(self, names: list[str] | None = None, timeout_s: float = READY_S_MAX) -> None:
        """Wait until the parts called `names` (None: all) are ready.

        Raises:
            UnavailableError: they are not in time; the message names them and their logs.
        """
        deadline = time.monotonic() + timeout_s
        waiting = [self._child(n) for n in names or self._children]
        while waiting and time.monotonic() < deadline and not self._stopping.wait(POLL_S):
            waiting = [c for c in waiting if not c.ready]
        self._raise_failure()
        if waiting and not self._stopping.is_set():
            late = ", ".join(c.part.name for c in waiting)
            raise UnavailableError(f"not ready after {timeout_s:.0f} s: {late}; see {self.settings.logs_dir}")

    def stop(self) -> None:
        """End all children; those that do not end by themselves are killed."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock_file is not None:  # otherwise the file is another stack's
            self.settings.stack_path.unlink(missing_ok=True)
            os.close(self._lock_file)
            self._lock_file = None

    def request_stop(self) -> None:
        """Make `wait` and `wait_ready` return; safe in a signal handler."""
        self._stopping.set()

    def wait(self) -> None:
        """Return when somebody asked to stop.

        Raises:
            UnavailableError: the supervision failed by a mistake of ours, and all parts were ended.
        """
        while not self._stopping.wait(1.0):
            pass
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failed:
            raise UnavailableError("the supervision of the stack failed, so all its parts were ended; the traceback is above")

    # For tests and the demo

    def kill(self, name: str) -> None:
        """SIGKILL a part and leave it down until `restart`."""
        with self._lock:
            child = self._child(name)
            child.held, child.ready = True, False
            if child.process is not None:
                child.process.kill()
                child.process.wait()
        self._tell()

    def restart(self, name: str) -> None:
        """Start a part that was killed; does not wait for it."""
        with self._lock:
            child = self._child(name)
            child.held, child.due = False, 0.0

    def kill_broker(self, name: str) -> None:
        """SIGKILL the broker of a region, or `sensors`."""
        self.kill(broker_part(name))

    def restart_broker(self, name: str) -> None:
        """Start a killed broker again, with what it had on disk."""
        self.restart(broker_part(name))

    def pids(self) -> dict[str, int]:
        """The process id of every part that lives."""
        with self._lock:
            return {name: c.process.pid for name, c in self._children.items() if c.process is not None and c.alive}

    def restarts(self) -> dict[str, int]:
        """How often each part was started again after it died by itself."""
        return {name: c.restarts for name, c in self._children.items()}

    # The supervising thread

    def _supervise(self) -> None:
        try:
            while not self._stopping.wait(POLL_S):
                now = time.monotonic()
                with self._lock:
                    changed = [self._look_after(child, now) for child in self._children.values()]
                    unready = [child for child in self._children.values() if child.alive and not child.ready]
                changed += [self._probe(child) for child in unready]
                for child in self._children.values():
                    self._bound_log(child.part)
                if any(changed) or not self._told:
                    self._tell()
        except Exception:  # the children end with this thread, so there is no stack without it: `wait` says so
            log.exception("supervision failed")
            self._failed = True
        finally:
            self._stopping.set()
            self._end_all()

    def _look_after(self, child: _Child, now: float) -> bool:
        """Start the child if it is due; True if something changed."""
        if child.alive or child.held:
            return False
        if child.process is not None:
            code, child.process, child.ready = child.process.returncode, None, False
            self._put_off(child, now)
            where = self._log_path(child.part)
            log.warning("part died name=%s exit=%s restart_s=%.1f log=%s", child.part.name, code, child.backoff_s, where)
            return True
        if now < child.due:
            return False
        child.started = now
        try:
            child.process = self._spawn(child.part)
        except OSError as e:  # no room for its log, no process free, its program is being replaced
            self._put_off(child, now)
            log.warning("part not started name=%s reason=%s restart_s=%.1f", child.part.name, e, child.backoff_s)
        return True

    def _put_off(self, child: _Child, now: float) -> None:
        child.backoff_s = BACKOFF_S[0] if now - child.started > STEADY_S else min(2 * child.backoff_s, BACKOFF_S[1])
        child.due, child.restarts = now + child.backoff_s, child.restarts + 1

    def _spawn(self, part: Part) -> subprocess.Popen[bytes]:
        with self._log_path(part).open("ab") as output:
            return subprocess.Popen(
                tethered(part.command),
                cwd=self.settings.project,
                env=environment(part),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _bound_log(self, part: Part) -> None:
        """Begin a long log anew, and keep the old one: a device that tries what it may not, again and again, fills no disk with it.

        The part goes on writing at the end of the same file; what it writes between the two steps is lost.
        """
        path = self._log_path(part)
        if not path.is_file() or path.stat().st_size <= LOG_BYTES_MAX:
            return
        try:
            shutil.copyfile(path, path.with_suffix(".log.1"))
        except OSError as e:
            log.warning("old log not kept path=%s reason=%s", path, e.strerror)
        os.truncate(path, 0)

    def _end_all(self) -> None:
        """SIGTERM in reverse order, brokers last; what is left after TERM_S_MAX is killed, with its own children."""
        with self._lock:
            living = [c.process for c in reversed(self._children.values()) if c.process is not None and c.alive]
            family = [pid for process in living for pid in _descendants(process.pid)]
            for process in living:
                process.terminate()
            deadline = time.monotonic() + TERM_S_MAX
            for process in living:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    log.warning("part killed pid=%d reason=did not end in %.0f s", process.pid, TERM_S_MAX)
                    process.kill()
                    process.wait()
            for pid in family:
                with suppress(ProcessLookupError):  # the usual case: it ended with its parent
                    os.kill(pid, signal.SIGKILL)

    def _probe(self, child: _Child) -> bool:
        """Ask a part whether it is ready, without the lock: the answer may take a second."""
        process = child.process
        if process is None or not child.part.ready(process.pid):
            return False
        with self._lock:
            child.ready = child.process is process and child.alive
        return child.ready

    def _child(self, name: str) -> _Child:
        if name not in self._children:
            raise ConfigError(f"the stack has no part {name!r}; parts are {', '.join(self._children)}")
        return self._children[name]

    def _log_path(self, part: Part) -> Path:
        return self.settings.logs_dir / f"{part.name}.log"

    # Files

    def _take_lock(self) -> None:
        self._lock_file = os.open(self.settings.state_dir / "stack.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(self._lock_file)
            self._lock_file = None
            raise ConfigError(f"a stack runs on {self.settings.state_dir} already; stop it, or give another --state") from e

    def description(self) -> dict[str, Any]:
        """What stack.json holds."""
        settings = self.settings
        with self._lock:
            return {
                "pid": os.getpid(),
                "start_ticks": start_ticks(os.getpid()),
                "started_s": self._started_s,
                "ready": all(c.ready for c in self._children.values()),
                "ports": settings.ports,
                "addresses": addresses(settings),
                "pids": self.pids(),
                "restarts": self.restarts(),
            }

    def _tell(self) -> None:
        """Bring stack.json up to date; on a full disk later."""
        try:
            self._write_stack_file()
            self._told = True
        except OSError as e:
            if self._told:
                log.warning("stack file not written path=%s reason=%s", self.settings.stack_path, e.strerror)
            self._told = False

    def _write_stack_file(self) -> None:
        if self._stopping.is_set():
            return
        with self._lock:
            temporary = self.settings.stack_path.with_suffix(".tmp")
            temporary.write_bytes(msgspec.json.encode(self.description()))
            temporary.replace(self.settings.stack_path)


def addresses(settings: Settings) -> dict[str, str]:
    """Where each part listens, as a person would write it."""
    regions = {f"broker {r.name}": f"mqtt://{r.host}:{r.port}" for r in settings.regions}
    sensors = {"broker sensors": f"mqtt://{settings.sensors.host}:{settings.sensors.port}"}
    return {**sensors, **regions, "releases": settings.release_url, "MLflow": settings.mlflow_url, "API": settings.api_url}


def _descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []
    return [*children, *(d for child in children for d in _descendants(child))]
