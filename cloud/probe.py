"""Whether a root can hold a lake: it takes commits, and lets one of several writers that race for a version win.

A file system or S3 server that lets two writers create the same name loses one of two commits without an error: readings that were
acknowledged would be gone. Some accept a conditional write and ignore the condition, some check it only before they begin to write.
The probe races writers for the commits of a table of its own, `_probe/<random>`, and removes what it can.

    probe(Root("s3://eu-bucket/lake")).safe
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.roots import Root
from cloud.tables import open_table
from edge_agent.contract.errors import UnavailableError

ROUNDS = 10
WRITERS = 4
FOLDER = "_probe"


@dataclass(frozen=True)
class Probed:
    """In how many of `rounds` races exactly one writer won, and its row alone is in the table."""

    root: str
    rounds: int
    single_winners: int
    seconds: float

    @property
    def safe(self) -> bool:
        return self.single_winners == self.rounds


def probe(root: Root, rounds: int = ROUNDS) -> Probed:
    """Race writers in a root.

    Raises:
        UnavailableError: it does not take commits at all.
    """
    uri, began = root.path(FOLDER, uuid.uuid4().hex), time.monotonic()
    try:
        write_deltalake(uri, pa.table({"writer": pa.array([], pa.int64())}), storage_options=root.storage_options())
        won = sum(_race(uri, root, number) for number in range(rounds))
        if not root.on_s3:
            shutil.rmtree(uri)
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"{root} takes no commits: {e}") from e
    return Probed(str(root), rounds, won, time.monotonic() - began)


def _race(uri: str, root: Root, number: int) -> bool:
    start = threading.Barrier(WRITERS)
    rows = open_table(uri, root).to_pyarrow_table().num_rows

    def write(table: DeltaTable) -> bool:
        start.wait()
        same = CommitProperties(app_transactions=[Transaction(f"round {number}", 1)])
        try:
            write_deltalake(table, pa.table({"writer": [number]}), mode="append", commit_properties=same)
        except CommitFailedError:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        won = sum(pool.map(write, [open_table(uri, root) for _ in range(WRITERS)]))
    return won == 1 and open_table(uri, root).to_pyarrow_table().num_rows == rows + 1
