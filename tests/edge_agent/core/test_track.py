"""Positions over time: what is believed, what readings get, and what is stored of it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from edge_agent.contract.block import NOWHERE, FixQuality
from edge_agent.contract.errors import Reason
from edge_agent.core.fix import Fix, Position, Precision, Rules, from_text, stored, to_text
from edge_agent.core.track import FIXES_MAX, Track
from edge_agent.core.zones import Zones, parse_zones
from tests.edge_agent.core.test_zones import policy, square

S = 1_000_000
KM = 1 / 111.0  # degrees of latitude
RULES = Rules(max_age_s=600.0, speed_m_s_max=100.0, hysteresis_m=1_000.0)


@pytest.fixture(scope="module")
def zones() -> Zones:
    """South and north touch at the equator; nothing else is a zone."""
    return parse_zones(policy(south=([square(0, -20, 20, 0)], ["eu"]), north=([square(0, 0, 20, 20)], ["us"])))


def at(second: float, km_north: float, accuracy_m: float = 0.0) -> Position:
    return Position(round(second * S), km_north * KM, 10.0, accuracy_m)


def lanes(track: Track, *seconds: float) -> list[str]:
    return track.stamp(np.array([round(s * S) for s in seconds], np.int64)).tolist()


def test_readings_are_stamped_with_the_fix_in_force_at_their_event_time(zones: Zones) -> None:
    track = Track(zones, Rules(max_age_s=10, speed_m_s_max=12_000.0))
    for second, km in ((20, -1_000), (0, 1_000), (15, -900)):  # any order
        assert track.take(at(second, km)).reason in (None, Reason.IMPOSSIBLE_JUMP)
    track = Track(zones, RULES, fixes=[Fix(s * S, lane) for s, lane in ((20_000, "south"), (0, "north"), (5_000, "south"))])
    assert lanes(track, -1, 0, 4, 600, 600.1, 5_000, 5_600, 5_601, 20_000) == [
        *(NOWHERE, "north", "north", "north", NOWHERE),
        *("south", "south", NOWHERE, "south"),
    ]


def test_a_circle_grows_with_its_age_until_the_next_fix(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, 10))  # the border is 100 s away
    assert lanes(track, 0, 20, 200, 600) == ["north", "north", "north_south", "north_south"]
    track.take(at(150, 11))
    assert lanes(track, 149, 150, 151, 500) == ["north_south", "north", "north", "north_south"]


def test_a_circle_never_grows_too_late(zones: Zones, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        km, age_s = chance.uniform(0.01, 70), chance.uniform(0, 600)
        track = Track(zones, RULES)
        track.take(at(0, km))
        reached = km * 1_000 <= age_s * 100.0 * 0.99
        assert not reached or lanes(track, age_s) == ["north_south"], (km, age_s)


def test_what_is_far_from_every_border_costs_no_steps(zones: Zones) -> None:
    fix = Track(zones, RULES).take(at(0, 500)).fix
    assert fix is not None and fix.later == ()


def test_a_fix_that_wanders_on_the_border_does_not_flap(zones: Zones, seed: int) -> None:
    chance = random.Random(seed)
    track = Track(zones, Rules(speed_m_s_max=50.0, hysteresis_m=200.0))
    track.take(at(0, -5))
    seen = []
    for second in range(100, 400):
        fix = track.take(at(second, chance.uniform(-0.02, 0.02))).fix
        assert fix is not None
        seen.append(fix.lane)
    assert set(seen) <= {"south", "north_south"} and seen.index("north_south") == seen.count("south")  # it changes once
    inside = [track.take(at(500 + 10 * i, km)).fix for i, km in enumerate((0.05, 0.1, 0.15, 0.19, 0.21, 0.15, 0.01))]
    assert [f.lane for f in inside if f] == [*["north_south"] * 4, "north", "north", "north"]


def test_hysteresis_only_ever_widens_the_set(zones: Zones, seed: int) -> None:
    chance = random.Random(seed)
    track = Track(zones, Rules(speed_m_s_max=12_000.0, hysteresis_m=3_000.0))
    for second in range(300):
        position = at(second, chance.uniform(-8, 8), chance.uniform(0, 4_000))
        fix = track.take(position).fix
        assert fix is not None
        assert set(zones.endpoints(fix.lane)) <= set(zones.endpoints(zones.locate(position.lat, position.lon, position.accuracy_m)))


@pytest.mark.parametrize(
    ("position", "reason"),
    [
        (Position(0, math.nan, 10.0), Reason.OUT_OF_RANGE),
        (Position(0, 1.0, math.inf), Reason.OUT_OF_RANGE),
        (Position(0, 1.0, 1.0, math.nan), Reason.OUT_OF_RANGE),
        (Position(0, 1.0, 1.0, -1.0), Reason.OUT_OF_RANGE),
        (Position(0, 0.001, -0.001), Reason.NULL_ISLAND),
        (Position(401 * S, 1.0, 1.0), Reason.FUTURE_FIX),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_fix(zones: Zones, position: Position, reason: Reason) -> None:
    track = Track(zones, Rules(null_island_refused=True))
    taken = track.take(position, now_us=100 * S)
    assert (taken.fix, taken.reason) == (None, reason)
    assert lanes(track, 0, 500) == [NOWHERE, NOWHERE]


def test_null_island_is_a_place_unless_configured(zones: Zones) -> None:
    assert Track(zones, RULES).take(Position(0, 1e-6, 1e-6)).reason is None


def test_a_refusal_names_no_place(zones: Zones) -> None:
    track = Track(zones, Rules(null_island_refused=True))
    track.take(at(0, 12.3456))
    for position in (Position(0, 91.2345, 9.8765), Position(S, 5.4321, 9.8765), Position(0, 0.0001, 0.0)):
        detail = track.take(position, now_us=0).detail
        assert detail and not any(digits in detail for digits in ("91.2", "9.87", "5.43", "12.34"))


def test_an_impossible_jump_puts_both_places_in_doubt_until_a_fix_is_believed_again(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, -300))
    taken = track.take(at(10, 300))  # 600 km in 10 s
    assert taken.reason is Reason.IMPOSSIBLE_JUMP and taken.fix is not None and taken.fix.doubted
    assert lanes(track, 9, 10, 60) == ["south", "north_south", "north_south"]
    track.take(at(20, 301))  # it goes on there
    assert lanes(track, 25, 600, 601) == ["north_south", "north_south", NOWHERE]
    assert track.take(at(30, -299)).reason is None
    assert lanes(track, 29, 30) == ["north_south", "south"]


def test_a_wrong_first_fix_is_outlived(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, 60))  # wrong by 70 km: 700 s at this speed
    reasons = [track.take(at(s, -10)).reason for s in (1, 300, 690, 705)]
    assert reasons == [Reason.IMPOSSIBLE_JUMP] * 3 + [None]
    assert lanes(track, 1, 300, 705) == ["north_south", "north_south", "south"]


def test_a_position_that_says_little_does_not_make_the_next_jump_possible(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, 1_000))
    assert track.take(at(1, 900, accuracy_m=3_000_000.0)).reason is None  # true, but of no use
    assert track.take(at(2, -1_000)).reason is Reason.IMPOSSIBLE_JUMP
    assert lanes(track, 2, 3) == [NOWHERE, NOWHERE]
    assert track.take(at(4, 1_000)).reason is None
    assert lanes(track, 4) == ["north"]


def test_a_position_from_the_far_future_does_not_make_the_next_jump_possible_after_a_restart(zones: Zones) -> None:
    track = Track(zones, RULES)
    kept = [track.take(p).fix for p in (at(0, 1_000), at(1, 1_000), at(1e9, -1_000))]  # nobody knows the time here
    again = Track(zones, RULES, fixes=[stored(f, Precision.ZONE_ONLY) for f in kept if f], anchor=track.anchor)
    assert again.take(at(2, -1_000)).reason is Reason.IMPOSSIBLE_JUMP
    assert "south" not in lanes(again, 2, 3)


def test_after_a_long_silence_the_second_position_is_the_one_to_judge_by(zones: Zones) -> None:
    track = Track(zones, RULES)
    for position in (at(0, 1_000), at(1e6, -1_000), at(1e6 + 10, -1_000)):
        assert track.take(position).reason is None
    assert track.anchor == at(1e6 + 10, -1_000)


def test_a_flood_of_spoofed_positions_does_not_make_the_track_forget_where_it_was(zones: Zones) -> None:
    track = Track(zones, Rules(max_age_s=3_600.0, speed_m_s_max=1.0))
    track.take(at(0, -300))
    for i in range(FIXES_MAX + 10):
        assert track.take(at(1 + i / 10, 300)).reason is Reason.IMPOSSIBLE_JUMP
    assert lanes(track, 300)[0] == "north_south"


def test_a_jump_at_the_time_of_an_accepted_fix_is_doubted_too(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(5, -300))
    assert track.take(at(5, 300)).reason is Reason.IMPOSSIBLE_JUMP
    assert lanes(track, 6) == ["north_south"]


def test_accuracies_count_towards_what_is_possible(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, 10, accuracy_m=2_000))
    assert track.take(at(10, 14, accuracy_m=1_100)).reason is None  # 4 km; 1 km by speed, 3.1 km by doubt
    assert track.take(at(11, 20)).reason is Reason.IMPOSSIBLE_JUMP


def test_without_a_fix_since_boot_readings_wait_unless_a_home_is_named(zones: Zones) -> None:
    assert lanes(Track(zones, RULES), 1, 2) == [NOWHERE, NOWHERE]
    rules = Rules(max_age_s=10, home="south", boot_us=1_000 * S, hysteresis_m=0.0)
    track = Track(zones, rules, fixes=[Fix(500 * S, "north")])
    assert lanes(track, 400, 505, 900) == ["south", "north", "south"]  # before, fresh, of an earlier boot
    assert track.take(at(1_100, 500)).reason is None
    assert lanes(track, 1_099, 1_105, 1_111) == ["south", "north", NOWHERE]  # it moves: what is stale waits, home or not
    stamps = track.stamp(np.array([1_099 * S, 1_105 * S], np.int64))
    assert [track.quality(stamps.values[c], placed=c != 0) for c in stamps.codes] == [FixQuality.NONE, FixQuality.FIX]


def test_qualities_say_how_well_a_place_was_known(zones: Zones) -> None:
    track = Track(zones, RULES)
    assert track.quality("south") is FixQuality.NONE
    track.take(at(0, -300))
    assert [track.quality(lane) for lane in ("south", "north_south", NOWHERE)] == [FixQuality.FIX, FixQuality.UNCERTAIN, FixQuality.NONE]
    fixed = Track(zones, RULES, Position(0, 5.0, 5.0))
    assert fixed.stamp(np.array([1, 2], np.int64)).tolist() == ["north", "north"] and fixed.quality("north") is FixQuality.STATIC


def test_a_fix_from_the_far_future_does_not_decide_alone_where_the_device_is(zones: Zones) -> None:
    track = Track(zones, RULES)  # the clock is not synchronised: nothing to compare with
    track.take(at(10**9, 300))
    track.take(at(10, -300))
    assert track.lane_now() == "north_south"
    assert lanes(track, 11) == ["south"] and track.anchor == at(10, -300)


def test_what_has_no_event_time_is_placed_by_the_time_that_has_passed(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(at(0, 10))
    track.hear(0, 50_000 * S)  # event time and the device's clock differ
    received = [track.lane_now((50_000 + s) * S) for s in (0, 20, 200, 700)]
    assert received == ["north", "north", "north_south", NOWHERE]
    track.hear(700 * S, 50_001 * S)  # readings went on, positions did not
    assert track.lane_now(50_001 * S) == NOWHERE


def test_a_clock_that_was_far_ahead_for_a_while_leaves_no_trace(zones: Zones) -> None:
    """As after a start with a clock at 2038: rejects would have the lane `nowhere` for ever."""
    track = Track(zones, RULES)
    track.take(at(0, 500))
    track.hear(10 * S, 10 * S)
    track.hear(2**31 * S, 2**31 * S)
    assert track.lane_now(2**31 * S) == NOWHERE
    track.hear(20 * S, 20 * S)
    assert track.lane_now(20 * S) == "north"


def test_a_new_policy_places_known_fixes_again(zones: Zones) -> None:
    swapped = parse_zones(policy(south=([square(0, 0, 20, 20)], ["eu"]), north=([square(0, -20, 20, 0)], ["us"])))
    restored = Fix(-(10**4) * S, "south")
    track = Track(zones, RULES, fixes=[restored])
    track.take(at(0, 300))
    track.take(at(1, -300))
    track.adopt(swapped)
    assert lanes(track, -(10**4), 0, 2) == [NOWHERE, "south", NOWHERE]  # no position known; known; doubted
    fixed = Track(zones, RULES, Position(0, 5.0, 5.0))
    fixed.adopt(swapped)
    assert fixed.fixed_lane == "south"


def test_a_new_policy_with_the_same_areas_keeps_fixes_of_unknown_position(zones: Zones) -> None:
    stricter = parse_zones(policy(south=([square(0, -20, 20, 0)], []), north=([square(0, 0, 20, 20)], ["us"])))
    track = Track(zones, RULES, fixes=[Fix(0, "south")])
    track.adopt(stricter)
    assert lanes(track, 1) == ["south"] and track.zones.endpoints("south") == ()


@pytest.mark.parametrize("precision", list(Precision))
def test_a_stored_fix_holds_no_finer_place_than_it_may(zones: Zones, precision: Precision) -> None:
    track = Track(zones, RULES)
    fix = track.take(Position(7 * S, 0.123456, 9.876543, 5.0, "mqtt")).fix
    assert fix is not None
    text = to_text(stored(fix, precision))
    finest = {Precision.ZONE_ONLY: "0.1", Precision.ROUNDED: "0.123", Precision.EXACT: "0.1234567"}[precision]
    assert finest not in text
    again = from_text(7 * S, text)
    assert again is not None
    assert (again.lane, again.later) == (fix.lane, fix.later) and (again.position is None) is (precision is Precision.ZONE_ONLY)
    restarted = Track(zones, RULES, fixes=[again])
    assert lanes(restarted, 7, 100, 607) == lanes(track, 7, 100, 607)


def test_places_are_those_of_the_fix_in_force(zones: Zones) -> None:
    track = Track(zones, RULES)
    track.take(Position(10 * S, 1.23456, 9.87654))
    track.take(Position(20 * S, 9.0, 9.0))  # impossible
    event_us = np.array([9, 10, 15, 25], np.int64) * S
    lat, lon = track.places(event_us, Precision.EXACT)
    np.testing.assert_array_equal(lat, [np.nan, 1.23456, 1.23456, np.nan])
    np.testing.assert_array_equal(lon, [np.nan, 9.87654, 9.87654, np.nan])
    np.testing.assert_array_equal(track.places(event_us, Precision.ROUNDED)[0], [np.nan, 1.23, 1.23, np.nan])


def test_a_position_older_than_all_that_is_remembered_is_refused(zones: Zones) -> None:
    track = Track(zones, RULES, fixes=[Fix(s * S, "south") for s in range(100, 100 + FIXES_MAX)])
    assert track.take(at(99, -300)).reason is Reason.STALE_FIX


def test_a_restart_does_not_make_a_spoofed_position_true(zones: Zones) -> None:
    track = Track(zones, RULES)
    fix = track.take(at(0, -300)).fix
    assert fix is not None
    track.take(at(10, 300))
    assert track.anchor == at(0, -300)
    lane_only = [stored(fix, Precision.ZONE_ONLY)]
    assert Track(zones, RULES, fixes=lane_only).take(at(20, 300)).reason is None  # nothing to compare with
    again = Track(zones, RULES, fixes=lane_only, anchor=track.anchor)
    assert again.take(at(20, 300)).reason is Reason.IMPOSSIBLE_JUMP
    assert lanes(again, 10, 20) == ["south", "north_south"]
    assert again.take(at(30, -300)).reason is None


def test_home_is_not_for_readings_from_before_what_is_remembered(zones: Zones) -> None:
    rules = Rules(home="south")
    track = Track(zones, rules, fixes=[Fix((100 + s) * S, "north") for s in range(FIXES_MAX - 1)])
    assert lanes(track, 99, 100) == ["south", "north"]  # before the first fix
    track.take(at(100 + FIXES_MAX, 300))
    track.take(at(101 + FIXES_MAX, 300))
    assert lanes(track, 99, 101) == [NOWHERE, "north"]  # there were fixes then, forgotten now
    restarted = Track(zones, rules, fixes=[Fix((100 + s) * S, "north") for s in range(FIXES_MAX)])
    assert lanes(restarted, 99) == [NOWHERE]


def test_no_fix_is_taken_for_better_than_the_operator_allows(zones: Zones) -> None:
    track = Track(zones, Rules(accuracy_m_min=5_000.0))
    fix = track.take(at(0, 4.0)).fix
    assert fix is not None and fix.lane == "north_south"
    fix = track.take(at(1_000, 30.0, accuracy_m=20_000.0)).fix
    assert fix is not None and fix.position is not None and fix.position.accuracy_m == 20_000.0
