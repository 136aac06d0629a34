"""The real lake behind the failover benchmark's ingests: one writer for each endpoint, one Delta table for the zone.

Two regions write to one lane at the same time here, and both get copies of the same blocks: what `cloud.lake` must store once.
Afterwards the table itself is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

from bench.failover_device import CONTRACT, STREAM
from bench.failover_lake import READING, Confirm, Store
from bench.failover_lake import Lake as Account
from bench.failover_site import ZONE
from cloud.lake import Lake
from cloud.rows import Contracts
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Table
from edge_agent.contract.odcs import parse_contract

BATCH_BLOCKS_MAX = 256


class DeltaLake:
    """A lake in `directory`; `writer` makes the store of an endpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._contracts = directory, Contracts([parse_contract(CONTRACT)])

    def writer(self, endpoint: str, account: Account) -> Store:
        """The store of one endpoint's ingest, with a thread and a lake object of its own."""
        waiting: queue.SimpleQueue[tuple[BlockHeader, Table, Confirm]] = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(endpoint, account, waiting), name=f"lake-{endpoint}", daemon=True).start()
        return lambda header, table, confirm: waiting.put((header, table, confirm))

    def rows(self) -> tuple[int, int]:
        """Rows of the zone's table, and how many different readings they are."""
        numbers = Lake(self._directory).read(STREAM, lanes=[ZONE], columns=[READING])[READING].to_pylist()
        return len(numbers), len(set(numbers))

    def _write(self, endpoint: str, account: Account, waiting: queue.SimpleQueue[tuple[BlockHeader, Table, Confirm]]) -> None:
        lake = Lake(self._directory, self._contracts)
        while True:
            batch = [waiting.get()]
            while len(batch) < BATCH_BLOCKS_MAX and not waiting.empty():
                batch.append(waiting.get())
            settled = lake.append(endpoint, [(header, table) for header, table, _ in batch])
            tables = {header.identity: table for header, table, _ in batch}
            account.stored([tables[identity] for identity in settled.committed], time.monotonic())
            for receipt in settled.receipts:
                batch[-1][2](receipt)
