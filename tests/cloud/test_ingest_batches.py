"""What becomes of the blocks of a batch, at a real broker: rows, receipts, refusals; and how large a batch may be."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from cloud import ingest
from cloud.audit import Audit
from cloud.config import IngestLimits, Settings
from cloud.gate import Sealed
from cloud.intake import Received
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from edge_agent.contract.block import encode_block
from edge_agent.contract.columns import Strings
from edge_agent.contract.receipt import LaneReceipt, Receipt
from tests.cloud.blocks import block, block_bytes
from tests.cloud.ingests import WAIT_S, Device, broker, device, rows, running, settings, wait_until
from tests.cloud.test_quarantine import bad
from tests.cloud.test_quarantine import rows as held_rows

__all__ = ["broker", "device", "settings"]


def test_blocks_are_committed_before_their_receipt(settings: Settings, device: Device) -> None:
    with running(settings):
        for sequence in (1, 2, 4):
            device.send(block_bytes(sequence))
        deadline = time.monotonic() + WAIT_S
        receipt = device.wait_for(2)
        while receipt.lanes[0].ranges == [] and time.monotonic() < deadline:
            receipt = device.wait_for(2)
        assert receipt == Receipt(device="d1", epoch="e1", lanes=[LaneReceipt(lane="europe", cumulative=2, ranges=[(4, 4)])])
        assert rows(settings) == [(s, r) for s in (1, 2, 4) for r in range(3)]


def test_a_block_that_is_sent_again_gets_a_receipt_and_no_rows(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.send(block_bytes(1))
        device.wait_for(1)
        device.send(block_bytes(1))
        assert device.wait_for(1).lanes == [LaneReceipt(lane="europe", cumulative=1)]
        wait_until(lambda: work.status.duplicates == 1)
        assert len(rows(settings)) == 3


@pytest.mark.parametrize(
    ("payload", "lane", "reason"),
    [
        (block_bytes(1, lane="atlantis"), "atlantis", "wrong_region"),
        (block_bytes(1, lane="europe"), "canada", "wrong_device"),
        (block_bytes(1)[:-1] + b"!", "europe", "corrupt"),
        (b"", "europe", "corrupt"),
        (block_bytes(1, contract_version="9"), "europe", "unknown_stream"),
    ],
    ids=["foreign zone", "forged zone", "damaged", "empty", "unknown contract"],
)
def test_what_is_refused_is_counted_audited_and_alarmed_and_the_next_block_goes_on(
    settings: Settings, device: Device, payload: bytes, lane: str, reason: str
) -> None:
    with running(settings) as work:
        device.send(payload, lane)
        device.send(block_bytes(1))
        device.wait_for(1)

        assert work.status.refused == {reason: 1}
        alarm = device.alarms.get(timeout=WAIT_S)
        assert (alarm["event"], alarm["region"], alarm["reason"], alarm["count"]) == ("block_refused", "eu", reason, 1)
        (entry,) = Audit(settings.audit_db).entries()
        assert (entry.subject, entry.region, entry.reason) == ("d1", "eu", reason)
        assert len(rows(settings)) == 3
        time.sleep(1.5)  # past ack_wait: an unacknowledged message would have come again
        assert work.status.refused == {reason: 1}


def test_a_storm_of_refusals_is_a_few_entries_with_their_number(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        for sequence in range(1, 31):
            device.send(block_bytes(sequence, lane="atlantis"), "atlantis")
        wait_until(lambda: work.status.refused == {"wrong_region": 30})
    audit = Audit(settings.audit_db)
    assert audit.counts() == {"wrong_region": 30} and len(audit.entries()) <= 2


def test_a_batch_is_as_large_as_what_its_blocks_unpack_to(settings: Settings) -> None:
    header, table = block(1, rows=2_000)
    texts = Strings(np.arange(2_000, dtype=np.int32), tuple(f"{n:01000}" for n in range(2_000)))
    payload = encode_block(header, {**table, "pump": texts})
    message = Received("fenceline/v1/d1/up/europe/pump", payload, 1, 1, False)
    sealed = ingest.build(settings, "eu").gate.admit(message.topic, payload)
    assert isinstance(sealed, Sealed)
    batch = ingest.Batch()
    batch.add(message, sealed, 0.0)
    assert 20 * len(payload) < 2_000 * 1_000 < batch.size_bytes < 1.2 * 2_000 * 1_000 and batch.rows == 2_000, "a text in each row"


def test_small_messages_that_unpack_to_much_are_committed_few_at_a_time(settings: Settings) -> None:
    work = ingest.build(replace(settings, ingest=IngestLimits(batch_bytes_max=3 * 1024 * 1024)), "eu")
    for sequence in range(1, 9):
        header, table = block(sequence, rows=1)
        large = encode_block(header, {**table, "pump": Strings.of(["x" * 1024 * 1024])})
        assert len(large) < 1024
        work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", large, 1, sequence, False))
    work._collect()
    assert len(work._next.messages) == 3 and work.intake.queue.qsize() == 5


def test_a_block_sent_without_qos_is_stored_and_does_not_cost_the_connection(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.client.publish(device.topics.up("europe", "pump"), block_bytes(1), qos=0)
        device.wait_for(1)
        device.send(block_bytes(2))
        device.wait_for(2)
        assert work.intake.connected and work.intake.connection == 1


def test_rows_that_break_their_contract_are_put_apart_told_and_settled(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.send(encode_block(*bad(1, [0, 2])))
        device.send(encode_block(*bad(2, [0, 1, 2, 3])))
        device.wait_for(2)
        alarm = device.alarms.get(timeout=WAIT_S)
        wait_until(lambda: work.status.quarantined_rows == 6)
    assert rows(settings) == [(1, 1), (1, 3)]
    assert held_rows(CheckedLake(Lake(settings.lake)).held) == [(1, 0), (1, 2), *((2, r) for r in range(4))]
    assert (alarm["event"], alarm["reason"]) == ("rows_quarantined", "out_of_range")
    assert "field 'pressure': 0 to 100 allowed" in alarm["detail"]
    assert {e.kind for e in Audit(settings.audit_db).entries()} == {"rows_quarantined"}
