"""What brokers refuse by themselves: their real words, and a log that grows, is cut off and replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud import broker_log
from cloud.broker_log import BrokerLog, Denial, read_line

NATS = '[13873] 2026/11/22 20:52:46.838271 [ERR] 127.0.0.1:52595 - mid:6 - "plane-01" - '
NATS_PUBLISH = NATS + 'Publish Violation - Subject "fenceline.v1.plane-02.up.europe.turbofan"'
MOSQUITTO = "1795380809: Denied PUBLISH from plane-01 (d0, q1, r0, m1, 'fenceline/v1/plane-02/up/europe/turbofan', ... (1 bytes))"
PUBLISHED = Denial("plane-01", "publish", "fenceline/v1/plane-02/up/europe/turbofan", "127.0.0.1:52595")


@pytest.mark.parametrize(
    ("line", "denial"),
    [
        (NATS_PUBLISH, PUBLISHED),
        (
            NATS + 'Subscription Violation - Subject "fenceline.v1.*.desired", SID fenceline.v1.*.desired',
            Denial("plane-01", "subscribe", "fenceline/v1/+/desired", "127.0.0.1:52595"),
        ),
        (NATS + 'authentication error - User "plane-01"', Denial("plane-01", "connect", "", "127.0.0.1:52595")),
        (MOSQUITTO, Denial("plane-01", "publish", PUBLISHED.topic)),
        (MOSQUITTO.replace("europe/turbofan", "it's, odd"), Denial("plane-01", "publish", "fenceline/v1/plane-02/up/it's, odd")),
        (f"Nov 22 20:53:29 gate mosquitto[71]: {MOSQUITTO}", Denial("plane-01", "publish", PUBLISHED.topic)),
        ("1795380809: Sending PUBACK to plane-01 (m1, rc135)", None),
        (NATS.replace("[ERR]", "[INF]") + "anything", None),
        ("", None),
    ],
)
def test_real_lines_of_nats_and_mosquitto(line: str, denial: Denial | None) -> None:
    assert read_line(line) == denial


def test_a_log_is_read_once_however_often_its_reader_starts(tmp_path: Path) -> None:
    path, place = tmp_path / "broker.log", tmp_path / "place.json"
    assert list(BrokerLog(path, place).read()) == []
    path.write_text(f"{NATS_PUBLISH}\n{NATS_PUBLISH[:60]}")
    reader = BrokerLog(path, place)
    assert list(reader.read()) == [PUBLISHED] and list(reader.read()) == []
    assert list(BrokerLog(path, place).read()) == [PUBLISHED]  # nobody said that it is safe
    reader.keep_place()
    with path.open("a") as log:
        log.write(f"{NATS_PUBLISH[60:]}\n")  # the rest of the line
    reader = BrokerLog(path, place)
    assert list(reader.read()) == [PUBLISHED]
    reader.keep_place()
    assert list(BrokerLog(path, place).read()) == []


@pytest.mark.parametrize("between", ["\u2028", "\u2029", "\x85", "\v", "\f", "\r", "\x1c", " "])
@pytest.mark.parametrize("kind", ["Denied", "Received"])
def test_a_topic_that_holds_a_line_about_another_device_does_not_blame_it(tmp_path: Path, between: str, kind: str) -> None:
    topic = f"x{between}{MOSQUITTO}{between}{NATS_PUBLISH}"
    (tmp_path / "broker.log").write_text(f"1795380809: {kind} PUBLISH from evil (d0, q1, r0, m1, '{topic}', ... (5 bytes))\n", newline="")
    assert {denial.client for denial in BrokerLog(tmp_path / "broker.log", tmp_path / "place").read()} <= {"evil"}


def test_a_log_that_was_replaced_or_cut_is_read_from_its_start(tmp_path: Path) -> None:
    path, place = tmp_path / "broker.log", tmp_path / "place.json"
    path.write_text(f"{'x' * 500}\n")
    reader = BrokerLog(path, place)
    assert list(reader.read()) == []
    path.rename(tmp_path / "broker.log.1")
    path.write_text(f"{NATS_PUBLISH}\n{'y' * 600}\n")
    assert list(reader.read()) == [PUBLISHED]
    path.write_text(f"{MOSQUITTO}\n")
    assert [d.client for d in reader.read()] == ["plane-01"]
    place.write_bytes(b"{")
    assert [d.client for d in BrokerLog(path, place).read()] == ["plane-01"]


def test_a_large_log_is_read_in_pieces_and_an_endless_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_log, "READ_BYTES_MAX", 1_000)
    path = tmp_path / "broker.log"
    path.write_text("z" * 2_500 + "\n" + f"{NATS_PUBLISH}\n" * 30)
    reader = BrokerLog(path, tmp_path / "place.json")
    found = [denial for _ in range(10) for denial in reader.read()]
    assert found == [PUBLISHED] * 30
