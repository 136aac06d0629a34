"""The agent's settings: `agent.toml`, read once and passed in.

Relative paths start at the file's own directory. Unknown keys are refused, with the nearest known name. The
documents that the file points to (contracts, zones, the TUF root) are read and checked here too, so that an agent either
starts whole or says what to change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from edge_agent.addresses import (
    Broker,
    BrokerSettings,
    Listen,
    SensorSettings,
    Settings,
    Subscription,
    check_covered,
    read_broker,
    read_file,
    read_sensors,
)
from edge_agent.addresses import Tls as Tls
from edge_agent.contract.block import BLOCK_BYTES_MAX, NOWHERE, ROWS_MAX
from edge_agent.contract.errors import UNREADABLE, ConfigError, ContractError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.privacy import PiiKind
from edge_agent.contract.stream import AGENT_STREAMS, StreamContract
from edge_agent.contract.topics import check_name
from edge_agent.core.fix import Position, Precision
from edge_agent.core.functions import Functions
from edge_agent.core.settings import parse_settings
from edge_agent.core.zones import Zones, parse_zones
from edge_agent.installed_functions import load_functions
from edge_agent.key_file import read_keys

MIB = 1024 * 1024
GPSD_PORT = 2947
PII_CREDENTIAL = "pii.key"
AGE_S_MAX = 100 * 365 * 86_400
BATCHES_MIN = 4  # that a buffer which gives up nothing must hold: a batch may take more in it than on the wire


class StreamSettings(Settings, frozen=True, kw_only=True):
    """One stream: the path of its contract, and how exactly its readings may say where they were captured.

    `zone-only`: the lane, and nothing finer is stored anywhere. `rounded` (two decimals of a degree, some 1 km) and `exact` add the
    columns `latitude` and `longitude`. `priority`: of a full buffer, streams of higher ones are kept longer; what was refused
    (quarantine) goes first.
    """

    contract: str
    priority: int = 0
    location: Precision = Precision.ZONE_ONLY


class PositionSettings(Settings, frozen=True, kw_only=True):
    """Where the gateway is: `static` (lat, lon), `mqtt` (topic) or `gpsd` (url).

    A fix counts for readings up to `max_age_s` younger than it, in a circle that grows by `speed_m_s_max` from `accuracy_m`; a
    position that cannot have been reached at that speed is not believed. Set it to the fastest that this device can move.
    `home` names the zone of readings captured before the first fix since boot; without it they wait in the lane `nowhere`.
    `hysteresis_m`: so far inside a zone must a fix be to leave the lane of both, after it was near the border. `accuracy_m`: of the static
    position, or the least that any other is taken for. See core.track.
    """

    source: Literal["static", "mqtt", "gpsd"]
    url: str = "gpsd://127.0.0.1:2947"
    lat: float | None = None
    lon: float | None = None
    accuracy_m: float = 0.0
    topic: str | None = None
    max_age_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600.0
    home: str | None = None
    speed_m_s_max: Annotated[float, msgspec.Meta(gt=0, le=12_000)] = 350.0
    hysteresis_m: Annotated[float, msgspec.Meta(ge=0, le=100_000)] = 50.0
    null_island_refused: bool = False


class EndpointSettings(BrokerSettings, frozen=True, kw_only=True):
    """A broker in a region, by the name that zones.geojson uses."""

    name: str


class ReleaseSettings(Settings, frozen=True, kw_only=True):
    """The release server (HTTPS, or HTTP on loopback) and the trusted first root.json."""

    url: str
    root: str
    ca_file: str | None = None


class BufferSettings(Settings, frozen=True, kw_only=True):
    """Limits of the durable buffer.

    `bytes_max` bounds the file and its log on disk. When it is full, `drop_oldest` gives up waiting blocks (streams of the lowest
    `priority` first, then the oldest) and names them in the loss ledger; `block` holds the sensors instead. `age_s_max` gives up what has
    waited for longer, counted in time that the device was up. `history_rows` of each stream stay after the lake has them: windows are
    rebuilt from them, and readings known that come again after a crash. Of a full buffer they keep at most a quarter. `key_file` (or the
    systemd credential `buffer.key`) holds the keys under which readings are encrypted at rest, one per line; the first seals.
    """

    bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 1024 * MIB
    age_s_max: Annotated[float, msgspec.Meta(gt=0, le=AGE_S_MAX)] | None = None
    when_full: Literal["drop_oldest", "block"] = "drop_oldest"
    history_rows: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20_000
    key_file: str | None = None


class FlushSettings(Settings, frozen=True, kw_only=True):
    """When a batch is stored and becomes a block: at so many rows or bytes, or this long after its first message; up to four times as long
    while messages come in their tens of thousands a second.

    A block of one reading costs some 600 bytes, one of hundreds a twentieth of their JSON: slow sensors on a metered link want a
    longer `ms_max` (a minute, say). Messages are acknowledged to the sensor broker when the batch is stored, so its window of messages in
    flight (Mosquitto: `max_inflight_messages`, by default 20) must hold those of `ms_max`, or it queues them, and drops what does not fit.
    """

    rows_max: Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)] = 4_096
    bytes_max: Annotated[int, msgspec.Meta(ge=1_024, le=BLOCK_BYTES_MAX // 2)] = 4 * MIB
    ms_max: Annotated[float, msgspec.Meta(ge=0, le=600_000)] = 12.0


class UplinkSettings(Settings, frozen=True, kw_only=True):
    """Sending blocks: what may be under way per endpoint, and when an unreceipted block goes again or elsewhere too.

    A block without PUBACK after the deadline of its endpoint (from the round trips measured, at least `deadline_ms_min`) goes to the
    standby too; such copies take at most `hedge_share_max` of the bytes sent. An idle connection is asked every `heartbeat_s` (some 100
    bytes with TLS: a metered link may want a minute). A lane goes back to a better endpoint when that has answered for `failback_s`.
    Reconnects wait at most a twentieth of the outage (a quarter while another endpoint serves), and never more than `backoff_s_max`: with
    N devices on one broker, N / backoff_s_max attempts a second is what it must bear after a long outage.
    `replay_bytes_per_s` throttles the backlog; without it, it takes what live blocks leave.
    """

    inflight_blocks_max: Annotated[int, msgspec.Meta(ge=1, le=16_384)] = 512
    inflight_bytes_max: Annotated[int, msgspec.Meta(ge=BLOCK_BYTES_MAX)] = 8 * MIB
    receipt_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    failback_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    deadline_ms_min: Annotated[float, msgspec.Meta(ge=5, le=60_000)] = 40.0
    hedge_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    heartbeat_s: Annotated[float, msgspec.Meta(ge=0.05, le=3_600)] = 1.0
    backoff_s_max: Annotated[float, msgspec.Meta(ge=0.2, le=3_600)] = 30.0
    replay_bytes_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class PrivacySettings(Settings, frozen=True, kw_only=True):
    """The key of personal fields that contracts say to hash: the first line of `key_file`, or of the systemd credential `pii.key`.

    All devices whose hashed names are to be comparable need the same key. A new key gives new names; the key's id stands in each.
    """

    key_file: str | None = None


class MetricsSettings(Settings, frozen=True, kw_only=True):
    """Prometheus metrics over HTTP; loopback only."""

    listen: str | None = None


class AgentSettings(Settings, frozen=True, kw_only=True):
    """The whole of agent.toml.

    `functions` names an installed module with functions for features; see installed_functions.py.
    """

    device: str
    state_dir: str
    zones: str
    sensors: SensorSettings | list[SensorSettings]
    streams: list[StreamSettings]
    position: PositionSettings
    endpoints: list[EndpointSettings]
    functions: str | None = None
    releases: ReleaseSettings | None = None
    buffer: BufferSettings = BufferSettings()
    flush: FlushSettings = FlushSettings()
    uplink: UplinkSettings = UplinkSettings()
    metrics: MetricsSettings = MetricsSettings()
    privacy: PrivacySettings = PrivacySettings()


@dataclass(frozen=True)
class AgentConfig:
    """Everything an agent needs, checked."""

    settings: AgentSettings
    state_dir: Path
    contracts: tuple[StreamContract, ...]
    zones: Zones
    fixed: Position | None
    sensors: tuple[Subscription | Listen, ...]
    endpoints: dict[str, Broker]
    root: bytes | None
    releases_ca: Path | None
    key_file: Path | None
    functions: Functions
    pii_key: bytes | None = None

    @property
    def device(self) -> str:
        return self.settings.device

    @property
    def fixed_lane(self) -> str | None:
        """The lane of a gateway that does not move, under the policy of agent.toml."""
        return None if self.fixed is None else self.zones.locate(self.fixed.lat, self.fixed.lon, self.fixed.accuracy_m)


def load(path: Path) -> AgentConfig:
    """Read agent.toml and every document it names.

    Raises:
        ConfigError: something is missing or wrong; the message says what, where and what to do.
    """
    try:
        document = path.read_bytes().decode(errors="replace")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; give the agent's settings with --config FILE") from e
    settings = parse_settings(document, AgentSettings, str(path))
    base = path.resolve().parent
    try:
        check_name(settings.device, "device")
        contracts = tuple(_contract(base / s.contract, settings.device) for s in settings.streams)
        zones = parse_zones(read_file(base / settings.zones, "zones"), settings.zones)
        fixed = _fixed(settings.position, zones, path)
    except ContractError as e:
        raise ConfigError(str(e)) from e
    streams = [c.stream for c in contracts]
    taken = [c.stream for c in AGENT_STREAMS]
    if not streams or len(set(streams)) != len(streams) or set(taken).intersection(streams):
        raise ConfigError(f"{path}: streams must be distinct, at least one, and none of {taken}; they are {streams}")
    wanted = BATCHES_MIN * settings.flush.bytes_max
    if settings.buffer.when_full == "block" and settings.buffer.bytes_max < wanted:
        raise ConfigError(
            f"{path}: buffer.bytes_max {settings.buffer.bytes_max} is too small for when_full = 'block': a batch that never fits would "
            f"wait for ever. Give it at least {BATCHES_MIN} times flush.bytes_max, which is {wanted}, or make flush.bytes_max smaller"
        )
    sensors = read_sensors(settings.sensors if isinstance(settings.sensors, list) else [settings.sensors], base, settings.device)
    position = [("the position", settings.position.topic)] if settings.position.source == "mqtt" and settings.position.topic else []
    check_covered(sensors, [(f"stream {c.stream}", f) for c in contracts for f in c.filters] + position)
    endpoints = {e.name: read_broker(e, base, f"endpoint {e.name!r}") for e in settings.endpoints}
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
        fixed=fixed,
        sensors=sensors,
        endpoints=endpoints,
        root=_root(base / settings.releases.root) if settings.releases else None,
        releases_ca=base / settings.releases.ca_file if settings.releases and settings.releases.ca_file else None,
        key_file=_key_file(settings.buffer, base),
        functions=load_functions(settings.functions),
        pii_key=_pii_key(settings.privacy, contracts, base),
    )


def _contract(path: Path, device: str) -> StreamContract:
    contract = parse_contract(read_file(path, "contract"), path.name)
    return replace(contract, topic=contract.topic.replace("{device}", device))


def _root(path: Path) -> bytes:
    """The trusted first root.json. Another file in its place would make every bundle look tampered with."""
    root = read_file(path, "releases.root")
    try:
        kind = msgspec.json.decode(root, type=dict[str, Any])["signed"]["_type"]
    except (*UNREADABLE, KeyError, TypeError):
        kind = None
    if kind != "root":
        raise ConfigError(f"releases.root: {path} is no TUF root; take the root.json that `fenceline device add` wrote")
    return root


def _key_file(buffer: BufferSettings, base: Path) -> Path | None:
    if buffer.key_file is None:
        return None
    read_file(base / buffer.key_file, "buffer.key_file")
    return base / buffer.key_file


def _pii_key(privacy: PrivacySettings, contracts: tuple[StreamContract, ...], base: Path) -> bytes | None:
    """The key that personal fields are hashed under; ConfigError if a contract hashes some and there is none."""
    keys = read_keys(base / privacy.key_file if privacy.key_file else None, PII_CREDENTIAL, "privacy.key_file")
    hashed = [f"{c.stream}.{f.name}" for c in contracts for f in c.private if f.pii and f.pii.kind is PiiKind.HASH]
    if hashed and not keys:
        raise ConfigError(f"{', '.join(hashed)} are hashed: set [privacy] key_file, or give the systemd credential {PII_CREDENTIAL}")
    return keys[0] if keys else None


def _fixed(position: PositionSettings, zones: Zones, path: Path) -> Position | None:
    names = [z.name for z in zones.zones]
    if position.home is not None and position.home not in names:
        raise ConfigError(f"{path}: position.home {position.home!r} is not a zone; zones are {', '.join(names)}")
    if position.source == "mqtt":
        if not position.topic or set(position.topic) & set("+#"):
            raise ConfigError(f"{path}: position.source = 'mqtt' needs position.topic, one without wildcards; it is {position.topic!r}")
        return None
    if position.source == "gpsd":
        gpsd_address(position.url)
        return None
    if position.lat is None or position.lon is None:
        raise ConfigError(f"{path}: position.source = 'static' needs position.lat and position.lon")
    lane = zones.locate(position.lat, position.lon, position.accuracy_m)
    if lane == NOWHERE:
        raise ConfigError(f"{path}: position {position.lat}, {position.lon} lies in no zone; its readings could go nowhere")
    return Position(0, position.lat, position.lon, position.accuracy_m, "static")


def gpsd_address(url: str) -> tuple[str, int]:
    """Host and port of `gpsd://host:port`.

    Raises:
        ConfigError: it is not one.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise ConfigError(f"position.url {url!r}: {e}") from e
    if parts.scheme != "gpsd" or not host or parts.username is not None:
        raise ConfigError(f"position.url {url!r} must be gpsd://HOST:PORT")
    return host, port or GPSD_PORT
