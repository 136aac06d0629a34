"""The zone policy of the fleet: published as a signed, versioned document, and in force at once in the cloud.

- `publish` checks the document, signs it as the TUF target `zones/zones.geojson` under the next policy version, writes that into the audit
  trail, puts it into force for the gates and the brokers' rights, and asks every device for it. The same document again changes nothing.
- What was cut off is finished by publishing it again; the audit trail may have it twice then, never not at all.
- Versions only rise. To go back, publish the old document: it gets a new version.
- Gates decide by the policy in force here, whatever policy a block was sealed under: what was allowed once and is not any more is refused,
  and waits on the device.
- Before the first publication the file that fenceline.toml names is in force, and devices have the copy that they were enrolled with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cloud import release
from cloud.audit import Audit
from cloud.config import Settings
from cloud.enrol import reload_brokers
from cloud.files import held, write_atomically
from cloud.fleet import Fleet
from cloud.gate import load_zones, policy_path
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.state import ZonesRef
from edge_agent.core.zones import Zones, parse_zones

log = logging.getLogger(__name__)

PUBLISHED = "policy_published"


@dataclass(frozen=True)
class Policy:
    """The policy in force; `ref` is None before the first publication, `devices` says which digest each device reports."""

    path: Path
    zones: Zones
    ref: ZonesRef | None
    devices: dict[str, str]

    @property
    def behind(self) -> list[str]:
        """The devices that work under another policy, or have not said under which."""
        return [name for name, digest in self.devices.items() if digest != self.zones.digest]


def publish(settings: Settings, fleet: Fleet, path: Path, *, now: datetime) -> ZonesRef:
    """Make the zones document at `path` the policy of the fleet.

    Raises:
        ConfigError: it cannot be read, is no policy, names an endpoint that is no region, or there are no keys.
    """
    try:
        document = path.read_bytes()
        zones = parse_zones(document, str(path))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except ContractError as e:
        raise ConfigError(str(e)) from e
    regions = {r.name for r in settings.regions}
    unknown = sorted({e for z in zones.zones for e in z.endpoints} - regions)
    if unknown:
        raise ConfigError(f"{path} names endpoints {', '.join(unknown)}; the regions of fenceline.toml are {', '.join(sorted(regions))}")
    policy_path(settings).parent.mkdir(parents=True, exist_ok=True)
    with held(policy_path(settings).with_name(".lock")):  # of two at once, one is the later in every place
        return _put_into_force(settings, fleet, document, zones, now)


def _put_into_force(settings: Settings, fleet: Fleet, document: bytes, zones: Zones, now: datetime) -> ZonesRef:
    before = fleet.zones()
    ref = release.publish_zones(document, keys_dir=settings.keys_dir, releases_dir=settings.releases_dir, now=now)
    if ref != before:
        allowed = "; ".join(f"{z.name}: {', '.join(z.endpoints) or 'none'}" for z in zones.zones)
        detail = f"version {ref.version} sha256 {ref.sha256}: {allowed}"
        Audit(settings.audit_db).add(PUBLISHED, region="", subject="fleet", reason="", detail=detail)
    write_atomically(policy_path(settings), document)
    fleet.set_zones(ref)
    reload_brokers(settings, fleet)
    if ref != before:
        log.info("policy published version=%d sha256=%s", ref.version, ref.sha256)
    return ref


def show(settings: Settings, fleet: Fleet) -> Policy:
    """The policy in force, and who works under it."""
    reported = fleet.all_reported()
    digests = {name: reported[name][0].policy if name in reported else "" for name in fleet.devices()}
    path = policy_path(settings)
    return Policy(path if path.exists() else settings.zones_path, load_zones(settings), fleet.zones(), digests)
