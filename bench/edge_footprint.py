"""What the agent takes of a small gateway: memory, time to start, disk.

- Memory is PSS (shared pages by share) of the agent's processes, between two real Mosquittos, at rest and after a while at 1,000
  readings/s: without a model, and with the model worker (200 trees, windows of 30 readings). The limit is for the larger figure.
- `ready_s`: from exec until the agent answers `edge-agent status`. `help_s`: `edge-agent --help`, `status_s`: `edge-agent status`
  of a running agent, the median of five, interpreter included.
- `installed_mb`: the files of `fenceline[edge]` and all it needs, as installed here, compiled Python files left out.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from bench import gateway
from bench.report import Cell, Report, main
from bench.running import mosquitto, peer

RATE = 1_000
SECONDS = 20.0
REST_S = 3.0
ROUNDS = 5
LIMITS = {"pss_core_mb": 60, "pss_with_model_mb": 110, "ready_s": 1.5, "help_s": 0.3, "status_s": 0.3}


def measure(arguments: argparse.Namespace) -> Report:
    """All figures, each beside its limit."""
    seconds, rounds = (1.0, 1) if arguments.quick else (SECONDS, ROUNDS)
    with tempfile.TemporaryDirectory() as core, tempfile.TemporaryDirectory() as with_model:
        numbers = {**run(Path(core), seconds, rounds, model=False), **run(Path(with_model), seconds, rounds, model=True)}
    numbers |= {"help_s": median_s(rounds, "--help"), "installed_mb": installed_mb()}
    rows: list[list[Cell]] = [[name, value, LIMITS.get(name, "-")] for name, value in sorted(numbers.items())]
    return Report("The agent's footprint", ["what", "measured", "limit"], rows, dict(numbers))


def run(home: Path, seconds: float, rounds: int, *, model: bool) -> dict[str, float]:
    """One agent's life, with or without a model."""
    with mosquitto(home, "upstream") as upstream, mosquitto(home, "local") as local:
        gateway.write(home, local.port, upstream.port, model=model, listener=False)
        started = time.perf_counter()
        with peer(home, "edge_agent.cli", "run", "--config", home / "agent.toml") as agent:
            while not gateway.status(home) and not agent.ended:
                time.sleep(0.005)
            ready_s = time.perf_counter() - started
            gateway.wait_until_ready(home, agent, model=model)
            time.sleep(min(REST_S, seconds))
            idle_mb = pss_mb(agent.pid)
            command = [sys.executable, "-m", "bench.sensors", "--port", str(local.port), "--rate", str(RATE), "--seconds", str(seconds)]
            subprocess.run([*command, "--stream", "vibration", "--out", str(home / "sent.json")], check=True, timeout=seconds + 120)
            busy_mb = pss_mb(agent.pid)
            if gateway.status(home)["sensors"]["messages"] < seconds * RATE / 2:
                raise AssertionError(f"the agent did not read: {gateway.status(home)['sensors']}")
            status_s = 0.0 if model else median_s(rounds, "status", "--config", str(home / "agent.toml"))
    if model:
        return {"pss_with_model_mb": max(idle_mb, busy_mb), "pss_with_model_idle_mb": idle_mb}
    return {"pss_core_mb": max(idle_mb, busy_mb), "pss_core_idle_mb": idle_mb, "ready_s": ready_s, "status_s": status_s}


def pss_mb(pid: int) -> float:
    """Proportional set size of a process and its children, in MB."""
    return memory_mb(pid, "Pss")


def memory_mb(pid: int, kind: str) -> float:
    """A kind of memory that /proc/PID/smaps_rollup names, of a process and its children, in MB."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                total += int(line.split()[1])
    return total / 1024


def family(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in family(child))]


def median_s(rounds: int, *arguments: str) -> float:
    """Seconds that an `edge-agent` command takes."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edge_agent.cli", *arguments], check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def installed_mb() -> float:
    """The files of the edge extra's packages, in MB; each package once."""
    wanted, seen = [Requirement("fenceline[edge]")], set()
    total = 0
    while wanted:
        requirement = wanted.pop()
        found = _installed(requirement)
        if found is None or (requirement.name, *requirement.extras) in seen:
            continue
        seen.add((requirement.name, *requirement.extras))
        for line in found.requires or []:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}):
                wanted.append(need)
        if requirement.name != "fenceline":
            total += sum(_size(found, file) for file in found.files or [] if file.suffix != ".pyc")
    own = Path(__file__).parents[1] / "edge_agent"
    return (total + sum(f.stat().st_size for f in own.rglob("*.py"))) / 1024**2


def _installed(requirement: Requirement) -> Distribution | None:
    """None for what this system does not need."""
    try:
        return distribution(requirement.name)
    except PackageNotFoundError:
        return None


def _size(found: Distribution, file: object) -> int:
    path = Path(str(found.locate_file(str(file))))
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    main(__doc__, measure)
