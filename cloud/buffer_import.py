"""import-buffer: the buffer of a dead device goes into the lake.

- The gate decides as it does for ingest: a block enters through a region that every zone of its lane allows, or is refused. Header and
  contract are checked the same way. What the broker does for ingest, to know who sends, the registry of devices does here.
- A block has the name that it would have had by the uplink: what the lake holds already is left out, and if the device comes back to
  life and sends it again, it is a copy. No receipts are sent.
- What was stored and what was refused stands in the audit trail, with the SHA-256 of the file and of the log beside it; of an import that
  ended early too.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud.audit import Audit
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.gate import Gate, Refusal, load_contracts, load_zones
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.refusals import KINDS_MAX, REFUSED, Kind
from edge_agent.buffer_file import BufferFile, Found, parts
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ConfigError, Reason
from edge_agent.contract.topics import DeviceTopics
from edge_agent.sealed import load_keys

log = logging.getLogger(__name__)

IMPORTED = "buffer_imported"
BATCH_BLOCKS, BATCH_ROWS = 256, 262_144


@dataclass
class Imported:
    """What an import did. `duplicates` were in the lake already; `damaged` blocks could not be read. `log_sha256`: empty without a log.

    `stored_rows` are those of stored blocks; `quarantined_rows` of them broke their contract and lie apart.
    """

    file: str
    sha256: str
    log_sha256: str = ""
    devices: list[str] = field(default_factory=list)
    blocks: int = 0
    rows: int = 0
    stored_blocks: int = 0
    stored_rows: int = 0
    duplicates: int = 0
    damaged: int = 0
    quarantined_rows: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that the file holds is in the lake now."""
        return not self.refused and not self.damaged


class BufferImport:
    """The import into one project's lake."""

    def __init__(self, settings: Settings, regions: Sequence[str] = ()) -> None:
        """`regions`: only these may store; default: all of the project.

        Raises:
            ConfigError: there is no such region, or the project's contracts or zones cannot be read.
        """
        names = regions or [r.name for r in settings.regions]
        contracts, self._zones = load_contracts(settings), load_zones(settings)
        self._gates = {settings.region(name).name: Gate(name, contracts, self._zones) for name in names}
        self._lake = CheckedLake(Lake(settings.lake, contracts))
        self._fleet = set(Fleet(settings.fleet_db).devices())
        self._audit = Audit(settings.audit_db)

    def run(self, path: Path, key_file: Path | None = None) -> Imported:
        """Import a file; again does no harm.

        Raises:
            ConfigError: there is no such file, or it is encrypted and the key is missing.
            UnavailableError: the lake does not commit. What was stored stays; run it again.
        """
        file = BufferFile(path, load_keys(key_file))
        digests = [_digest(part) for part in parts(path)]
        done = Imported(str(path), digests[0], digests[1] if len(digests) > 1 else "")
        devices: Counter[str] = Counter()
        refusals: dict[Kind, tuple[int, str]] = {}
        ended = "ended early: "
        try:
            for batch in _batches(file.blocks()):
                devices.update(found.header.device for found in batch)
                self._take(batch, done, refusals)
            if file.carved and not devices:
                raise ConfigError(f"{path} holds no block; it is no buffer, or nothing of it can be read")
            ended = ""
        finally:
            done.devices, done.damaged = sorted(devices), file.damaged
            if devices or not ended:
                self._write_down(done, refusals, ended)
        return done

    def _take(self, batch: list[Found], done: Imported, refusals: dict[Kind, tuple[int, str]]) -> None:
        accepted: defaultdict[str, list[tuple[BlockHeader, Table]]] = defaultdict(list)
        for found in batch:
            region, answer = self._inspect(found)
            done.blocks += 1
            done.rows += found.header.rows
            if isinstance(answer, Refusal):
                _refuse(answer, done, refusals)
            else:
                accepted[region].append(answer)
        for region, blocks in accepted.items():
            rows = {header.identity: header.rows for header, _ in blocks}
            settled = self._lake.append(region, blocks)
            done.stored_blocks += len(settled.committed)
            done.stored_rows += sum(rows[identity] for identity in settled.committed)
            done.duplicates += len(settled.duplicates)
            done.regions[region] = done.regions.get(region, 0) + len(settled.committed)
            done.quarantined_rows += sum(found.rows for found in self._lake.take_found())
            for refusal in settled.refused:
                _refuse(refusal, done, refusals)

    def _inspect(self, found: Found) -> tuple[str, tuple[BlockHeader, Table] | Refusal]:
        """The region that may store a block, and the block; or why none may."""
        header = found.header
        if header.device not in self._fleet:
            detail = f"device {header.device!r} is not in this fleet; fenceline device add {header.device}"
            return "", Refusal(header.device, header.lane, header.stream, Reason.WRONG_DEVICE, detail)
        topic = DeviceTopics(header.device).up(header.lane, header.stream)
        for region in self._zones.endpoints(header.lane):
            if region in self._gates:
                return region, self._gates[region].inspect(topic, found.block)
        detail = f"no region of {', '.join(self._gates)} may hold {header.lane!r}"
        return "", Refusal(header.device, header.lane, header.stream, Reason.WRONG_REGION, detail)

    def _write_down(self, done: Imported, refusals: dict[Kind, tuple[int, str]], ended: str) -> None:
        source = f"{done.file} sha256 {done.sha256}" + (f", its log {done.log_sha256}" if done.log_sha256 else "")
        for kind, (count, detail) in refusals.items():
            log.warning("block refused device=%s reason=%s blocks=%d detail=%s", kind.device, kind.reason, count, detail)
            self._audit.add(
                kind.by, region="", subject=kind.device, reason=kind.reason, detail=f"import of {source}: {detail}", count=count
            )
        regions = ", ".join(f"{name} {blocks}" for name, blocks in done.regions.items()) or "none"
        detail = f"{ended}{source}: {done.stored_blocks} blocks stored ({regions}), {done.duplicates} there before, {done.damaged} damaged"
        self._audit.add(IMPORTED, region="", subject=", ".join(done.devices), reason="imported", detail=detail)


def _refuse(refusal: Refusal, done: Imported, refusals: dict[Kind, tuple[int, str]]) -> None:
    """Count a refused block, and keep what was wrong with the first of its kind; as for ingest, kinds have a limit."""
    kind = Kind(REFUSED, refusal.device, refusal.lane, refusal.stream, refusal.reason)
    if kind not in refusals and len(refusals) >= KINDS_MAX:
        kind = Kind(REFUSED, "", "", "", refusal.reason)
    count, detail = refusals.get(kind, (0, refusal.detail))
    refusals[kind] = count + 1, detail
    done.refused[refusal.reason] = done.refused.get(refusal.reason, 0) + 1


def _batches(blocks: Iterable[Found]) -> Iterator[list[Found]]:
    """Blocks that go into the lake together; they are in memory with all their rows."""
    batch: list[Found] = []
    for found in blocks:
        batch.append(found)
        if len(batch) >= BATCH_BLOCKS or sum(f.header.rows for f in batch) >= BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document(done: Imported) -> dict[str, Any]:
    """For JSON."""
    return {**done.__dict__, "complete": done.complete}
