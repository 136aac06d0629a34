"""The script of faults: each begins once at its share and ends once after its time."""

from __future__ import annotations

from cloud.demo.disturbances import Disturbance, Script


class World:
    """Notes what happens, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def fault(self, name: str, at: float, lasts_s: float) -> Disturbance:
        return Disturbance(name, at, lasts_s, lambda: self.log.append(f"{name} begins"), lambda: self.log.append(f"{name} ends"))


def test_faults_begin_at_their_share_and_end_after_their_time() -> None:
    world = World()
    script = Script([world.fault("late", 0.6, 1.0), world.fault("early", 0.3, 10.0)], lambda text: None, lambda: world.now)
    script.advance(0.29)
    assert world.log == []
    script.advance(0.3)
    assert world.log == ["early begins"]
    world.now = 5.0
    script.advance(0.6)
    assert world.log == ["early begins", "late begins"]
    world.now = 6.0
    script.advance(0.61)
    world.now = 10.0
    script.advance(0.62)
    assert world.log == ["early begins", "late begins", "late ends", "early ends"]


def test_finish_begins_and_ends_what_is_left() -> None:
    world = World()
    script = Script([world.fault("a", 0.5, 0.05), world.fault("b", 1.0, 0.0)], lambda text: None)
    script.finish()
    assert sorted(world.log) == ["a begins", "a ends", "b begins", "b ends"]
    script.advance(1.0)
    assert len(world.log) == 4
