"""The updater: from the desired state to the model that runs, and back again when it is bad; and to the zone policy in force.

- A desired document with a lower version than the last one seen is refused; the last one is remembered on disk.
- A bundle becomes active only if the release keys signed it, its bytes are those that the document names, it is meant
  for a stream, contract version and zone of this device, and it passes its self-test here.
- One that fails any of that is rejected: what was active stays, and this desired version is not tried again.
- A repository that does not answer is asked again, with growing waits; what was active stays.
- The previous bundle is kept on disk: `rollback` needs no network.
- A disk that fails ends nothing: what it does not give back was never there, what it does not take is written later.
- A zone policy is taken if the release keys signed it under the version that the document names, and that is not lower than the last
  one accepted (`policy.PolicyStore`). It is fetched before a bundle. A document that only changes the policy leaves the bundle alone.

Its thread does all the work; `handle`, `confirm` and `rollback` only leave a message and return at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge_agent.contract.bundle import Bundle, Manifest, read_bundle
from edge_agent.contract.errors import UNREADABLE, BundleError, Reason, UnavailableError
from edge_agent.contract.state import BundleRef, Desired, Phase
from edge_agent.core.functions import Functions
from edge_agent.inference import WorkerError, self_test
from edge_agent.policy_updates import PolicyUpdates
from edge_agent.releases import RefusedError, Repository, RepositoryConfig
from edge_agent.whole_file import replace_whole, sync

log = logging.getLogger(__name__)

SAVE_RETRY_S = 5.0
RESUME_S = 10.0  # so long are sensors kept waiting for the model that was active: most load in a second or two
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class UpdaterConfig:
    """`contracts`: the contract version of each stream of this device. Waits between attempts grow from min to max.

    `functions`: those of the user's own that are installed here.
    """

    repository: RepositoryConfig
    contracts: Mapping[str, str]
    retry_s_min: float = 1.0
    retry_s_max: float = 60.0
    functions: Functions = field(default_factory=dict)


@dataclass(frozen=True)
class Activation:
    """A bundle to run from now on; it has passed every check. `on_probation` until `confirm`."""

    ref: BundleRef
    bundle: Bundle
    on_probation: bool

    @property
    def sha256(self) -> str:
        return self.ref.sha256


class UpdaterState(msgspec.Struct, frozen=True, kw_only=True):
    """What the updater remembers over a restart, and what `on_report` is told.

    `wanted` is a bundle not yet decided about, `asked` the one of the last document. `reason` and `detail` explain REJECTED, ROLLED_BACK
    and RETRYING.
    """

    desired_version: int = 0
    phase: Phase = Phase.IDLE
    wanted: BundleRef | None = None
    active: BundleRef | None = None
    previous: BundleRef | None = None
    reason: Reason | None = None
    detail: str = ""
    asked: BundleRef | None = None


class Updater:
    """See the module's rules.

    Args:
        store: a directory of its own: bundles by sha256, TUF metadata, `state.json`.
        here: the lane that the device is in now; a bundle that names zones must name all of that lane.
        on_activate: takes the bundle to run now, None for no model. If it raises RefusedError or WorkerError, the bundle is refused.
        on_report: takes the state whenever it has changed; `status` returns it too.
        policies: takes new zone policies; None: they are left alone.

    The callbacks run in the updater's own thread.
    """

    def __init__(
        self,
        config: UpdaterConfig,
        store: Path,
        *,
        here: Callable[[], str],
        on_activate: Callable[[Activation | None], None],
        on_report: Callable[[UpdaterState], None],
        policies: PolicyUpdates | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config, self._store, self._here = config, store, here
        self._on_activate, self._on_report = on_activate, on_report
        self._policies = policies
        self._rng = rng or random.Random()
        self._repository = Repository(config.repository, store / "metadata")
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._retry_s, self._retry_at = 0.0, 0.0
        self._state, self._saved = UpdaterState(), UpdaterState()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)
        self._resumed = threading.Event()
        self.failure: BaseException | None = None

    def status(self) -> UpdaterState:
        """What it would report now."""
        return self._state

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and when the thread has failed (see `failure`)."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Activate what was active before the restart, and go on with what was not finished.

        Returns when the model is ready, so that no reading after a restart lacks its score; after RESUME_S at the latest.
        """
        self._thread.start()
        if not self._resumed.wait(RESUME_S):
            log.warning("model not ready after %s s: readings are stored unscored until it is", RESUME_S)

    def stop(self) -> None:
        """End the thread; a download under way is left behind after a second and begins again at the next start."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join(1.0)

    def handle(self, desired: Desired) -> None:
        """The cloud wants this."""
        self._inbox.put(desired)

    def confirm(self, sha256: str) -> None:
        """The first windows of this bundle were good: its probation is over."""
        self._inbox.put(_Confirm(sha256))

    def rollback(self, sha256: str, reason: Reason, detail: str) -> None:
        """This bundle failed at work: go back to the previous one. Nothing happens if it is not active any more."""
        self._inbox.put(_Rollback(sha256, reason, detail))

    def _run(self) -> None:
        try:
            self._resume()
            self._resumed.set()
            while True:
                message = self._next()
                if isinstance(message, _Stop):
                    return
                self._apply(message)
                self._save()
                due = time.monotonic() >= self._retry_at
                if due and self._policies is not None and self._policies.wanted is not None:
                    self._try_policy(self._policies)
                if due and self._state.wanted is not None:  # a policy that cannot be had holds no bundle up
                    self._try(self._state.wanted)
                    self._save()
        except Exception as e:
            self.failure = e
            self._resumed.set()
            log.exception("updater failed")
            raise

    def _next(self) -> _Message | None:
        """The next message; None when it is time to try the wanted bundle again, or to save the state again."""
        try:
            return self._inbox.get(timeout=self._wait_s())
        except queue.Empty:
            return None

    def _wait_s(self) -> float | None:
        waits = [] if self._state == self._saved else [SAVE_RETRY_S]
        if self._state.wanted is not None or (self._policies is not None and self._policies.wanted is not None):
            waits.append(max(0.001, self._retry_at - time.monotonic()))
        return min(waits, default=None)

    def _apply(self, message: _Message | None) -> None:
        match message:
            case Desired():
                self._take(message)
            case _Confirm(sha256) if self._state.phase is Phase.PROBATION and _is(self._state.active, sha256):
                log.info("bundle proved sha256=%s", sha256)
                self._change(phase=Phase.ACTIVE, reason=None, detail="")
            case _Rollback(sha256, reason, detail) if _is(self._state.active, sha256):
                self._roll_back(reason, detail)

    def _take(self, desired: Desired) -> None:
        state = self._state
        if desired.version <= state.desired_version:
            if desired.version < state.desired_version:
                log.warning("desired state refused version=%s seen=%s reason=%s", desired.version, state.desired_version, Reason.STALE)
            elif self._policies is not None:
                self._policies.want(desired.zones)  # it was refused perhaps, and the repository has been mended since
            return
        log.info("desired state taken version=%s bundle=%s", desired.version, desired.bundle.target if desired.bundle else None)
        version = desired.version
        self._retry_s = self._retry_at = 0.0
        only_policy = self._policies is not None and self._policies.news(desired.zones) and desired.bundle == state.asked
        if self._policies is not None:
            self._policies.want(desired.zones)
        self._state = msgspec.structs.replace(self._state, asked=desired.bundle)
        if only_policy and desired.bundle is not None and state.phase in (Phase.REJECTED, Phase.ROLLED_BACK):
            self._change(desired_version=version)  # only the policy is new: what was decided about the bundle stands
        elif desired.bundle is not None and not _SHA256.fullmatch(desired.bundle.sha256):
            detail = f"sha256 {desired.bundle.sha256!r} of {desired.bundle.target} is not 64 hexadecimal digits"
            self._change(desired_version=version, phase=Phase.REJECTED, wanted=None, reason=Reason.TAMPERED, detail=detail)
        elif desired.bundle is None:
            self._change(desired_version=version, phase=Phase.IDLE, wanted=None, active=None, previous=state.active, reason=None, detail="")
            self._on_activate(None)
        elif state.active == desired.bundle:
            phase = state.phase if state.phase is Phase.PROBATION else Phase.ACTIVE
            self._change(desired_version=version, phase=phase, wanted=None, reason=None, detail="")
        else:
            self._change(desired_version=version, phase=Phase.FETCHING, wanted=desired.bundle, reason=None, detail="")

    def _try(self, ref: BundleRef) -> None:
        """One attempt at the wanted bundle: active, rejected, or to be tried again."""
        try:
            bundle = self._check(ref, self._repository.fetch(ref, self._path(ref)))
            sync(self._path(ref))
            sync(self._path(ref).parent)
            phase = Phase.PROBATION if bundle.manifest.probation_rows else Phase.ACTIVE
            self._on_activate(Activation(ref, bundle, on_probation=phase is Phase.PROBATION))
        except (RefusedError, WorkerError) as e:
            log.warning("bundle rejected target=%s version=%s reason=%s detail=%s", ref.target, self._state.desired_version, e.reason, e)
            self._change(phase=Phase.REJECTED, wanted=None, reason=e.reason, detail=str(e))
        except (UnavailableError, OSError) as e:
            self._wait_longer()
            log.warning("bundle not fetched target=%s retry_s=%.1f error=%s", ref.target, self._retry_s, e)
            self._change(phase=Phase.RETRYING, reason=None, detail=str(e))
            return
        else:
            log.info("bundle activated target=%s sha256=%s", ref.target, ref.sha256)
            self._change(phase=phase, wanted=None, active=ref, previous=self._state.active, reason=None, detail="")
        self._sweep()

    def _wait_longer(self) -> None:
        low, high = self._config.retry_s_min, self._config.retry_s_max
        self._retry_s = min(high, self._rng.uniform(low, max(low, 3 * self._retry_s)))
        self._retry_at = time.monotonic() + self._retry_s

    def _try_policy(self, policies: PolicyUpdates) -> None:
        try:
            policies.fetch(self._repository)
        except (UnavailableError, OSError) as e:
            self._wait_longer()
            log.warning("policy not fetched retry_s=%.1f error=%s", self._retry_s, e)

    def _check(self, ref: BundleRef, data: bytes) -> Bundle:
        """The bundle in signed bytes, if it is meant for this device and works here."""
        try:
            bundle = read_bundle(data)
        except BundleError as e:
            raise RefusedError(Reason.SELF_TEST, str(e)) from e
        manifest = bundle.manifest
        name, want = (manifest.model, manifest.model_version), (ref.model, ref.model_version)
        if name != want:
            raise RefusedError(Reason.FOREIGN, f"bundle holds model {name[0]} version {name[1]}; want {want[0]} version {want[1]}")
        self._check_contract(manifest)
        lane = self._here()
        if manifest.zones and not set(lane.split("_")) <= set(manifest.zones):
            raise RefusedError(Reason.FOREIGN, f"bundle may run in {', '.join(manifest.zones)}; this device is in {lane}")
        try:
            self_test(bundle, self._config.functions)
        except BundleError as e:
            raise RefusedError(Reason.SELF_TEST, str(e)) from e
        return bundle

    def _check_contract(self, manifest: Manifest) -> None:
        version = self._config.contracts.get(manifest.stream)
        if version is None:
            streams = ", ".join(self._config.contracts)
            raise RefusedError(Reason.FOREIGN, f"bundle is for stream {manifest.stream}; this device has {streams}")
        if manifest.contract_version != version:
            contract = f"{manifest.stream} contract version"
            raise RefusedError(Reason.FOREIGN, f"bundle is for {contract} {manifest.contract_version}; this device has {version}")

    def _roll_back(self, reason: Reason, detail: str) -> None:
        failed = self._state.active
        back = self._load_previous()
        log.warning("bundle rolled back from=%s to=%s reason=%s detail=%s", failed, back and back.ref, reason, detail)
        self._change(phase=Phase.ROLLED_BACK, active=back and back.ref, previous=None, reason=reason, detail=detail)
        self._reactivate(back)
        self._sweep()

    def _reactivate(self, activation: Activation | None) -> None:
        try:
            self._on_activate(activation)
        except (RefusedError, WorkerError) as e:
            self._roll_back(e.reason, str(e))

    def _resume(self) -> None:
        self._state = self._saved = _read_state(self._store / "state.json")
        if self._state.active is not None:
            try:
                found = self._load(self._state.active)
            except RefusedError as e:
                self._roll_back(e.reason, str(e))
            else:
                self._reactivate(found)
        self._save()
        self._on_report(self._state)

    def _load_previous(self) -> Activation | None:
        if self._state.previous is None:
            return None
        try:
            return self._load(self._state.previous)
        except RefusedError as e:
            log.error("previous bundle refused reason=%s detail=%s", e.reason, e)
            return None

    def _load(self, ref: BundleRef) -> Activation:
        """A bundle that was active before, from the store; the contracts may be others than they were then.

        Raises:
            RefusedError: its file is not what it was, or it is not for the contracts of this device.
        """
        try:
            data = self._path(ref).read_bytes()
            if hashlib.sha256(data).hexdigest() != ref.sha256:
                raise BundleError(f"it does not hold sha256 {ref.sha256}")
            bundle = read_bundle(data)
        except (OSError, BundleError) as e:
            raise RefusedError(Reason.TAMPERED, f"bundle file {self._path(ref)} is missing or damaged: {e}") from e
        self._check_contract(bundle.manifest)
        return Activation(ref, bundle, on_probation=ref == self._state.active and self._state.phase is Phase.PROBATION)

    def _path(self, ref: BundleRef) -> Path:
        return self._store / "bundles" / f"{ref.sha256}.bundle"

    def _sweep(self) -> None:
        """Delete bundles that are neither active nor previous. One that the disk does not let go is left for the next time."""
        keep = {self._path(ref) for ref in (self._state.active, self._state.previous) if ref is not None}
        try:
            for path in (self._store / "bundles").iterdir():
                if path not in keep:
                    path.unlink()
        except OSError as e:
            log.warning("old bundles not deleted error=%s", e)

    def _change(self, **changes: object) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        if state != self._state:
            self._state = state
            self._on_report(state)

    def _save(self) -> None:
        """Store the state. A disk that fails holds nothing up: it is tried again until it works."""
        if self._state == self._saved:
            return
        try:
            (self._store / "bundles").mkdir(parents=True, exist_ok=True)
            replace_whole(self._store / "state.json", msgspec.json.encode(self._state))
        except OSError as e:
            log.error("updater state not stored error=%s retry_s=%s", e, SAVE_RETRY_S)
            return
        self._saved = self._state


@dataclass(frozen=True)
class _Confirm:
    sha256: str


@dataclass(frozen=True)
class _Rollback:
    sha256: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class _Stop:
    pass


_Message = Desired | _Confirm | _Rollback | _Stop


def _is(ref: BundleRef | None, sha256: str) -> bool:
    return ref is not None and ref.sha256 == sha256


def _read_state(path: Path) -> UpdaterState:
    """The state as saved; a new one if there is none, or none that can be read: then the cloud's document decides anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpdaterState)
    except FileNotFoundError:
        return UpdaterState()
    except OSError as e:
        log.error("updater state unreadable path=%s error=%s", path, e)
        return UpdaterState()
    except UNREADABLE as e:
        aside = path.with_suffix(".damaged")
        log.error("updater state damaged path=%s error=%s moved_to=%s", path, e, aside)
        with contextlib.suppress(OSError):  # a disk that does not let it go: it is replaced when there is something to save
            path.rename(aside)
        return UpdaterState()
