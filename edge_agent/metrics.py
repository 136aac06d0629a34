"""Every metric of the agent, in one place, in Prometheus grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_agent.contract.errors import ConfigError
from edge_agent.draft import LaneState
from edge_agent.uplink_status import UplinkStatus

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Metrics:
    """The counters and gauges of one agent, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.messages = Counter("fenceline_sensor_messages_total", "Sensor messages taken from the broker.", registry=r)
        self.readings = Counter("fenceline_readings_stored_total", "Readings committed to the buffer.", ["stream"], registry=r)
        self.redelivered = Counter("fenceline_readings_redelivered_total", "Readings dropped: stored before.", ["stream"], registry=r)
        self.rejected = Counter("fenceline_readings_rejected_total", "Payloads sent to quarantine.", ["reason"], registry=r)
        self.positions_refused = Counter("fenceline_positions_refused_total", "Positions that were not believed.", ["reason"], registry=r)
        self.gaps = Counter("fenceline_sparkplug_gaps_total", "Times that messages of a Sparkplug node were missing.", registry=r)
        self.scored = Counter("fenceline_readings_scored_total", "Readings scored by the model.", ["stream"], registry=r)
        self.unscored = Counter(
            "fenceline_readings_unscored_total", "Readings stored unscored beside an active model.", ["stream"], registry=r
        )
        self.model_failures = Counter("fenceline_model_failures_total", "Failures of the model worker.", ["reason"], registry=r)
        self.block_bytes = Counter("fenceline_block_bytes_total", "Bytes of sealed blocks.", ["stream"], registry=r)
        self.settled = Counter("fenceline_blocks_settled_total", "Blocks the lake has acknowledged.", registry=r)
        self.lost_blocks = Counter("fenceline_blocks_lost_total", "Blocks given up or found damaged.", ["reason"], registry=r)
        self.lost_readings = Counter("fenceline_readings_lost_total", "Readings in such blocks, where known.", ["reason"], registry=r)
        self.full = Counter("fenceline_buffer_refusals_total", "Times the buffer could not store and the source was held.", registry=r)
        self.batch_seconds = Histogram(
            "fenceline_batch_seconds",
            "From taking a batch to releasing its acknowledgements.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
            registry=r,
        )


class UplinkCollector(Collector):
    """The uplink's numbers, asked for at every scrape."""

    def __init__(self, status: Callable[[], UplinkStatus]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask for numbers yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        endpoints, lanes = status.endpoints.items(), status.lanes.items()
        yield _gauge("endpoint_connected", "1 if connected.", "endpoint", {e: float(s.connected) for e, s in endpoints})
        yield _gauge("endpoint_suspected", "1 if silent while others answer.", "endpoint", {e: float(s.suspected) for e, s in endpoints})
        yield _gauge(
            "endpoint_round_trip_seconds", "Smoothed PUBACK round trip.", "endpoint", _seconds({e: s.round_trip_ms for e, s in endpoints})
        )
        yield _gauge(
            "endpoint_deadline_seconds", "After this a block is late.", "endpoint", _seconds({e: s.deadline_ms for e, s in endpoints})
        )
        yield _gauge("lane_held", "1 if a lane has no endpoint.", "lane", {lane: float(bool(s.held)) for lane, s in lanes})
        failovers = CounterMetricFamily("fenceline_lane_failovers", "Times the endpoint of a lane failed.", labels=["lane"])
        for lane, lane_status in lanes:
            failovers.add_metric([lane], lane_status.failovers)
        yield failovers
        for name, text, value in (
            ("blocks_sent", "Blocks handed to endpoints, copies too.", status.blocks_sent),
            ("block_hedges", "Late blocks that also went to the standby.", status.hedges),
            ("block_hedges_denied", "Late blocks that did not, because of hedge_share_max.", status.hedges_denied),
            ("duplicate_bytes", "Bytes sent twice: hedges and failovers.", status.duplicate_bytes),
        ):
            yield CounterMetricFamily(f"fenceline_{name}", text, value=value)


class BufferCollector(Collector):
    """What waits in the buffer, asked for at every scrape."""

    def __init__(self, lanes: Callable[[], list[LaneState]]) -> None:
        self._lanes = lanes

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask for numbers yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        lanes = self._lanes()
        yield _gauge("buffer_blocks", "Blocks waiting for a receipt.", "lane", {s.lane: s.blocks for s in lanes})
        yield _gauge("buffer_bytes", "Bytes waiting for a receipt.", "lane", {s.lane: s.bytes for s in lanes})


def _gauge(name: str, text: str, label: str, values: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"fenceline_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _seconds(values: dict[str, float | None]) -> dict[str, float]:
    return {key: value / 1e3 for key, value in values.items() if value is not None}


def parse_listen(listen: str | None) -> tuple[str, int] | None:
    """HOST:PORT as host and port; None if metrics are not served.

    Raises:
        ConfigError: the host is not loopback: metrics have no authentication, put a proxy in front.
    """
    if listen is None:
        return None
    host, _, port = listen.rpartition(":")
    if host.strip("[]") not in LOOPBACK or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"metrics.listen {listen!r} must be HOST:PORT on loopback ({', '.join(LOOPBACK)})")
    return host.strip("[]"), int(port)


def serve(metrics: Metrics, host: str, port: int) -> None:
    """Serve `/metrics`.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        start_http_server(port, host, registry=metrics.registry)
    except OSError as e:
        raise ConfigError(f"metrics.listen {host}:{port}: {e.strerror}; choose another port") from e
