"""Every metric of the agent, in one place, in Prometheus grammar."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from edge_agent.contract.errors import ConfigError

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
        self.waiting = Gauge("fenceline_buffer_blocks", "Blocks waiting for a receipt.", ["lane"], registry=r)
        self.waiting_bytes = Gauge("fenceline_buffer_bytes", "Bytes waiting for a receipt.", ["lane"], registry=r)
        self.lost_blocks = Counter("fenceline_blocks_lost_total", "Blocks given up or found damaged.", ["reason"], registry=r)
        self.lost_readings = Counter("fenceline_readings_lost_total", "Readings in such blocks, where known.", ["reason"], registry=r)
        self.full = Counter("fenceline_buffer_refusals_total", "Times the buffer could not store and the source was held.", registry=r)
        self.batch_seconds = Histogram(
            "fenceline_batch_seconds",
            "From taking a batch to releasing its acknowledgements.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
            registry=r,
        )


def parse_listen(listen: str | None) -> tuple[str, int] | None:
    """HOST:PORT as host and port; None if metrics are not served.

    Raises:
        ConfigError: the host is not loopback: metrics have no authentication, put a proxy in front.
    """
    if listen is None:
        return None
    host, _, port = listen.rpartition(":")
    if host.strip("[]") not in LOOPBACK or not port.isdigit() or int(port) > 65_535:
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
