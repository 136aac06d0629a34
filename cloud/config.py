"""Settings of the cloud side: where the project and the state are, and the address of every part.

- The *project* is the directory that holds `pipelines/dvc.yaml` or `fenceline.toml`: `--project`, or the working directory and upward.
- The *state* directory holds everything a stack makes: `--state`, else `FENCELINE_STATE`, else `state` of fenceline.toml.
- Values: defaults, then fenceline.toml (strict keys), then the addresses of a stack that runs on this state (`stack.json`).
- Every service is bound to loopback: the stack is for development. Real brokers and buckets come behind the same settings.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from cloud.roots import Bucket, Roots, parse_roots
from edge_agent.contract.errors import UNREADABLE, ConfigError, ContractError
from edge_agent.contract.topics import check_name
from edge_agent.core.settings import parse_settings

HOST = "127.0.0.1"
MARKERS = (Path("pipelines/dvc.yaml"), Path("fenceline.toml"))
PASSWORD_VARIABLE = "FENCELINE_METADATA_PASSWORD"
WORKERS_MAX = 32
VACUUM_HOURS_MIN = 7 * 24
"""Readers and writers that are at work now need files that were replaced a moment ago. Delta's own default."""
VACUUM_HOURS = 30 * 24
"""As long as Delta keeps its log: what a version needs does not go before the version itself."""
SECONDS_MAX = 366 * 86_400  # a timer takes no number however large
SENSORS, RELEASE, MLFLOW, API = "sensors", "release", "mlflow", "api"


class Tls(msgspec.Struct, frozen=True):
    """TLS to a region's broker, and the certificate that the cloud shows there. `{name}` in a path is the name of the session: the client
    id, which Mosquitto wants to be the CN (each worker needs its own)."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def context(self, name: str) -> ssl.SSLContext:
        """What a session called `name` connects with; the system's authorities are trusted if there is no `ca_file`.

        Raises:
            ConfigError: the files do not load.
        """
        ca, cert, key = (path and path.replace("{name}", name) for path in (self.ca_file, self.cert_file, self.key_file))
        try:
            context = ssl.create_default_context(cafile=ca)
            if cert:
                context.load_cert_chain(cert, key)
        except OSError as e:  # ssl.SSLError is one
            raise ConfigError(f"TLS files ca={ca} cert={cert} key={key} do not load: {e}") from e
        return context


@dataclass(frozen=True)
class Region:
    """A region's broker; `name` is the endpoint name that zones.geojson uses.

    `broker_log` is where that broker writes what it refuses; None: the log of the embedded one. `shared_subscriptions` says that the broker
    knows `$share`: it deals blocks out to the workers; if not, each worker is sent all and keeps those of its own devices.
    """

    name: str
    host: str
    port: int
    broker_log: Path | None = None
    mqtt: int = 4
    tls: Tls | None = None
    shared_subscriptions: bool = False


@dataclass(frozen=True)
class Address:
    """Where a part listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class IngestLimits(msgspec.Struct, frozen=True):
    """One commit holds at most this many blocks, bytes (as they came, and unpacked) and rows (the last block may pass it), and waits at
    most `linger_ms` for more, or until the commit before it is done. A device gets at most one receipt in `receipt_interval_ms`. `workers`
    are the processes of a region in the stack.
    """

    batch_blocks_max: int = 2_048
    batch_bytes_max: int = 64 * 1024 * 1024
    batch_rows_max: int = 262_144
    linger_ms: int = 5
    receipt_interval_ms: int = 50
    workers: int = 1


class QueryLimits(msgspec.Struct, frozen=True):
    """What one query may take, and which zones each user of this machine may see (`cloud.viewers`)."""

    memory_mib_max: int = 1_024
    time_s_max: float = 60.0
    rows_max: int = 1_000_000
    threads: int = 2
    users: dict[str, tuple[str, ...]] = {}


class QualityLimits(msgspec.Struct, frozen=True):
    """How often the lake's completeness and service levels are looked at, and how late a block may be before it counts as missing."""

    check_s: float = 60.0
    grace_s: float = 300.0


@dataclass(frozen=True)
class Settings:
    """What every command and service needs to know; read once, passed in."""

    project: Path
    state_dir: Path
    regions: tuple[Region, ...]
    sensors: Address
    release: Address
    mlflow: Address
    api: Address
    contracts: tuple[Path, ...]
    zones_path: Path
    lake: Roots
    ingest: IngestLimits = field(default_factory=IngestLimits)
    small_files_max: int = 200
    vacuum_hours: int = VACUUM_HOURS
    query: QueryLimits = field(default_factory=QueryLimits)
    quality: QualityLimits = field(default_factory=QualityLimits)
    metadata_url: str | None = None
    live_features: bool = False

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / "keys"

    @property
    def releases_dir(self) -> Path:
        return self.state_dir / "releases"

    @property
    def mlflow_dir(self) -> Path:
        return self.state_dir / "mlflow"

    @property
    def nats_dir(self) -> Path:
        return self.state_dir / "nats"

    @property
    def run_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def logs_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def secrets_dir(self) -> Path:
        return self.state_dir / "secrets"

    @property
    def fleet_db(self) -> Path | str:
        return self.metadata_url or self.state_dir / "fleet.db"

    @property
    def rollouts_db(self) -> Path | str:
        return self.metadata_url or self.state_dir / "rollouts.db"

    @property
    def audit_db(self) -> Path | str:
        return self.metadata_url or self.state_dir / "audit.db"

    @property
    def token_path(self) -> Path:
        return self.state_dir / "api-token"

    @property
    def stack_path(self) -> Path:
        return self.state_dir / "stack.json"

    @property
    def release_url(self) -> str:
        return self.release.url

    @property
    def mlflow_url(self) -> str:
        return self.mlflow.url

    @property
    def api_url(self) -> str:
        return self.api.url

    @property
    def addresses(self) -> dict[str, Address]:
        """Where every part that listens does, by name."""
        fixed = {SENSORS: self.sensors, RELEASE: self.release, MLFLOW: self.mlflow, API: self.api}
        return {**fixed, **{r.name: Address(r.host, r.port) for r in self.regions}}

    @property
    def ports(self) -> dict[str, int]:
        """The port of every part that listens, by name."""
        return {name: address.port for name, address in self.addresses.items()}

    def region(self, name: str) -> Region:
        """The region called `name`, or ConfigError."""
        for region in self.regions:
            if region.name == name:
                return region
        raise ConfigError(f"there is no region {name!r}; fenceline.toml names {', '.join(r.name for r in self.regions)}")

    def with_ports(self, ports: dict[str, int]) -> Settings:
        """The same settings with other ports, by the names of `ports`.

        Raises:
            ConfigError: a name is unknown, a port is not between 1 and 65535, or two parts have one address.
        """
        unknown = sorted(set(ports) - set(self.ports))
        if unknown:
            raise ConfigError(f"unknown ports {', '.join(unknown)}; known: {', '.join(sorted(self.ports))}")
        merged = {**self.ports, **ports}
        changed = replace(
            self,
            regions=tuple(replace(r, port=merged[r.name]) for r in self.regions),
            sensors=replace(self.sensors, port=merged[SENSORS]),
            release=replace(self.release, port=merged[RELEASE]),
            mlflow=replace(self.mlflow, port=merged[MLFLOW]),
            api=replace(self.api, port=merged[API]),
        )
        _check_addresses(changed)
        return changed


class _Address(msgspec.Struct, frozen=True):
    port: int
    host: str = HOST


class _Region(msgspec.Struct, frozen=True):
    name: str
    port: int
    host: str = HOST
    broker_log: str | None = None
    mqtt: Literal[4, 5] = 4
    tls: Tls | None = None
    shared_subscriptions: bool = False


class _Metadata(msgspec.Struct, frozen=True):
    """SQLite files in the state directory, or the PostgreSQL at `url`; its password from a file or FENCELINE_METADATA_PASSWORD."""

    url: str | None = None
    password_file: str | None = None


class _Lake(msgspec.Struct, frozen=True):
    root: str = ""
    zones: dict[str, str] = {}
    buckets: dict[str, Bucket] = {}
    small_files_max: int = 200
    vacuum_hours: int = VACUUM_HOURS


class _Features(msgspec.Struct, frozen=True):
    live: bool = False


class _StackFile(msgspec.Struct, frozen=True):
    """What of stack.json must be there. The number of a process alone is soon another's: `start_ticks` says which one it was."""

    pid: int
    start_ticks: int
    ports: dict[str, int]


class _File(msgspec.Struct, frozen=True):
    """fenceline.toml."""

    state: str = ".fenceline"
    contracts: tuple[str, ...] = ("contracts/turbofan.odcs.yaml",)
    zones: str = "contracts/zones.geojson"
    sensors: _Address = _Address(1883)
    regions: tuple[_Region, ...] = (_Region("eu", 18831), _Region("us", 18832))
    release: _Address = _Address(18880)
    mlflow: _Address = _Address(5000)
    api: _Address = _Address(18800)
    ingest: IngestLimits = IngestLimits()
    lake: _Lake = _Lake()
    query: QueryLimits = QueryLimits()
    quality: QualityLimits = QualityLimits()
    metadata: _Metadata = _Metadata()
    features: _Features = _Features()


def load(project: Path | None = None, state: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        project: the project directory; None looks in the working directory and upward.
        state: the state directory; None asks `FENCELINE_STATE`, then fenceline.toml.

    Raises:
        ConfigError: no project there, a wrong key or value, or two parts with one port.
    """
    root = find_project(project)
    path = root / "fenceline.toml"
    read = parse_settings(read_text(path), _File, str(path)) if path.exists() else _File()
    chosen = state or Path(os.environ.get("FENCELINE_STATE") or root / read.state)
    if chosen.is_file():
        raise ConfigError(f"the state directory {chosen} is a file; give another --state, FENCELINE_STATE or `state` in {path}")
    settings = Settings(
        project=root,
        state_dir=chosen.absolute(),
        regions=tuple(_region(r, root) for r in read.regions),
        sensors=Address(read.sensors.host, read.sensors.port),
        release=Address(read.release.host, read.release.port),
        mlflow=Address(read.mlflow.host, read.mlflow.port),
        api=Address(read.api.host, read.api.port),
        contracts=tuple(root / c for c in read.contracts),
        zones_path=root / read.zones,
        lake=parse_roots(read.lake.root or str(chosen.absolute() / "lake"), read.lake.zones, read.lake.buckets, root, str(path)),
        ingest=read.ingest,
        small_files_max=read.lake.small_files_max,
        vacuum_hours=read.lake.vacuum_hours,
        query=read.query,
        quality=read.quality,
        metadata_url=_metadata_url(read.metadata, root, str(path)),
        live_features=read.features.live,
    )
    _check(settings, str(path))
    stack = running_stack(settings)
    return settings.with_ports(stack["ports"]) if stack else settings


def _region(read: _Region, root: Path) -> Region:
    tls = read.tls and Tls(*(file and str(root / file) for file in (read.tls.ca_file, read.tls.cert_file, read.tls.key_file)))
    log = root / read.broker_log if read.broker_log else None
    return Region(read.name, read.host, read.port, log, read.mqtt, tls, read.shared_subscriptions)


def _metadata_url(read: _Metadata, root: Path, origin: str) -> str | None:
    """The database's URL with its password."""
    if read.url is None:
        return None
    scheme, _, rest = read.url.partition("://")
    user, at, where = rest.rpartition("@")
    if scheme != "postgresql" or not where:  # the URL is not repeated: it may hold a password
        raise ConfigError(f"{origin}: metadata.url must be postgresql://USER@HOST:PORT/DATABASE, or be left out for SQLite")
    if ":" in user or "password=" in read.url.lower():
        raise ConfigError(f"{origin}: metadata.url holds a password; put it in a file (metadata.password_file) or in {PASSWORD_VARIABLE}")
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None and read.password_file is not None:
        password = read_text(root / read.password_file, f"{origin}: metadata.password_file ").strip()
    return f"{scheme}://{user}{':' + quote(password, safe='') if password else ''}{at}{where}"


def read_text(path: Path, what: str = "") -> str:
    """The text of a file that a person wrote; `what` stands before its name in the message.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"{what}{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{what}{path} is not UTF-8 at byte {e.start}; save it as UTF-8") from e


def find_project(project: Path | None = None) -> Path:
    """The project directory, absolute.

    Raises:
        ConfigError: none is found; the message says what was looked for.
    """
    looked = [project.absolute()] if project else [Path.cwd(), *Path.cwd().parents]
    for directory in looked:
        if any((directory / marker).exists() for marker in MARKERS):
            return directory
    wanted = " or ".join(str(m) for m in MARKERS)
    raise ConfigError(f"no Fenceline project in {looked[0]}{'' if project else ' or above'} (want {wanted}); give --project DIR")


def running_stack(settings: Settings) -> dict[str, Any] | None:
    """What `stack.json` says, if the process that wrote it lives; keys: pid, ports, addresses, pids, ready.

    None, too, for a user to whom the state directory is closed: what listens there is not for him, and he may need no more than the lake.

    Raises:
        ConfigError: the file is not a stack's.
    """
    path = settings.stack_path
    try:
        stack: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        running = msgspec.convert(stack, _StackFile)
    except (FileNotFoundError, PermissionError):
        return None
    except UNREADABLE as e:
        raise ConfigError(f"{path} was not written by a stack ({e}); delete it if no stack runs") from e
    return stack if start_ticks(running.pid) == running.start_ticks else None


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None if there is none of this number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(b")")[2].split()[19])  # its name, which may hold anything, stands in parentheses


def _check(settings: Settings, origin: str) -> None:
    try:
        names = [check_name(r.name, "region") for r in settings.regions]
    except ContractError as e:
        raise ConfigError(f"{origin}: {e}") from e
    if not names or len(set(names)) != len(names) or set(names) & {SENSORS, RELEASE, MLFLOW, API}:
        raise ConfigError(f"{origin}: regions {names} must be distinct names, at least one, none of sensors, release, mlflow, api")
    _check_addresses(settings)
    limits = settings.ingest
    times_ms = min(limits.linger_ms, limits.receipt_interval_ms)
    batch = min(limits.batch_blocks_max, limits.batch_bytes_max, limits.batch_rows_max)
    if min(batch, times_ms + 1, settings.small_files_max) < 1:
        raise ConfigError(f"{origin}: limits of [ingest] and [lake] must be positive")
    if settings.vacuum_hours and settings.vacuum_hours < VACUUM_HOURS_MIN:
        raise ConfigError(f"{origin}: lake.vacuum_hours {settings.vacuum_hours} must be at least {VACUUM_HOURS_MIN}, or 0: no vacuum")
    query, quality = settings.query, settings.quality
    if min(query.memory_mib_max, query.time_s_max, query.rows_max, query.threads, quality.check_s, quality.grace_s) <= 0:
        raise ConfigError(f"{origin}: limits of [query] and [quality] must be positive")
    if max(query.time_s_max, quality.check_s, quality.grace_s) > SECONDS_MAX:
        raise ConfigError(f"{origin}: query.time_s_max, quality.check_s and quality.grace_s are seconds, at most {SECONDS_MAX} (a year)")
    if not 1 <= limits.workers <= WORKERS_MAX:
        raise ConfigError(f"{origin}: ingest.workers {limits.workers} is not between 1 and {WORKERS_MAX}")


def _check_addresses(settings: Settings) -> None:
    taken: dict[Address, str] = {}
    for name, address in settings.addresses.items():
        if not 1 <= address.port <= 65_535:
            raise ConfigError(f"port {address.port} of {name} is not between 1 and 65535")
        if address in taken:
            raise ConfigError(f"{taken[address]} and {name} share a port: {address.host}:{address.port}")
        taken[address] = name
