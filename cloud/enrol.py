"""Enrolment: a new device gets a name, a password, and a directory with everything its agent needs; later perhaps another password.

- The directory holds `agent.toml` and, beside it, the contracts, the zones, the first TUF root and two password files: copy
  it to the gateway as it is. Files are 0600. The device may connect from the moment on: running brokers are told.
- A password is in a file before it is in force. A new one lies beside the old one's file until then, takes its place, and the brokers are
  told last: if that is cut off they still take the one that the file holds, until they are told for another reason. `renew` again then.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cloud import brokers, config, files, keys
from cloud.config import Region, Settings
from cloud.fleet import Fleet
from cloud.gate import load_contracts, load_zones, policy_path
from cloud.parts import broker_part
from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.stream import StreamContract
from edge_agent.contract.topics import check_name
from edge_agent.core.zones import Zones


@dataclass(frozen=True)
class Position:
    """Where a gateway stands, in degrees."""

    lat: float
    lon: float


def enrol(settings: Settings, fleet: Fleet, device: str, out: Path | None = None, home: Position | None = None) -> Path:
    """Register `device` and write its agent.toml.

    Args:
        out: where agent.toml goes; None: `<state>/devices/<device>/agent.toml`.
        home: where the gateway stands; None: it moves, and sensors publish its position.

    Returns:
        The path of agent.toml.

    Raises:
        ConfigError: the name is taken or no name, files are in the way, there are no keys, or `home` lies in no zone.
    """
    _check_name(device)
    path = (out or agent_path(settings, device)).absolute()
    if path.exists():
        raise ConfigError(f"{path} exists; give another --out FILE")
    if not keys.is_initialised(settings.keys_dir, settings.releases_dir):
        raise ConfigError(f"the device needs a TUF root to trust; make the keys first: {keys.INIT_COMMAND}")
    zones = load_zones(settings)
    if home is not None and _locate(zones, home) == NOWHERE:
        raise ConfigError(f"position {home.lat}, {home.lon} lies in no zone of {settings.zones_path}")
    contracts = list(zip(settings.contracts, load_contracts(settings).listed, strict=True))
    documents = _files(settings, path, contracts, _agent_toml(settings, device, contracts, home))
    _make_directory(path.parent)

    def deliver(password: str) -> None:
        """Write the directory, agent.toml last."""
        for name, data in {_password_name(device): f"{password}\n".encode(), **documents}.items():
            _write(path.parent / name, data)

    fleet.add(device, deliver)
    reload_brokers(settings, fleet)
    return path


def renew(settings: Settings, fleet: Fleet, device: str, out: Path | None = None) -> Path:
    """Give `device` a new password; the old one ends with the connections that it opened.

    Args:
        out: the password file; None: `<state>/devices/<device>/<device>.password`.

    Returns:
        Its path.

    Raises:
        ConfigError: there is no such device, the file has no place, or no region asks for passwords.
    """
    if all(_by_certificate(region) for region in settings.regions):
        raise ConfigError("the brokers of all regions ask for certificates, not for passwords; renew the device's certificate instead")
    fleet.desired(device)  # a mistaken name leaves no directory behind
    path = (out or password_path(settings, device)).absolute()
    _make_directory(path.parent)
    beside = path.with_name(f".{path.name}.new")
    lock = settings.state_dir / "devices" / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with files.held(lock):  # of two at once, one is the later in the file and in the database
        fleet.renew(device, lambda password: files.write_atomically(beside, f"{password}\n".encode(), private=True))
        beside.replace(path)
    reload_brokers(settings, fleet)
    return path


def agent_path(settings: Settings, device: str) -> Path:
    """Where a device's agent.toml is written, if nothing else is asked for."""
    return settings.state_dir / "devices" / device / "agent.toml"


def password_path(settings: Settings, device: str) -> Path:
    """The password file beside it."""
    return agent_path(settings, device).with_name(_password_name(device))


def reload_brokers(settings: Settings, fleet: Fleet) -> None:
    """Let the brokers know every device: write their users, and tell those that run."""
    brokers.write_users(settings, fleet.passwords)
    stack = config.running_stack(settings)
    pids: dict[str, int] = stack["pids"] if stack else {}
    for region in settings.regions:
        pid = pids.get(broker_part(region.name))
        if pid is not None:
            with suppress(ProcessLookupError):  # it has died: it reads the users when it is started again
                os.kill(pid, signal.SIGHUP)


def _files(settings: Settings, path: Path, contracts: list[tuple[Path, StreamContract]], document: str) -> dict[str, bytes]:
    """What lies beside agent.toml and is not the device's alone, then agent.toml itself."""
    sources = [settings.zones_path, *(p for p, _ in contracts)]
    if path.parent.resolve() in {p.parent.resolve() for p in sources}:
        raise ConfigError(f"{path.parent} holds contracts or zones of the project, which a device's would replace; give another --out FILE")
    published = policy_path(settings)
    pairs = [
        ("zones.geojson", (published if published.exists() else settings.zones_path).read_bytes()),
        ("root.json", keys.root_path(settings.releases_dir).read_bytes()),
        ("sensors.password", f"{brokers.password(settings, brokers.SENSOR_USER)}\n".encode()),
        *((p.name, p.read_bytes()) for p, _ in contracts),
        *((_ca_name(r), Path(r.tls.ca_file).read_bytes()) for r in settings.regions if r.tls and r.tls.ca_file),
        (path.name, document.encode()),
    ]
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path.parent} would hold two files called {', '.join(twice)}; rename a contract, or give another --out FILE")
    return dict(pairs)


def _agent_toml(settings: Settings, device: str, contracts: list[tuple[Path, StreamContract]], home: Position | None) -> str:
    """The file, in the words of edge_agent/config.py. JSON strings and numbers are TOML ones."""
    quoted = json.dumps
    prefixes = {c.topic.split("{device}")[0] for _, c in contracts}
    if len(prefixes) != 1 or not all("{device}/" in c.topic for _, c in contracts):
        named = ", ".join(c.topic for _, c in contracts)
        raise ConfigError(f"sensor topics {named} must share what stands before {{device}}/: one filter keeps their order")
    topics = f"{prefixes.pop()}{device}"
    where = f'source = "static"\nlat = {home.lat}\nlon = {home.lon}' if home else f'source = "mqtt"\ntopic = {quoted(f"{topics}/position")}'
    lines = [
        f"# The agent of {device}, written by `fenceline device add`. Paths start at this file's directory.",
        f"device = {quoted(device)}",
        'state_dir = "state"',
        'zones = "zones.geojson"',
        "",
        "[sensors]",
        f'url = "mqtt://{settings.sensors.host}:{settings.sensors.port}"',
        f"username = {quoted(brokers.SENSOR_USER)}",
        'password_file = "sensors.password"',
        f"subscribe = {quoted(f'{topics}/#')}",
        *(line for p, _ in contracts for line in ("", "[[streams]]", f"contract = {quoted(p.name)}")),
        "",
        "[position]",
        where,
    ]
    for region in settings.regions:
        scheme = "mqtt" if region.tls is None else "mqtts"
        lines += ["", "[[endpoints]]", f"name = {quoted(region.name)}", f'url = "{scheme}://{region.host}:{region.port}"']
        if region.tls and region.tls.ca_file:
            lines.append(f"ca_file = {quoted(_ca_name(region))}")
        if _by_certificate(region):
            lines += [
                "# Put the device's own certificate and its key beside this file: the broker asks for one, its CN is the device's name."
            ]
            lines += [f"cert_file = {quoted(f'{device}.crt')}", f"key_file = {quoted(f'{device}.key')}"]
        else:
            lines += [f"username = {quoted(device)}", f"password_file = {quoted(_password_name(device))}"]
    return "\n".join([*lines, "", "[releases]", f"url = {quoted(settings.release_url)}", 'root = "root.json"', ""])


def _by_certificate(region: Region) -> bool:
    """Whether devices show the region's broker a certificate, and no password."""
    return region.tls is not None and region.tls.cert_file is not None


def _password_name(device: str) -> str:
    """The file beside agent.toml with the device's broker password."""
    return f"{device}.password"


def _ca_name(region: Region) -> str:
    """The file beside agent.toml with the authorities of a region's broker."""
    return f"{region.name}.ca.crt"


def _check_name(device: str) -> None:
    try:
        check_name(device, "device")
    except ContractError as e:
        raise ConfigError(str(e)) from e


def _locate(zones: Zones, home: Position) -> str:
    try:
        return zones.locate(home.lat, home.lon)
    except ContractError as e:
        raise ConfigError(str(e)) from e


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot make {path} for the device's files: {e.strerror}; give another --out FILE") from e
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} is not writable; give another --out FILE")


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # the file may have been there
        file.write(data)
