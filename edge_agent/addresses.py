"""How to reach a broker, and where sensors reach the agent: the settings of connections, read and checked.

- A side of the sensors is a broker that the agent subscribes to (`url` and `subscribe`), or the agent itself (`listen`).
- Beyond loopback, a listener asks who is there (`users_file`, or client certificates of `ca_file`), over TLS.
- Every stream's topic, and the position's, is covered by a side, or its readings would never come.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.sensor_topics import parse_shape

PORTS = {"mqtt": 1883, "mqtts": 8883}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of every table of agent.toml."""


class ConnectionSettings(Settings, frozen=True, kw_only=True):
    """Password and TLS files of a connection."""

    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 30


class BrokerSettings(ConnectionSettings, frozen=True, kw_only=True):
    """How to reach a broker: `mqtt://host:port` or `mqtts://host:port`, with optional password and client certificate."""

    url: str


class SensorSettings(ConnectionSettings, frozen=True, kw_only=True):
    """One side of the sensors: a broker (`url`, `subscribe`), or a listener that sensors connect to themselves (`listen`).

    `subscribe` is one filter for readings and positions: one filter keeps their order. `users_file` holds who may connect to the
    listener (`edge-agent passwd` writes it); with `ca_file` the listener asks for a client certificate too.
    """

    url: str | None = None
    subscribe: str | None = None
    version: Literal[4, 5] = 4
    client_id: str | None = None
    queue_batches_max: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 8
    listen: str | None = None
    users_file: str | None = None
    connections_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 512


@dataclass(frozen=True)
class Tls:
    """TLS to a broker: verify it against `ca_file` (None: the system's), present a client certificate if given.

    Of a listener: present `cert_file`, ask clients for a certificate of `ca_file` if given.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True)
class Broker:
    """A broker's address and credentials, read and checked."""

    host: str
    port: int
    username: str | None
    password: str | None = field(repr=False)
    tls: Tls | None
    keepalive_s: int


@dataclass(frozen=True)
class Subscription:
    """A broker of the sensors and the filter that is subscribed to there."""

    name: str
    broker: Broker
    subscribe: str
    version: Literal[4, 5]
    client_id: str


@dataclass(frozen=True)
class Listen:
    """Where sensors connect to the agent itself."""

    name: str
    host: str
    port: int
    tls: Tls | None
    users_file: Path | None
    connections_max: int


def read_broker(settings: BrokerSettings, base: Path, where: str) -> Broker:
    """A broker's address with its files, which start at `base`.

    Raises:
        ConfigError: a part of it is wrong or missing.
    """
    return _broker(settings.url, settings, base, where)


def read_sensors(settings: list[SensorSettings], base: Path, device: str) -> tuple[Subscription | Listen, ...]:
    """The sides of the sensors.

    Raises:
        ConfigError: there is none, one is neither broker nor listener, or two would be one client of the same broker.
    """
    if not settings:
        raise ConfigError("sensors: there is no side; give [sensors] url and subscribe, or listen")
    names = [f"sensors[{i}]" if len(settings) > 1 else "sensors" for i in range(len(settings))]
    sides = tuple(
        _listen(one, base, where)
        if one.listen is not None
        else _subscription(one, base, where, f"fenceline-{device}{f'-{i}' if i else ''}")
        for i, (one, where) in enumerate(zip(settings, names, strict=True))
    )
    clients = [(s.broker.host, s.broker.port, s.client_id) for s in sides if isinstance(s, Subscription)]
    ports = [(s.host, s.port) for s in sides if isinstance(s, Listen)]
    if len(set(clients)) < len(clients) or len(set(ports)) < len(ports):
        raise ConfigError("sensors: two sides have the same address and client_id and would push each other out; give each its own")
    return sides


def check_covered(sides: tuple[Subscription | Listen, ...], topics: Iterable[tuple[str, str]]) -> None:
    """See that every (what, topic) reaches the agent by some side.

    Raises:
        ConfigError: no side covers a topic.
    """
    if any(isinstance(side, Listen) for side in sides):
        return
    filters = [side.subscribe for side in sides if isinstance(side, Subscription)]
    for what, topic in topics:
        if not any(covers(f, topic) for f in filters):
            raise ConfigError(
                f"sensors: {what} has the topic {topic!r}, which no subscription covers ({', '.join(map(repr, filters))}); "
                f"widen sensors.subscribe, or add a [[sensors]] table with subscribe = {topic!r}"
            )


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that the MQTT filter `narrow` matches is matched by `wide` too.

    >>> covers("sensors/+/temperature", "sensors/a/temperature"), covers("sensors/a/#", "sensors/+/temperature")
    (True, False)
    """
    if wide.startswith("$share/"):
        wide = wide.split("/", 2)[-1]
    if narrow.startswith("$") and wide[:1] in ("+", "#"):
        return False
    ours, theirs = wide.split("/"), narrow.split("/")
    for i, level in enumerate(ours):
        if level == "#":
            return True
        if i >= len(theirs) or theirs[i] == "#" or level not in ("+", theirs[i]):
            return False
    return len(ours) == len(theirs)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _subscription(settings: SensorSettings, base: Path, where: str, client_id: str) -> Subscription:
    if settings.url is None or settings.subscribe is None:
        raise ConfigError(f"{where}: give url and subscribe (a broker), or listen (sensors connect to the agent)")
    if settings.users_file is not None:
        raise ConfigError(f"{where}: users_file belongs to listen; for a broker give username and password_file")
    _check_filter(settings.subscribe, where)
    broker = _broker(settings.url, settings, base, where)
    name = f"{settings.url} {settings.subscribe}"
    return Subscription(name, broker, settings.subscribe, settings.version, settings.client_id or client_id)


def _listen(settings: SensorSettings, base: Path, where: str) -> Listen:
    assert settings.listen is not None
    for key in ("url", "subscribe", "client_id", "username", "password_file"):
        if getattr(settings, key) is not None:
            raise ConfigError(f"{where}: {key} belongs to a broker's url, not to listen; put the broker in a [[sensors]] table of its own")
    scheme, host, port = _address(settings.listen, f"{where}: listen")
    tls = _tls(settings, base, scheme, where)
    if tls is not None and (tls.cert_file is None or tls.key_file is None):
        raise ConfigError(f"{where}: listen {settings.listen!r} needs cert_file and key_file, the listener's certificate")
    users = base / settings.users_file if settings.users_file else None
    if users is not None and not users.is_file():
        raise ConfigError(f"{where}: file {users} does not exist; make it with: edge-agent passwd {users} USER")
    if not is_loopback(host):
        if users is None and (tls is None or tls.ca_file is None):
            raise ConfigError(
                f"{where}: listen {settings.listen!r} is open to the network and asks nobody who he is; "
                "give users_file (passwords) or ca_file (client certificates), or listen on 127.0.0.1"
            )
        if tls is None:
            raise ConfigError(f"{where}: listen {settings.listen!r} would take passwords in the clear over the network; use mqtts://")
    return Listen(settings.listen, host, port, tls, users, settings.connections_max)


def _broker(url: str, settings: ConnectionSettings, base: Path, where: str) -> Broker:
    scheme, host, port = _address(url, f"{where}: url")
    if settings.password_file is not None and settings.username is None:
        raise ConfigError(f"{where}: password_file needs username too")
    password = None
    tls = _tls(settings, base, scheme, where)
    if settings.password_file is not None:
        password = _password(base / settings.password_file, f"{where}.password_file")
    return Broker(host, port, settings.username, password, tls, settings.keepalive_s)


def _check_filter(subscribe: str, where: str) -> None:
    """A broker answers a filter that is none by closing the connection, again and again."""
    bare = subscribe.split("/", 2)[-1] if subscribe.startswith("$share/") else subscribe
    try:
        shape = parse_shape(bare)
    except ContractError as e:
        raise ConfigError(f"{where}: subscribe {subscribe!r} is no filter: {e}") from e
    if shape.names or (bare is not subscribe and subscribe.count("/") < 2):
        raise ConfigError(f"{where}: subscribe {subscribe!r} is no filter; write + for a level that varies, $share/GROUP/FILTER to share")


def _password(path: Path, what: str) -> str:
    try:
        return read_file(path, what).decode().strip()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{what}: {path} is not UTF-8 text; write the password into it, in one line") from e


def _address(url: str, where: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:  # a port that is no number, an open bracket
        raise ConfigError(f"{where} {url!r}: {e}") from e
    more = parts.username is not None or parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in PORTS or not parts.hostname or more or port == 0:
        raise ConfigError(f"{where} {url!r} must be mqtt://HOST:PORT or mqtts://HOST:PORT, without a user, a path or more")
    return parts.scheme, parts.hostname, port or PORTS[parts.scheme]


def _tls(settings: ConnectionSettings, base: Path, scheme: str, where: str) -> Tls | None:
    files = [base / f if f else None for f in (settings.ca_file, settings.cert_file, settings.key_file)]
    for file in files:
        if file is not None and not file.is_file():
            raise ConfigError(f"{where}: file {file} does not exist")
    if scheme == "mqtt" and any(files):
        raise ConfigError(f"{where}: ca_file, cert_file and key_file need an mqtts:// url, it is mqtt://")
    return Tls(*files) if scheme == "mqtts" else None


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a file that agent.toml names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{what}: cannot read {path}: {e.strerror}; check the path in agent.toml (relative to that file)") from e
    except ValueError as e:  # a NUL in it
        raise ConfigError(f"{what}: {str(path)!r} is no path; check it in agent.toml") from e
