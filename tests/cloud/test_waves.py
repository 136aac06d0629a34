"""The rules of a rollout, alone: some by example, the promises by random fleets that answer, leave and are cut off."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.waves import Action, Member, Place, Rollout, Status, done, plan, step, undone, without_strangers
from edge_agent.contract.errors import ConfigError, Reason
from edge_agent.contract.state import BundleRef, Phase, Reported
from tests.cloud.refs import NEW, OLD, a_ref

FINAL = (Status.COMPLETE, Status.UNDONE, Status.FAILED)
PHASES = st.sampled_from(list(Phase))


@pytest.mark.parametrize(
    ("canary", "sizes"),
    [(1, [1, 4]), (2, [2, 3]), (0.2, [1, 4]), (0.21, [2, 3]), (0.9, [5]), (0, [5]), (5, [5]), (9, [5])],
)
def test_canary_is_a_count_or_a_fraction(canary: float, sizes: list[int]) -> None:
    assert [len(w) for w in plan(list("abcde"), canary)] == sizes


@pytest.mark.parametrize("canary", [-1, 1.5, float("nan"), float("inf")])
def test_canary_that_is_neither_is_refused(canary: float) -> None:
    with pytest.raises(ConfigError, match="canary"):
        plan(["a"], canary)


def test_rollout_whose_first_wave_left_the_fleet_moves_the_next() -> None:
    rollout = Rollout(
        id=1,
        ref=NEW,
        members={"b": Member(wave=1, previous=OLD)},
        waves=2,
        failures_allowed=0,
        wave_timeout_s=60.0,
        created_s=0.0,
        wave_started_s=0.0,
    )
    assert step(rollout, {}, 1.0)[1] == [Action("b", NEW)]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Rollout, dict[str, BundleRef | None]]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    members: dict[str, Member] = {}
    for wave, size in enumerate(sizes):
        for _ in range(size):
            previous = draw(st.sampled_from([None, OLD, a_ref(9)]))
            members[f"d{len(members)}"] = Member(wave=wave, previous=previous)
    rollout = Rollout(
        id=1,
        ref=NEW,
        members=members,
        waves=len(sizes),
        failures_allowed=draw(st.integers(0, 2)),
        wave_timeout_s=draw(st.sampled_from([3.0, 1e9])),
        created_s=0.0,
        wave_started_s=0.0,
    )
    return rollout, {d: m.previous for d, m in members.items()}


def run(rollout: Rollout, wants: dict[str, BundleRef | None], data: st.DataObject, undo_at: int) -> Rollout:
    """Let devices answer, and leave, at random until the rollout ends; checks the promise about waves on the way."""
    versions = dict.fromkeys(wants, 1)
    answered: dict[str, Reported] = {}
    for now in range(40):
        if now == undo_at and rollout.status not in FINAL:
            rollout = undone(rollout, "asked", by_operator=True)
        for device in data.draw(st.lists(st.sampled_from(sorted(wants)), max_size=len(wants) > 1), label="who leaves"):
            del wants[device]
            answered.pop(device, None)
        rollout, actions = step(without_strangers(rollout, wants), answered, float(now))
        assert {a.device for a in actions} <= set(wants), "nothing is asked of who left"
        for action in actions:
            if data.draw(st.booleans(), label="the action is done"):
                wants[action.device], versions[action.device] = action.ref, versions[action.device] + 1
                rollout = done(rollout, action, versions[action.device])
        if rollout.status in FINAL:
            break
        check_waves(rollout, answered)
        for device in data.draw(st.lists(st.sampled_from(sorted(wants))), label="who answers"):
            phase = data.draw(PHASES)
            active = wants[device] if phase in (Phase.ACTIVE, Phase.PROBATION) else OLD
            answered[device] = Reported(
                device=device, agent_version="1", desired_version=versions[device], phase=phase, active=active, reason=Reason.PROBATION
            )
    return rollout


def check_waves(rollout: Rollout, answered: dict[str, Reported]) -> None:
    for member in rollout.members.values():
        assert member.place in (Place.WAITING, Place.LEFT) or member.wave <= rollout.wave, "a later wave is never moved early"


@settings(max_examples=150, deadline=None)
@given(fleets(), st.data(), st.integers(0, 60))
def test_undone_or_failed_rollout_leaves_every_device_with_its_previous_bundle(
    fleet: tuple[Rollout, dict[str, BundleRef | None]], data: st.DataObject, undo_at: int
) -> None:
    rollout, previous = fleet
    wants = dict(previous)
    rollout = run(rollout, wants, data, undo_at)
    if rollout.status in (Status.UNDONE, Status.FAILED):
        assert wants == {d: previous[d] for d in wants}
    if rollout.status is Status.COMPLETE:
        assert {d for d, m in rollout.members.items() if m.place is Place.MOVED} == rollout.present == set(wants)
        assert len(rollout.failed) <= rollout.failures_allowed
        assert set(wants.values()) == {NEW}


@settings(max_examples=150, deadline=None)
@given(fleets(), st.data())
def test_next_wave_moves_only_after_every_device_of_this_one_was_active_or_tolerated(
    fleet: tuple[Rollout, dict[str, BundleRef | None]], data: st.DataObject
) -> None:
    rollout = msgspec.structs.replace(fleet[0], failures_allowed=0)
    answered: dict[str, Reported] = {}
    rollout, actions = step(rollout, answered, 0.0)
    for version in range(2, 2 + rollout.waves):
        moved = {a.device for a in actions}
        assert moved == {d for d, m in rollout.members.items() if m.wave == version - 2}
        for action in actions:
            rollout = done(rollout, action, version)
        for device in data.draw(st.permutations(sorted(moved))):
            before = {d for d, m in rollout.members.items() if m.place is not Place.WAITING}
            rollout, actions = step(rollout, answered, 0.0)
            assert {d for d, m in rollout.members.items() if m.place is not Place.WAITING} == before
            answered[device] = Reported(device=device, agent_version="1", desired_version=version, phase=Phase.ACTIVE, active=NEW)
        rollout, actions = step(rollout, answered, 0.0)
    assert rollout.status is Status.COMPLETE
