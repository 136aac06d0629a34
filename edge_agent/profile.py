"""Where the time goes: wall and processor time of every step of the data path, per batch and per reading. For `edge-agent run --profile`.

- Nothing is measured unless asked. Entering a Profile puts a clock around the functions in STEPS, leaving it takes the clock away: an
  agent without a profile runs as if this module did not exist.
- A step's time is its own, without that of the steps inside it, and only that of the thread that runs the data path.
- Sensor sides, uplink and everything else beside the data path are counted as processor time of their threads, the model as that
  of its process. What has ended counts as far as it was seen, at the last `sum`.

    with Profile() as profile:
        agent.run()
    print(profile.sum().text())
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_agent import intake
from edge_agent.active_model import ActiveModel
from edge_agent.buffer import Buffer
from edge_agent.core.decode import Decoder
from edge_agent.core.dedupe import RecentKeys
from edge_agent.core.features import Windows
from edge_agent.core.single_values import ValueDecoder
from edge_agent.core.sparkplug_rows import SparkplugDecoder
from edge_agent.core.track import Track
from edge_agent.datapath import DataPath
from edge_agent.mqtt.inlet import Batch
from edge_agent.sealing import Sealer
from edge_agent.uplink import Uplink

REPORT_S = 5.0
REST = "rest of the path"
STEPS: tuple[tuple[Any, str, str], ...] = (
    (Decoder, "decode", "decode"),
    (ValueDecoder, "decode", "decode"),
    (SparkplugDecoder, "rows", "decode"),
    (intake, "validate", "validate"),
    (RecentKeys, "remember", "redelivery"),
    (Track, "stamp", "zone"),
    (Windows, "push", "windows"),
    (ActiveModel, "score", "model"),
    (Sealer, "seal", "seal"),
    (Buffer, "append", "commit"),
    (Batch, "release", "release"),
    (Uplink, "offer", "uplink offer"),
    (DataPath, "process", REST),
)
"""Owner, function, and the step that its time belongs to; the last one holds all the others."""

OTHER, MODEL = "other threads", "model worker"
_THREADS = {"source": "source", "listener": "source", **dict.fromkeys(("uplink", "backlog", "paho", "connect"), "uplink")}
_Beside = tuple[str, int]  # what it is for, and the kernel's number of the thread or process
_OF_A_PROCESS, _OF_A_THREAD = 2, 6  # the kernel's processor clocks of others, as in pthread_getcpuclockid


@dataclass
class Spent:
    """Seconds of one step."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Sum:
    """What has been spent since the profile began."""

    seconds: float
    batches: int
    readings: int
    steps: dict[str, Spent]
    beside: dict[str, float]

    def since(self, before: Sum) -> Sum:
        """What was spent after `before`."""
        zero = Spent()
        steps = {
            name: Spent(s.wall_s - before.steps.get(name, zero).wall_s, s.cpu_s - before.steps.get(name, zero).cpu_s)
            for name, s in self.steps.items()
        }
        threads = {name: max(0.0, s - before.beside.get(name, 0.0)) for name, s in self.beside.items()}
        return Sum(self.seconds - before.seconds, self.batches - before.batches, self.readings - before.readings, steps, threads)

    def text(self) -> str:
        """A table: milliseconds per batch, microseconds per reading."""
        rate = self.readings / self.seconds if self.seconds > 0 else 0.0
        head = f"{self.readings} readings in {self.batches} batches in {self.seconds:.1f} s, {rate:,.0f} a second"
        if not self.batches or not self.readings:
            return f"profile: {head}"
        lines = [f"profile: {head}", f"  {'step':18}{'ms/batch':>10}{'CPU':>9}{'us/reading':>12}{'CPU':>9}"]
        rows: list[tuple[str, float | None, float]] = [(name, s.wall_s, s.cpu_s) for name, s in self.steps.items()]
        rows += [(f"{name} (beside)", None, s) for name, s in self.beside.items()]
        rows.append(("all", None, sum(s.cpu_s for s in self.steps.values()) + sum(self.beside.values())))
        for name, wall_s, cpu_s in rows:
            wall = ("-", "-") if wall_s is None else (f"{wall_s / self.batches * 1e3:.2f}", f"{wall_s / self.readings * 1e6:.2f}")
            lines.append(f"  {name:18}{wall[0]:>10}{cpu_s / self.batches * 1e3:>9.2f}{wall[1]:>12}{cpu_s / self.readings * 1e6:>9.2f}")
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        """The same as plain values, in microseconds per reading and seconds."""
        readings = max(1, self.readings)
        steps = {
            name: {"wall_s": s.wall_s, "cpu_s": s.cpu_s, "cpu_us_per_reading": s.cpu_s / readings * 1e6} for name, s in self.steps.items()
        }
        beside = {name: {"cpu_s": s, "cpu_us_per_reading": s / readings * 1e6} for name, s in self.beside.items()}
        return {"seconds": self.seconds, "batches": self.batches, "readings": self.readings, "steps": steps, "beside": beside}


class Profile:
    """See the module. Enter it in the thread that runs the data path."""

    def __init__(self) -> None:
        self._steps = {step: Spent() for _, _, step in STEPS}
        self._inner: list[Spent] = []  # of each step under way: what the steps inside it have spent
        self._batches = self._readings = 0
        self._began = 0.0
        self._seen: dict[_Beside, float] = {}
        self._beside_before: dict[str, float] = {}
        self._thread = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Profile:
        self._began, self._thread, self._beside_before = time.monotonic(), threading.get_ident(), self._beside()
        for owner, name, step in STEPS:
            plain = getattr(owner, name)
            setattr(owner, name, self._timed(plain, self._steps[step], batches=step == REST))
            self._restore.callback(setattr, owner, name, plain)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore.close()

    def sum(self) -> Sum:
        """What has been spent so far; from any thread."""
        threads = {name: s - self._beside_before[name] for name, s in self._beside().items()}
        steps = {name: Spent(s.wall_s, s.cpu_s) for name, s in self._steps.items()}
        return Sum(time.monotonic() - self._began, self._batches, self._readings, steps, threads)

    def _beside(self) -> dict[str, float]:
        """Seconds of processor time beside the data path, by what they were for."""
        self._seen.update(_look_beside())
        found = dict.fromkeys((*_THREADS.values(), OTHER, MODEL), 0.0)
        for (kind, _), seconds in list(self._seen.items()):
            found[kind] += seconds
        return found

    def _timed(self, plain: Callable[..., Any], spent: Spent, *, batches: bool) -> Callable[..., Any]:
        inner = self._inner

        def timed(*values: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                return plain(*values, **named)
            inner.append(Spent())
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return plain(*values, **named)
            finally:
                wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
                within = inner.pop()
                spent.wall_s += wall - within.wall_s
                spent.cpu_s += cpu - within.cpu_s
                if inner:
                    inner[-1].wall_s += wall
                    inner[-1].cpu_s += cpu
                if batches:
                    self._batches += 1
                    self._readings += len(values[1])

        return timed


@contextlib.contextmanager
def report_regularly(profile: Profile, say: Callable[[str], None], every_s: float = REPORT_S) -> Iterator[None]:
    """Say what was spent every few seconds in which there were readings, and at the end the sum of all."""
    done = threading.Event()

    def report() -> None:
        before = profile.sum()
        while not done.wait(every_s):
            now = profile.sum()
            if now.readings > before.readings:
                say(now.since(before).text())
            before = now

    thread = threading.Thread(target=report, name="profile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        say(f"in all, {profile.sum().text()}")


def _look_beside() -> dict[_Beside, float]:
    """Seconds of processor time of each thread beside the data path, and of the model's process."""
    found = {}
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.native_id is not None:
            kind = next((kind for start, kind in _THREADS.items() if thread.name.startswith(start)), OTHER)
            found[kind, thread.native_id] = _cpu_s(thread.native_id, _OF_A_THREAD)
    return found | {(MODEL, child): _cpu_s(child, _OF_A_PROCESS) for child in _children()}


def _cpu_s(number: int, clock: int) -> float:
    try:
        return time.clock_gettime((~number << 3) | clock)
    except OSError:  # it has just ended
        return 0.0


def _children() -> list[int]:
    """The processes that this one has started."""
    found, own = [], str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if stat.read_text().rsplit(")", 1)[1].split()[1] == own:
                found.append(int(stat.parent.name))
    return found
