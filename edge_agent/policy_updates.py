"""New zone policies, from the name in a desired document to the zones in force; a part of the updater's thread.

- What is wanted is fetched over TUF, checked against what was accepted before, stored, and handed on. What is refused is told to the
  operator, and wanted again only when a document comes again: the repository may have been mended meanwhile.
- A policy that was accepted and is damaged on the disk is wanted from the start.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from edge_agent.contract.errors import Reason
from edge_agent.contract.state import ZonesRef
from edge_agent.core.zones import Zones
from edge_agent.policy import PolicyStore
from edge_agent.releases import RefusedError, Repository

log = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")


class PolicyUpdates:
    """The policy that is wanted, if there is one that is not decided about. `take` gets the zones to use from now on."""

    def __init__(self, store: PolicyStore, take: Callable[[Zones], None], tell: Callable[..., None]) -> None:
        self._store, self._take, self._tell = store, take, tell
        self.wanted: ZonesRef | None = store.ref if store.damaged else None

    def news(self, ref: ZonesRef | None) -> bool:
        """Whether `ref` names another policy than the one accepted last."""
        return ref is not None and (ref != self._store.ref or self._store.damaged)

    def want(self, ref: ZonesRef | None) -> None:
        """The cloud wants this policy; None: no other than there is."""
        if ref is None:
            return
        if not self.news(ref):  # another one that could not be fetched so far is not wanted any more
            self.wanted = None
            return
        try:
            if not _SHA256.fullmatch(ref.sha256):
                raise RefusedError(Reason.TAMPERED, f"sha256 {ref.sha256!r} of {ref.target} is not 64 hexadecimal digits")
            self._store.check(ref)
            self.wanted = ref
        except RefusedError as e:
            self._refuse(ref, e)

    def fetch(self, repository: Repository) -> None:
        """One attempt at the wanted policy: in force, or refused.

        Raises:
            UnavailableError, OSError: try again later.
        """
        ref = self.wanted
        if ref is None:
            return
        try:
            self._store.check(ref)
            zones = self._store.accept(ref, repository.fetch(ref, self._store.path(ref)))
        except RefusedError as e:
            self._refuse(ref, e)
            return
        self.wanted = None
        log.info("policy accepted version=%s sha256=%s", ref.version, ref.sha256)
        self._take(zones)

    def _refuse(self, ref: ZonesRef, error: RefusedError) -> None:
        self.wanted = None
        log.warning("policy refused version=%s reason=%s detail=%s", ref.version, error.reason, error)
        self._tell("policy_refused", version=str(ref.version), reason=error.reason.value, detail=str(error))
