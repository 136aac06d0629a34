"""The zone policy on the device's disk: what the fleet has published, kept over restarts.

- `policy.json` names the policy that was accepted last (`ZonesRef`); `<sha256>.geojson` beside it is the document. The name is replaced
  last and whole, so a power cut leaves the old policy or the new one.
- A version lower than the last accepted one is stale; the same version with another document is tampered with.
- A document that is damaged is not replaced by an older one: until it is fetched again, its zones allow no endpoint and everything waits.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError, Reason
from edge_agent.contract.state import ZonesRef
from edge_agent.core.zones import Zones, parse_zones
from edge_agent.releases import RefusedError
from edge_agent.whole_file import replace_whole

log = logging.getLogger(__name__)


class PolicyStore:
    """The policies in `directory`. `ref` names the last accepted one; None: none was ever, or its name is damaged too."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.damaged = False
        self.ref: ZonesRef | None = self._read_ref()

    def load(self, first: Zones) -> Zones:
        """The policy to start with: the stored one, or `first` if none was ever stored; see the rules for a damaged one."""
        if self.ref is None and not self.damaged:
            return first
        try:
            if self.ref is not None:
                return self._parse(self.path(self.ref).read_bytes(), self.ref)
        except (OSError, RefusedError) as e:
            log.error("stored policy damaged error=%s: everything waits until it is fetched again", e)
            self.damaged = True
        return first.without_endpoints()

    def path(self, ref: ZonesRef) -> Path:
        """Where the document of `ref` lies, or is to be put."""
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory / f"{ref.sha256}.geojson"

    def check(self, ref: ZonesRef) -> None:
        """Raise RefusedError if `ref` is older than what was accepted, or another document under the same version."""
        known = self.ref
        if known is not None and ref.version < known.version:
            raise RefusedError(Reason.STALE, f"zone policy version {ref.version} is older than version {known.version}")
        if known is not None and ref.version == known.version and ref.sha256 != known.sha256:
            raise RefusedError(Reason.TAMPERED, f"zone policy version {ref.version} was accepted with another document")

    def accept(self, ref: ZonesRef, document: bytes) -> Zones:
        """Keep a signed document as the policy; its zones.

        Raises:
            RefusedError: it is no zone policy, or not the document of `ref`.
            OSError: the disk does not take it.
        """
        zones = self._parse(document, ref)
        replace_whole(self.path(ref), document)
        replace_whole(self._directory / "policy.json", msgspec.json.encode(ref))
        self.ref, self.damaged = ref, False
        self._sweep(self.path(ref))
        return zones

    def _sweep(self, keep: Path) -> None:
        """Delete older documents. One that the disk does not let go holds nothing up."""
        try:
            for path in self._directory.glob("*.geojson"):
                if path != keep:
                    path.unlink()
        except OSError as e:
            log.warning("old policies not deleted error=%s", e)

    def _parse(self, document: bytes, ref: ZonesRef) -> Zones:
        if hashlib.sha256(document).hexdigest() != ref.sha256:
            raise RefusedError(Reason.TAMPERED, f"zone policy version {ref.version} does not hold sha256 {ref.sha256}")
        try:
            return parse_zones(document, f"zone policy version {ref.version}")
        except ContractError as e:
            raise RefusedError(Reason.MALFORMED, str(e)) from e

    def _read_ref(self) -> ZonesRef | None:
        path = self._directory / "policy.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=ZonesRef)
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as e:
            log.error("name of the stored policy damaged path=%s error=%s", path, e)
            self.damaged = True
            return None
