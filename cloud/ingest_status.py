"""What the ingest workers of a region have done: each writes a file, other processes read them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cloud.config import Settings
from edge_agent.contract.errors import UNREADABLE


class Status(msgspec.Struct):
    """What an ingest has done since it started."""

    region: str
    pid: int
    connected: bool = False
    messages: int = 0
    blocks: int = 0
    rows: int = 0
    quarantined_rows: int = 0
    duplicates: int = 0
    bytes: int = 0
    commits: int = 0
    receipts: int = 0
    lake_available: bool = True
    audit_available: bool = True
    refused: dict[str, int] = {}
    updated_us: int = 0


def status_path(settings: Settings, region: str, worker: str) -> Path:
    """Where the worker called `worker` writes its Status."""
    return settings.run_dir / f"ingest-{region}.{worker}.json"


def status_paths(settings: Settings, region: str) -> list[Path]:
    """The files of all workers of a region that ran here."""
    return sorted([*settings.run_dir.glob(f"ingest-{region}.*.json"), *settings.run_dir.glob(f"ingest-{region}.json")])


def write_status(path: Path, status: Status) -> None:
    """Write it so that readers see it whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(status))
    temporary.replace(path)


def read_worker(path: Path) -> Status | None:
    """The Status in one worker's file; None before its first word, or if it does not read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except (FileNotFoundError, *UNREADABLE):  # cut off by a power cut, say: the worker writes the next one soon
        return None


def read_status(settings: Settings, region: str) -> Status | None:
    """What all workers of a region have done; None before their first word. It is `connected` if all are."""
    found = [status for path in status_paths(settings, region) if (status := read_worker(path)) is not None]
    if not found:
        return None
    total = found[0]
    for status in found[1:]:
        for name in ("messages", "blocks", "rows", "quarantined_rows", "duplicates", "bytes", "commits", "receipts"):
            setattr(total, name, getattr(total, name) + getattr(status, name))
        for reason, count in status.refused.items():
            total.refused[reason] = total.refused.get(reason, 0) + count
        total.connected &= status.connected
        total.lake_available &= status.lake_available
        total.audit_available &= status.audit_available
        total.updated_us = max(total.updated_us, status.updated_us)
    return total
