"""Topics: one golden table, read in both directions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError
from edge_agent.contract.topics import ALL_BLOCKS, ALL_EVENTS, ALL_REPORTED, DeviceTopics, Kind, Topic, check_lane, parse

GOLDEN = [
    ("fenceline/v1/plane-01/up/europe/turbofan", Topic("plane-01", Kind.UP, "europe", "turbofan")),
    ("fenceline/v1/plane-01/up/atlantic_europe/turbofan", Topic("plane-01", Kind.UP, "atlantic_europe", "turbofan")),
    ("fenceline/v1/plane-01/up/nowhere/quarantine", Topic("plane-01", Kind.UP, "nowhere", "quarantine")),
    ("fenceline/v1/0/receipts", Topic("0", Kind.RECEIPTS)),
    ("fenceline/v1/plane-01/desired", Topic("plane-01", Kind.DESIRED)),
    ("fenceline/v1/plane-01/reported", Topic("plane-01", Kind.REPORTED)),
    ("fenceline/v1/plane-01/events", Topic("plane-01", Kind.EVENTS)),
]

_LETTERS = "abcxyz0189"
names = st.builds(str.__add__, st.sampled_from(_LETTERS), st.text(_LETTERS + "-", max_size=62))
lanes = st.sets(names, min_size=1, max_size=4).map(lambda zones: "_".join(sorted(zones)))


def build(topic: Topic) -> str:
    topics = DeviceTopics(topic.device)
    return topics.up(topic.lane, topic.stream) if topic.kind is Kind.UP else str(getattr(topics, topic.kind.value))


def matches(topic: str, filter_: str) -> bool:
    pairs = list(zip(topic.split("/"), filter_.split("/"), strict=False))
    return topic.count("/") == filter_.count("/") and all(b in ("+", a) for a, b in pairs)


@pytest.mark.parametrize(("text", "topic"), GOLDEN, ids=[text for text, _ in GOLDEN])
def test_golden_topics_are_built_and_parsed(text: str, topic: Topic) -> None:
    assert build(topic) == text
    assert parse(text) == topic


@given(names, st.sampled_from(Kind), lanes, names)
def test_every_built_topic_parses_back_and_matches_the_cloud_filters(device: str, kind: Kind, lane: str, stream: str) -> None:
    topic = Topic(device, kind, lane, stream) if kind is Kind.UP else Topic(device, kind)
    text = build(topic)
    assert parse(text) == topic
    filters = {Kind.UP: ALL_BLOCKS, Kind.REPORTED: ALL_REPORTED, Kind.EVENTS: ALL_EVENTS}
    assert [f for f in filters.values() if matches(text, f)] == [filters[k] for k in (kind,) if k in filters]


@given(st.text())
@example("fenceline/v1/a/up/b_a/s")
@example("fenceline/v1/a/up/b/s/more")
@example("fenceline/v1/a/receipts/b/s")
@example("fenceline/v1/a/up")
@example("fenceline/v2/a/receipts")
@example("fenceline/v1//receipts")
@example("fenceline/v1/+/receipts")
@example("fenceline/v1/a\n/receipts")
def test_any_other_text_is_refused(text: str) -> None:
    try:
        topic = parse(text)
    except ContractError:
        return
    assert build(topic) == text


@pytest.mark.parametrize("lane", ["", "_", "a_", "b_a", "a_a", "A", "a b", "ä"])
def test_lane_names_its_zones_once_each_in_rising_order(lane: str) -> None:
    with pytest.raises(ContractError):
        check_lane(lane)
