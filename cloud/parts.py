"""The parts of a development stack: for each, its command, its environment, and how to see that it is ready."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from cloud import brokers
from cloud.config import HOST, Address, Region, Settings
from cloud.ingest_status import read_worker, status_path
from cloud.workers import Worker, command
from edge_agent.contract.errors import UNREADABLE, ConfigError

T = TypeVar("T")

PROBE_S = 1.0
MLFLOW_ENVIRONMENT = {
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


@dataclass(frozen=True)
class Part:
    """A child process of the stack. `ready` is asked with its process id."""

    name: str
    command: list[str]
    ready: Callable[[int], bool]
    environment: dict[str, str] = field(default_factory=dict)


class _Health(msgspec.Struct):
    """What of an answer to `/healthz` is looked at."""

    connected: bool = False


class _Live(msgspec.Struct):
    """What of the status of the live features is looked at."""

    pid: int = 0
    ready: bool = False


def parts(settings: Settings) -> list[Part]:
    """All parts; each may need those before it, and waits for them by itself."""
    where = settings.addresses
    servers = [Part(broker_part(name), brokers.command(settings, name), _listens(where[name])) for name in brokers.names(settings)]
    workers = [part for region in settings.regions for part in _ingest(settings, region)]
    always = [*servers, *workers, _release(settings), _api(settings), _mlflow(settings)]
    return [*always, _live_features(settings)] if settings.live_features else always


def broker_part(name: str) -> str:
    """The name of the part that is broker `name`."""
    return f"broker-{name}"


def free_ports(settings: Settings) -> Settings:
    """The same settings with ports that are free now."""
    probes = {name: socket.socket() for name in settings.ports}
    try:
        for probe in probes.values():
            probe.bind((HOST, 0))
        return settings.with_ports({name: int(probe.getsockname()[1]) for name, probe in probes.items()})
    finally:
        for probe in probes.values():
            probe.close()


def check_ports(settings: Settings) -> None:
    """Raise ConfigError if a port is taken, or a part would listen beyond loopback (MLflow and the brokers have no TLS here)."""
    for name, address in settings.addresses.items():
        if not _is_loopback(address.host):
            raise ConfigError(f"host {address.host!r} of {name} is not loopback; the development stack listens on {HOST} only")
    for region in settings.regions:
        if region.tls is not None or region.mqtt != 4 or region.shared_subscriptions:
            raise ConfigError(
                f"region {region.name} wants TLS, MQTT 5 or shared subscriptions, and the stack's own broker has none of them; "
                f"for a broker of your own run the parts one by one: fenceline ingest --region {region.name}"
            )
    for name, port in settings.ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as e:
                raise ConfigError(f"port {port} of {name} is taken; give another: --ports {name}=PORT, or --free-ports") from e


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _python(settings: Settings, module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments, "--project", str(settings.project), "--state", str(settings.state_dir)]


def _ingest(settings: Settings, region: Region) -> list[Part]:
    """The workers of a region; the first is called as the region's ingest."""
    count = settings.ingest.workers
    return [_worker(settings, region, Worker(number, count)) for number in range(1, count + 1)]


def _worker(settings: Settings, region: Region, worker: Worker) -> Part:
    def ready(pid: int) -> bool:
        status = read_worker(status_path(settings, region.name, worker.name))
        return status is not None and status.pid == pid and status.connected

    name = f"ingest-{region.name}" if worker.first else f"ingest-{region.name}-{worker.number}"
    return Part(name, command(settings, region.name, worker), ready)


def _release(settings: Settings) -> Part:
    return Part("release", _python(settings, "cloud.release_server"), _listens(settings.release))


def _api(settings: Settings) -> Part:
    def ready(pid: int) -> bool:
        answer = _get(f"{settings.api_url}/healthz")
        return answer is not None and _decoded(answer.content, _Health, _Health()).connected

    return Part("api", _python(settings, "cloud.api"), ready)


def _mlflow(settings: Settings) -> Part:
    directory = settings.mlflow_dir
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    listen = ["--host", settings.mlflow.host, "--port", str(settings.mlflow.port)]
    stores = ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", str(directory / "artifacts")]
    return Part("mlflow", [*command, *listen, *stores], lambda pid: _get(f"{settings.mlflow_url}/health") is not None, MLFLOW_ENVIRONMENT)


def _live_features(settings: Settings) -> Part:
    path = settings.run_dir / "features-live.json"

    def ready(pid: int) -> bool:
        try:
            status = _decoded(path.read_bytes(), _Live, _Live())
        except FileNotFoundError:
            return False
        return status.pid == pid and status.ready

    return Part("features-live", _python(settings, "pipelines.live"), ready)


def environment(part: Part) -> dict[str, str]:
    """The environment of a part: ours, and its own. The project may be a directory without our code."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.environment}


def _listens(address: Address) -> Callable[[int], bool]:
    def ready(pid: int) -> bool:
        try:
            socket.create_connection((address.host, address.port), PROBE_S).close()
        except OSError:
            return False
        return True

    return ready


def _decoded(data: bytes, kind: type[T], otherwise: T) -> T:
    """A document of a part; `otherwise` if another program has taken its place, or it is half written."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE:
        return otherwise


def _get(url: str) -> httpx.Response | None:
    try:
        answer = httpx.get(url, timeout=PROBE_S, trust_env=False)
    except httpx.HTTPError:  # nobody there, or somebody else
        return None
    return answer if answer.status_code == httpx.codes.OK else None
