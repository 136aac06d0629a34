"""Rollouts with their table on disk and a simulated fleet: waves, undoing, devices that leave, several who work at the same rollout."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud.rollout import Controller, history, leave, start, status, undo
from cloud.waves import Action, Place, Status
from edge_agent.contract.errors import ConfigError, Reason
from edge_agent.contract.state import BundleRef, Desired, Phase, Reported
from tests.cloud.refs import NEW, OLD, a_ref


@dataclass
class SimulatedFleet:
    """Desired documents per device, and whatever the devices were made to report."""

    desires: dict[str, Desired]
    reports: dict[str, Reported] = field(default_factory=dict)
    asked: list[Action] = field(default_factory=list)

    @classmethod
    def of(cls, *devices: str, ref: BundleRef | None = OLD) -> SimulatedFleet:
        return cls({d: Desired(version=1, bundle=ref) for d in devices})

    def devices(self) -> list[str]:
        return list(self.desires)

    def desired(self, device: str) -> Desired:
        return self.desires[device]

    def set_desired(self, device: str, bundle: BundleRef | None) -> Desired:
        self.asked.append(Action(device, bundle))
        self.desires[device] = Desired(version=self.desires[device].version + 1, bundle=bundle)
        return self.desires[device]

    def all_reported(self) -> dict[str, tuple[Reported, int]]:
        return {device: (report, 0) for device, report in self.reports.items()}

    def report(self, device: str, phase: Phase, active: BundleRef | None = None, reason: Reason | None = None) -> None:
        version = self.desires[device].version
        self.reports[device] = Reported(
            device=device, agent_version="1", desired_version=version, phase=phase, active=active, reason=reason, detail="said so"
        )

    def accept(self, *devices: str) -> None:
        for device in devices:
            self.report(device, Phase.ACTIVE, self.desires[device].bundle)

    def wants(self) -> dict[str, BundleRef | None]:
        return {d: w.bundle for d, w in self.desires.items()}


@dataclass(frozen=True)
class Databases:
    rollouts_db: Path


@pytest.fixture
def state(tmp_path: Path) -> Databases:
    return Databases(tmp_path / "state" / "rollouts.db")


def test_canary_moves_first_and_the_rest_after_it_is_active(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b", "c")
    rollout = start(state, fleet, NEW, now=0.0)
    assert rollout.status is Status.RUNNING
    assert fleet.wants() == {"a": NEW, "b": OLD, "c": OLD}
    control = Controller(state, fleet)
    fleet.report("a", Phase.PROBATION, NEW)
    control.tick(1.0)
    assert fleet.wants()["b"] == OLD, "probation is not yet success"
    fleet.accept("a")
    control.tick(2.0)
    assert fleet.wants() == {"a": NEW, "b": NEW, "c": NEW}
    fleet.accept("b", "c")
    assert [r.status for r in control.tick(3.0)] == [Status.COMPLETE]
    assert control.tick(4.0) == []
    assert status(state).status is Status.COMPLETE


def test_a_large_wave_is_asked_a_part_at_a_time_and_others_have_their_turn(state: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.rollout.HOLD_S", 0.0)  # one device, and then it is somebody else's turn
    fleet = SimulatedFleet.of("a", "b", "c", "d")
    start(state, fleet, NEW, now=0.0)
    fleet.accept("a")
    control = Controller(state, fleet)
    for turn in range(3):
        assert [r.status for r in control.tick(1.0 + turn, patience_s=0.0)] == [Status.RUNNING]
        assert len(fleet.asked) == 2 + turn
    fleet.accept("b", "c", "d")
    assert [r.status for r in control.tick(9.0, patience_s=0.0)] == [Status.COMPLETE]
    assert [action.device for action in fleet.asked] == ["a", "b", "c", "d"]


def test_report_to_an_older_document_does_not_count(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    fleet.report("a", Phase.ROLLED_BACK, OLD, Reason.PROBATION)
    start(state, fleet, NEW, now=0.0)
    (rollout,) = Controller(state, fleet).tick(1.0)
    assert (rollout.status, rollout.failed) == (Status.RUNNING, [])


@pytest.mark.parametrize(("phase", "reason"), [(Phase.REJECTED, Reason.SELF_TEST), (Phase.ROLLED_BACK, Reason.PROBATION)])
def test_refused_bundle_gives_every_moved_device_its_own_previous_bundle_back(state: Databases, phase: Phase, reason: Reason) -> None:
    fleet = SimulatedFleet.of("a", "b", "c")
    fleet.desires["b"] = Desired(version=7, bundle=None)
    start(state, fleet, NEW, now=0.0, canary=2)
    fleet.accept("a")
    fleet.report("b", phase, OLD, reason)
    (rollout,) = Controller(state, fleet).tick(1.0)
    assert rollout.status is Status.FAILED
    assert rollout.failed == ["b"]
    assert reason in rollout.reason and "b" in rollout.reason
    assert fleet.wants() == {"a": OLD, "b": None, "c": OLD}
    assert Action("c", NEW) not in fleet.asked


def test_tolerated_failure_lets_the_rollout_complete(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b", "c")
    start(state, fleet, NEW, now=0.0, failures_allowed=1)
    control = Controller(state, fleet)
    fleet.report("a", Phase.REJECTED, OLD, Reason.SELF_TEST)
    control.tick(1.0)
    fleet.accept("b", "c")
    (rollout,) = control.tick(2.0)
    assert (rollout.status, rollout.failed) == (Status.COMPLETE, ["a"])


def test_late_device_of_an_earlier_wave_still_undoes_the_rollout(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0)
    control = Controller(state, fleet)
    fleet.accept("a")
    control.tick(1.0)
    fleet.report("a", Phase.ROLLED_BACK, OLD, Reason.WORKER_DIED)
    control.tick(2.0)
    assert status(state).status is Status.FAILED
    assert fleet.wants() == {"a": OLD, "b": OLD}


def test_silent_wave_pauses_then_goes_on_when_it_answers(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0, wave_timeout_s=10.0)
    control = Controller(state, fleet)
    assert [r.status for r in control.tick(9.9)] == [Status.RUNNING]
    (paused,) = control.tick(10.0)
    assert (paused.status, paused.reason) == (Status.PAUSED, "wave 1 of 2 waits for a")
    assert fleet.wants()["b"] == OLD
    fleet.accept("a")
    assert [r.status for r in control.tick(11.0)] == [Status.RUNNING]
    assert fleet.wants()["b"] == NEW


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
def test_wave_timeout_that_cannot_be_stored_or_reached_is_refused(state: Databases, timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="positive and finite"):
        start(state, SimulatedFleet.of("d1"), NEW, now=0.0, wave_timeout_s=timeout_s)


def test_operator_undoes_a_complete_rollout(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b", ref=None)
    start(state, fleet, NEW, now=0.0, canary=0)
    fleet.accept("a", "b")
    Controller(state, fleet).tick(1.0)
    rollout = undo(state, fleet, now=2.0)
    assert rollout.status is Status.UNDONE
    assert fleet.wants() == {"a": None, "b": None}
    with pytest.raises(ConfigError, match="already undone"):
        undo(state, fleet, now=3.0)


def test_older_rollout_is_not_undone_under_a_newer_one(state: Databases) -> None:
    fleet = SimulatedFleet.of("a")
    for ref in (NEW, a_ref(3)):
        start(state, fleet, ref, now=0.0)
        fleet.accept("a")
        Controller(state, fleet).tick(1.0)
    with pytest.raises(ConfigError, match="rollout 2 has moved the same devices since"):
        undo(state, fleet, 1, now=2.0)
    undo(state, fleet, 2, now=3.0)
    undo(state, fleet, 1, now=4.0)
    assert fleet.wants() == {"a": OLD}


def test_device_in_an_open_rollout_is_not_taken_by_another(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0, devices=["a"])
    with pytest.raises(ConfigError, match="rollout 1 is running and holds a"):
        start(state, fleet, a_ref(3), now=0.0)
    start(state, fleet, a_ref(3), now=0.0, devices=["b"])
    assert [r.id for r in history(state)] == [1, 2]


def test_devices_that_already_want_the_release_are_left_out(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", ref=NEW)
    rollout = start(state, fleet, NEW, now=0.0)
    assert (rollout.status, rollout.members, fleet.asked) == (Status.COMPLETE, {}, [])


def test_rollout_that_had_nobody_to_move_does_not_hide_the_one_to_undo(state: Databases) -> None:
    fleet = SimulatedFleet.of("a")
    start(state, fleet, NEW, now=0.0)
    again = start(state, fleet, NEW, now=1.0)
    assert (again.id, again.reason) == (2, "every device already wants this release")
    assert status(state).id == 1 and status(state, 2) == again
    assert undo(state, fleet, now=2.0).id == 1
    assert fleet.wants() == {"a": OLD}


def test_unknown_device_and_unknown_rollout_name_the_known_ones(state: Databases) -> None:
    fleet = SimulatedFleet.of("a")
    with pytest.raises(ConfigError, match="unknown: z; known: a"):
        start(state, fleet, NEW, now=0.0, devices=["a", "z"])
    with pytest.raises(ConfigError, match="rollouts: none yet"):
        status(state)
    start(state, fleet, NEW, now=0.0)
    with pytest.raises(ConfigError, match="no rollout 9; rollouts: 1"):
        status(state, 9)


def test_crash_between_intention_and_action_is_made_good(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")

    def fails(device: str, bundle: BundleRef | None) -> Desired:
        raise OSError("power cut")

    works, fleet.set_desired = fleet.set_desired, fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="power cut"):
        start(state, fleet, NEW, now=0.0)
    assert status(state).members["a"].place is Place.MOVING
    fleet.set_desired = works  # type: ignore[method-assign]
    Controller(state, fleet).tick(1.0)
    Controller(state, fleet).tick(2.0)
    assert fleet.asked == [Action("a", NEW)]


def test_undo_in_the_midst_of_a_wave_is_not_moved_over_by_who_moves_it(state: Databases) -> None:
    """The control loop works through a wave while an operator undoes the rollout from another process."""

    class Fleet(SimulatedFleet):
        undoing: threading.Thread | None = None

        def set_desired(self, device: str, bundle: BundleRef | None) -> Desired:
            desired = super().set_desired(device, bundle)
            if self.undoing is None:
                self.undoing = threading.Thread(target=undo, args=(state, self), kwargs={"now": 1.0})
                self.undoing.start()
                self.undoing.join(1.0)  # it either is done, or waits for us
            return desired

    fleet = Fleet.of("a", "b", "c")
    start(state, fleet, NEW, now=0.0, canary=0)
    assert fleet.undoing is not None
    fleet.undoing.join()
    assert Controller(state, fleet).advance(1, 2.0).status is Status.UNDONE
    assert fleet.wants() == {"a": OLD, "b": OLD, "c": OLD}


def test_rollout_that_starts_while_another_is_undone_does_not_bring_its_bundle_back(state: Databases) -> None:
    class Fleet(SimulatedFleet):
        undoing: threading.Thread | None = None

        def desired(self, device: str) -> Desired:
            desired = super().desired(device)
            if desired.bundle == NEW and self.undoing is None:
                self.undoing = threading.Thread(target=attempt)
                self.undoing.start()
                self.undoing.join(1.0)
            return desired

    def attempt() -> None:
        try:
            undo(state, fleet, 1, now=2.0)
        except ConfigError as e:
            refused.append(str(e))

    refused: list[str] = []
    fleet = Fleet.of("a")
    start(state, fleet, NEW, now=0.0)
    fleet.accept("a")
    Controller(state, fleet).tick(1.0)
    start(state, fleet, a_ref(3), now=2.0)
    assert fleet.undoing is not None
    fleet.undoing.join()
    undo(state, fleet, 2, now=3.0)
    assert refused == ["rollout 2 has moved the same devices since; undo it first: fenceline rollout undo 2"]
    assert fleet.wants() == {"a": NEW}


def test_a_device_that_leaves_the_fleet_neither_holds_up_its_wave_nor_counts_in_it(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b", "c", "d")
    start(state, fleet, NEW, now=0.0, canary=2, wave_timeout_s=10.0)
    control = Controller(state, fleet)
    fleet.accept("a")
    assert [r.reason for r in control.tick(11.0)] == ["wave 1 of 2 waits for b"]
    del fleet.desires["b"], fleet.desires["d"]
    (rollout,) = control.tick(12.0)
    assert (rollout.status, rollout.wave, fleet.wants()) == (Status.RUNNING, 1, {"a": NEW, "c": NEW})
    fleet.accept("c")
    (rollout,) = control.tick(13.0)
    assert (rollout.status, rollout.failed, rollout.present) == (Status.COMPLETE, [], {"a", "c"})
    assert rollout.members["b"].place is rollout.members["d"].place is Place.LEFT


def test_the_next_device_stands_in_for_a_canary_that_left_before_it_proved_anything(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b", "c")
    start(state, fleet, NEW, now=0.0)
    del fleet.desires["a"]
    control = Controller(state, fleet)
    control.tick(1.0)
    assert fleet.wants() == {"b": NEW, "c": OLD}
    control.tick(2.0)
    assert fleet.wants()["c"] == OLD, "the new canary has not answered either"
    fleet.accept("b")
    control.tick(3.0)
    assert fleet.wants() == {"b": NEW, "c": NEW}


def test_a_rollout_that_every_device_left_is_over(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0)
    fleet.desires.clear()
    control = Controller(state, fleet)
    control.tick(1.0)
    control.tick(2.0)
    assert status(state).status is Status.COMPLETE and control.tick(3.0) == []


def test_what_a_device_answered_before_it_left_counts(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0, failures_allowed=1)
    control = Controller(state, fleet)
    fleet.report("a", Phase.ROLLED_BACK, OLD, Reason.PROBATION)
    control.tick(1.0)
    del fleet.desires["a"]
    control.tick(2.0)
    fleet.report("b", Phase.ROLLED_BACK, OLD, Reason.PROBATION)
    (rollout,) = control.tick(3.0)
    assert (rollout.status, rollout.failed, fleet.wants()) == (Status.FAILED, ["a", "b"], {"b": OLD})


def test_a_device_that_is_added_again_is_no_part_of_rollouts_of_before(state: Databases) -> None:
    fleet = SimulatedFleet.of("a", "b")
    start(state, fleet, NEW, now=0.0, devices=["a"])
    fleet.accept("a")
    Controller(state, fleet).tick(1.0)
    start(state, fleet, NEW, now=2.0, devices=["b"])
    for device in ("a", "b"):  # nobody had a look at the fleet while they were not there
        leave(state, device)
        fleet.desires[device] = Desired(version=9)
    assert [r.status for r in Controller(state, fleet).tick(3.0)] == [Status.COMPLETE]
    start(state, fleet, a_ref(3), now=4.0, devices=["b"])
    assert undo(state, fleet, 1, now=5.0).status is Status.UNDONE
    assert fleet.wants() == {"a": None, "b": a_ref(3)}


def test_a_device_that_leaves_while_it_is_asked_stops_nobody(state: Databases) -> None:
    class Fleet(SimulatedFleet):
        def desired(self, device: str) -> Desired:
            if device == "b" and self.asked:
                self.desires.pop(device, None)
                raise ConfigError("there is no device 'b'")
            return super().desired(device)

    fleet = Fleet.of("a", "b", "c")
    rollout = start(state, fleet, NEW, now=0.0, canary=0)
    assert (rollout.present, fleet.wants()) == ({"a", "c"}, {"a": NEW, "c": NEW})
