"""An ingest worker that dies again and again: at a named step of a commit, or at a random instant; then it lives.

`python -m tests.faults.doomed_ingest --project DIR --worker 1 --of 2 --kills 10 --lives-s 40 --seed 7 --log FILE`

Each life is a process of its own, forked from one that has imported everything and done nothing. FILE gets a line of JSON per death. A step
that is not reached within LIFE_S_MAX is a death at a random instant. The last life begins after `--kills` deaths, or earlier when
`--lives-s` have passed; FILE gets a line LAST then. SIGTERM ends the last life in good order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

import cloud.lake
from cloud import config, ingest, upkeep
from cloud.intake import Intake
from cloud.lake import Lake
from cloud.receipts import Receipts
from cloud.workers import Worker

log = logging.getLogger(__name__)

STEPS = {
    "before write": "the batch is checked, nothing is written",
    "files written": "data files lie there, no commit names them",
    "committed": "the commit is in the log, the ingest has not noticed",
    "before receipt": "committed, no receipt sent",
    "before puback": "receipts sent, nothing acknowledged",
    "half acknowledged": "some of the batch acknowledged",
    "before compaction": "small files are about to be merged",
    "after compaction": "small files are merged, the ingest has not noticed",
    "reading the index": "a new life looks at what is stored",
}
RANDOM = "random"
LAST = "last life"
LIFE_S_MAX = 4.0  # on an idle machine; on a busy one as much longer as it is overloaded
RANDOM_S = (0.02, 1.5)
UPKEEP_S = 0.5
"""Under load upkeep comes once a minute; no life lasts that long."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Doom:
    """Dies when `step` is reached for the n-th time."""

    def __init__(self, step: str, nth: int, lake_dir: Path) -> None:
        self._step, self._left, self._lake_dir = step, nth, lake_dir

    def reach(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                die()

    def arm(self) -> None:
        """Put the steps where they belong."""
        ingest.UPKEEP_S = UPKEEP_S
        self._before(Lake, "append", "before write")
        self._before(Lake, "_index", "reading the index")
        self._before(Receipts, "add", "before receipt")
        self._before(Intake, "release", "before puback")
        self._before(upkeep, "merge_date", "before compaction")
        self._after(upkeep, "merge_date", "after compaction")
        self._after(cloud.lake, "write_deltalake", "committed")
        if self._step == "files written":
            self._while_writing()
        if self._step == "half acknowledged":
            self._half_released()

    def _before(self, owner: Any, name: str, step: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kw: Any) -> Any:
            self.reach(step)
            return real(*args, **kw)

        setattr(owner, name, wrapped)

    def _after(self, owner: Any, name: str, step: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kw: Any) -> Any:
            result = real(*args, **kw)
            self.reach(step)
            return result

        setattr(owner, name, wrapped)

    def _while_writing(self) -> None:
        """A thread looks for the data file that a write leaves before its commit."""
        real = cloud.lake.write_deltalake

        def wrapped(*args: Any, **kw: Any) -> Any:
            self._left -= 1
            if self._left <= 0:
                threading.Thread(target=self._die_at_a_new_file, args=(self._files(),), daemon=True).start()
            return real(*args, **kw)

        cloud.lake.write_deltalake = wrapped

    def _die_at_a_new_file(self, before: set[str]) -> None:
        while self._files() <= before:
            time.sleep(0.0002)
        die()

    def _files(self) -> set[str]:
        return {str(p) for p in self._lake_dir.glob("*/*/event_date=*/*.parquet")}

    def _half_released(self) -> None:
        real = Intake.release

        def wrapped(intake: Intake, batch: Any) -> None:
            real(intake, batch[: (len(batch) + 1) // 2])
            time.sleep(0.01)  # paho's thread sends them
            self.reach("half acknowledged")
            real(intake, batch[(len(batch) + 1) // 2 :])

        Intake.release = wrapped  # type: ignore[method-assign]


def live(settings: config.Settings, worker: Worker, step: str, nth: int) -> None:
    """One life, in the forked process."""
    if step in STEPS:
        Doom(step, nth, Path(settings.lake.default.uri)).arm()
    ingest.serve(settings, "eu", worker)


def note(log_file: Path, step: str) -> None:
    with log_file.open("a") as lines:
        lines.write(json.dumps({"step": step}) + "\n")


def death(pid: int, life_s: float) -> str:
    """Wait for a life to end; end it after `life_s`. How it died: `step`, or `random`."""
    deadline = time.monotonic() + life_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"a life ended with status {status:#x}; see the log"
            return "step"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return RANDOM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--lives-s", type=float, required=True)
    for name in ("worker", "of", "kills", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {given.worker} %(levelname)s %(name)s %(message)s")
    pa.array([0.0], from_pandas=True)  # Arrow imports pandas at its first array: a second that each life would pay
    settings, worker = config.load(given.project), Worker(given.worker, given.of)
    chance = random.Random(given.seed)
    end = time.monotonic() + given.lives_s
    for _ in range(given.kills):
        if (left_s := end - time.monotonic()) <= 0:
            break
        step, nth = chance.choice([*STEPS, RANDOM, RANDOM, RANDOM]), chance.randint(1, 2)
        overload = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        life_s = min(left_s, overload * (LIFE_S_MAX if step in STEPS else chance.uniform(*RANDOM_S)))
        if (pid := os.fork()) == 0:
            live(settings, worker, step, nth)
            os._exit(1)
        how = death(pid, life_s)
        log.info("life ended step=%s nth=%d how=%s", step, nth, how)
        note(given.log, step if how == "step" else RANDOM)
    note(given.log, LAST)
    with contextlib.suppress(KeyboardInterrupt):
        live(settings, worker, "none", 0)


if __name__ == "__main__":
    main()
