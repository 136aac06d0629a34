"""The agent's settings: `agent.toml`, read once and passed in.

Relative paths start at the file's own directory. Unknown keys are refused, with the nearest known name. The
documents that the file points to (contracts, zones, the TUF root) are read and checked here too, so that an agent either
starts whole or says what to change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from edge_agent.contract.block import BLOCK_BYTES_MAX, NOWHERE, ROWS_MAX
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.stream import AGENT_STREAMS, StreamContract, parse_contract
from edge_agent.contract.topics import check_name
from edge_agent.core.settings import parse_settings
from edge_agent.core.zones import Zones, parse_zones

MIB = 1024 * 1024


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class BrokerSettings(_Settings, frozen=True, kw_only=True):
    """How to reach a broker: `mqtt://host:port` or `mqtts://host:port`, with optional password and client certificate."""

    url: str
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    keepalive_s: int = 30


class SensorSettings(BrokerSettings, frozen=True, kw_only=True):
    """The sensor broker. `subscribe` is one filter for readings and positions: one filter keeps their order."""

    subscribe: str
    version: Literal[4, 5] = 4
    client_id: str | None = None
    queue_batches_max: int = 8


class StreamSettings(_Settings, frozen=True, kw_only=True):
    """One stream: the path of its contract."""

    contract: str


class PositionSettings(_Settings, frozen=True, kw_only=True):
    """Where the gateway is: `static` (lat, lon) or `mqtt` (topic).

    A fix counts for readings up to `max_age_s` younger than it. `home` names the zone of readings without a fix;
    without it they wait in the lane `nowhere`.
    """

    source: Literal["static", "mqtt"]
    lat: float | None = None
    lon: float | None = None
    accuracy_m: float = 0.0
    topic: str | None = None
    max_age_s: float = 600.0
    home: str | None = None


class EndpointSettings(BrokerSettings, frozen=True, kw_only=True):
    """A broker in a region, by the name that zones.geojson uses."""

    name: str


class ReleaseSettings(_Settings, frozen=True, kw_only=True):
    """The release server (HTTPS, or HTTP on loopback) and the trusted first root.json."""

    url: str
    root: str
    ca_file: str | None = None


class BufferSettings(_Settings, frozen=True, kw_only=True):
    """Limits of the durable buffer."""

    bytes_max: int = 1024 * MIB
    history_rows: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20_000


class FlushSettings(_Settings, frozen=True, kw_only=True):
    """When a batch is stored and becomes a block: at so many rows or bytes, or this long after its first message.

    A block of one reading costs some 600 bytes, one of hundreds a twentieth of their JSON: slow sensors on a metered link want a
    longer `ms_max` (a minute, say). Messages are acknowledged to the sensor broker when the batch is stored.
    """

    rows_max: Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)] = 4_096
    bytes_max: Annotated[int, msgspec.Meta(ge=1_024, le=BLOCK_BYTES_MAX // 2)] = 4 * MIB
    ms_max: Annotated[float, msgspec.Meta(ge=0, le=600_000)] = 20.0


class UplinkSettings(_Settings, frozen=True, kw_only=True):
    """Sending blocks: what may be under way per endpoint, and when an unreceipted block goes again."""

    inflight_blocks_max: int = 64
    inflight_bytes_max: int = 8 * MIB
    receipt_timeout_s: float = 30.0
    failback_s: float = 10.0


class MetricsSettings(_Settings, frozen=True, kw_only=True):
    """Prometheus metrics over HTTP; loopback only."""

    listen: str | None = None


class AgentSettings(_Settings, frozen=True, kw_only=True):
    """The whole of agent.toml."""

    device: str
    state_dir: str
    zones: str
    sensors: SensorSettings
    streams: list[StreamSettings]
    position: PositionSettings
    endpoints: list[EndpointSettings]
    releases: ReleaseSettings | None = None
    buffer: BufferSettings = BufferSettings()
    flush: FlushSettings = FlushSettings()
    uplink: UplinkSettings = UplinkSettings()
    metrics: MetricsSettings = MetricsSettings()


@dataclass(frozen=True)
class Tls:
    """TLS to a broker: verify it against `ca_file` (None: the system's), present a client certificate if given."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True)
class Broker:
    """A broker's address and credentials, read and checked."""

    host: str
    port: int
    username: str | None
    password: str | None
    tls: Tls | None
    keepalive_s: int


@dataclass(frozen=True)
class AgentConfig:
    """Everything an agent needs, checked."""

    settings: AgentSettings
    state_dir: Path
    contracts: tuple[StreamContract, ...]
    zones: Zones
    fixed_lane: str | None
    sensors: Broker
    endpoints: dict[str, Broker]
    root: bytes | None
    releases_ca: Path | None

    @property
    def device(self) -> str:
        return self.settings.device


def load(path: Path) -> AgentConfig:
    """Read agent.toml and every document it names.

    Raises:
        ConfigError: something is missing or wrong; the message says what, where and what to do.
    """
    settings = parse_settings(_read(path, "config").decode(errors="replace"), AgentSettings, str(path))
    base = path.resolve().parent
    try:
        check_name(settings.device, "device")
        contracts = tuple(_contract(base / s.contract, settings.device) for s in settings.streams)
        zones = parse_zones(_read(base / settings.zones, "zones"), settings.zones)
        fixed_lane = _fixed_lane(settings.position, zones, path)
    except ContractError as e:
        raise ConfigError(str(e)) from e
    streams = [c.stream for c in contracts]
    taken = [c.stream for c in AGENT_STREAMS]
    if not streams or len(set(streams)) != len(streams) or set(taken).intersection(streams):
        raise ConfigError(f"{path}: streams must be distinct, at least one, and none of {taken}; they are {streams}")
    endpoints = {e.name: _broker(e, base, f"endpoint {e.name!r}") for e in settings.endpoints}
    known = {name for z in zones.zones for name in z.endpoints}
    for name in endpoints:
        if name not in known:
            raise ConfigError(f"{path}: endpoint {name!r} is allowed in no zone of {settings.zones}; zones name {sorted(known)}")
    if not endpoints or len(endpoints) != len(settings.endpoints):
        raise ConfigError(f"{path}: endpoints must have distinct names, at least one; they are {[e.name for e in settings.endpoints]}")
    return AgentConfig(
        settings=settings,
        state_dir=base / settings.state_dir,
        contracts=contracts,
        zones=zones,
        fixed_lane=fixed_lane,
        sensors=_broker(settings.sensors, base, "sensors"),
        endpoints=endpoints,
        root=_read(base / settings.releases.root, "releases.root") if settings.releases else None,
        releases_ca=base / settings.releases.ca_file if settings.releases and settings.releases.ca_file else None,
    )


def _contract(path: Path, device: str) -> StreamContract:
    contract = parse_contract(_read(path, "contract"), path.name)
    return replace(contract, topic=contract.topic.replace("{device}", device))


def _fixed_lane(position: PositionSettings, zones: Zones, path: Path) -> str | None:
    names = [z.name for z in zones.zones]
    if position.home is not None and position.home not in names:
        raise ConfigError(f"{path}: position.home {position.home!r} is not a zone; zones are {', '.join(names)}")
    if position.source == "mqtt":
        if not position.topic:
            raise ConfigError(f"{path}: position.source = 'mqtt' needs position.topic")
        return None
    if position.lat is None or position.lon is None:
        raise ConfigError(f"{path}: position.source = 'static' needs position.lat and position.lon")
    lane = zones.locate(position.lat, position.lon, position.accuracy_m)
    if lane == NOWHERE:
        raise ConfigError(f"{path}: position {position.lat}, {position.lon} lies in no zone; its readings could go nowhere")
    return lane


def _broker(settings: BrokerSettings, base: Path, where: str) -> Broker:
    try:
        url = urlsplit(settings.url)
        port = url.port
    except ValueError as e:  # a port that is no number, an open bracket
        raise ConfigError(f"{where}: url {settings.url!r}: {e}") from e
    if url.scheme not in ("mqtt", "mqtts") or not url.hostname or url.username is not None:
        raise ConfigError(f"{where}: url {settings.url!r} must be mqtt://HOST:PORT or mqtts://HOST:PORT, without a user")
    if settings.password_file is not None and settings.username is None:
        raise ConfigError(f"{where}: password_file needs username too")
    files = [base / f if f else None for f in (settings.ca_file, settings.cert_file, settings.key_file)]
    for file in files:
        if file is not None and not file.is_file():
            raise ConfigError(f"{where}: file {file} does not exist")
    if url.scheme == "mqtt" and any(files):
        raise ConfigError(f"{where}: ca_file, cert_file and key_file need an mqtts:// url, it is {settings.url!r}")
    password = None
    if settings.password_file is not None:
        password = _read(base / settings.password_file, f"{where}.password_file").decode().strip()
    return Broker(
        host=url.hostname,
        port=port or (8883 if url.scheme == "mqtts" else 1883),
        username=settings.username,
        password=password,
        tls=Tls(*files) if url.scheme == "mqtts" else None,
        keepalive_s=settings.keepalive_s,
    )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{what}: cannot read {path}: {e.strerror}; check the path in agent.toml (relative to that file)") from e
