"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import generate_latest

from edge_agent.draft import LaneState
from edge_agent.metrics import BufferCollector, Metrics


def test_what_waits_is_what_waits_at_the_scrape() -> None:
    metrics, lanes = Metrics(), [LaneState("europe", 3, 900, 30, 1), LaneState("canada", 1, 300, 10, 2)]
    metrics.registry.register(BufferCollector(lambda: lanes))
    shown = generate_latest(metrics.registry).decode()
    assert 'fenceline_buffer_blocks{lane="europe"} 3.0' in shown and 'fenceline_buffer_bytes{lane="canada"} 300.0' in shown
    lanes.pop()
    assert 'lane="canada"' not in generate_latest(metrics.registry).decode()
