"""The phases of the demonstration, in the order in which they run.

collect: run-to-failure data from all gateways, while a broker dies and comes back and an agent is killed and comes back. Aircraft cross
borders meanwhile: what they took before waits for its own region, what they take now flows (`crossing.py`).
train: the pipeline, from the lake to a champion in the registry. release: a signed bundle, rolled out to the whole fleet.
score: new engines, scored on the devices. `verify.py` then looks at what all of it came to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cloud import brokers, labels, mapping, release, replay, rollout
from cloud.config import Settings
from cloud.demo import cmapss, pipeline
from cloud.demo.crossing import Outage
from cloud.demo.disturbances import Disturbance, Script
from cloud.demo.house import House
from cloud.demo.journey import START_S
from cloud.demo.outcome import STREAM, stored_by
from cloud.demo.scenario import Scenario
from cloud.demo.sensors import play
from cloud.gate import load_zones
from cloud.waves import Status
from edge_agent.contract.errors import FencelineError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.state import BundleRef, Phase
from edge_agent.contract.stream import StreamContract

BROKER_KILLED, BROKER_DOWN_S = "eu", 10.0
AGENT_DOWN_S = 3.0
COLLECT_S, SCORE_S = 22.0, 6.0  # how long publishing takes, if the broker keeps up: faults strike while data flows
LAKE_S, ROLLOUT_S = 180.0, 90.0
REFUSED = (Phase.REJECTED, Phase.ROLLED_BACK)


class PromiseError(FencelineError):
    """The demonstration cannot go on, because something that was promised did not happen."""


def collect(house: House, scenario: Scenario) -> Outage:
    """Publish run-to-failure data, with faults, until all of it is in the lake; then add the labels. What crossed borders meanwhile."""
    victim = house.agents[0]
    readings = [m.reading for g in scenario.gateways for m in g.collect if m.reading is not None]
    outage = Outage(BROKER_KILLED, readings, load_zones(house.settings))

    def restore() -> None:
        """Show what waits and what flows, then end the outage."""
        crossings = outage.look(stored_by(house.lake))
        for crossing in crossings:
            house.display.say(crossing.sentence())
        house.restart_broker(BROKER_KILLED)

    broker = Disturbance(
        f"broker {BROKER_KILLED!r} killed",
        0.25,
        BROKER_DOWN_S,
        lambda: house.kill_broker(BROKER_KILLED),
        restore,
    )
    agent = Disturbance(f"agent {victim.device!r} killed with -9", 0.5, AGENT_DOWN_S, lambda: house.kill_agent(victim), victim.start)
    script = Script([broker, agent], house.display.say)
    _publish(house, scenario, "collect", COLLECT_S, script.advance)
    script.finish()
    house.wait_for_rows(scenario.readings("collect"), LAKE_S)
    for crossing in outage.finish(stored_by(house.lake)):
        waited = sum(crossing.waiting.values())
        house.display.say(
            f"{crossing.device}: {sum(crossing.delivered.values())} of those {waited} are in the lake now, by {BROKER_KILLED!r}"
        )
    count = labels.add(house.lake, STREAM, _labels(house, scenario))
    house.display.say(f"{count:,} labels added: remaining cycles of every reading")
    return outage


def train(house: House, overrides: list[str]) -> dict[str, Any]:
    """Run the pipeline; its result.

    Raises:
        PromiseError: the model did not pass the gate, so there is no champion to release.
    """
    result = pipeline.train(house.settings, house.logs / "train.log", house.display.say, overrides)
    if not result["promoted"]:
        raise PromiseError(f"the trained model did not become champion: {'; '.join(result['gate']['reasons'])}; run {result['run_url']}")
    house.display.say(f"{result['model']} version {result['model_version']} is champion; run {result['run_url']}")
    return result


def release_and_roll_out(house: House, model: str) -> BundleRef:
    """Sign the champion, ask the whole fleet for it, and wait until every device has it at work.

    Raises:
        PromiseError: a device refused it.
    """
    settings = house.settings
    ref = release.release(
        model,
        "champion",
        mlflow_url=settings.mlflow_url,
        keys_dir=settings.keys_dir,
        releases_dir=settings.releases_dir,
        now=datetime.now(UTC),
        progress=house.display.say,
    )
    rollout.start(settings, house.fleet, ref, now=time.time(), canary=0)
    house.display.say(f"rollout of {ref.target} started")
    with house.display.counting("devices with the model", len(house.agents)) as advance:
        _wait_for_devices(house, ref, (Phase.PROBATION, Phase.ACTIVE), advance)
    return ref


def score(house: House, scenario: Scenario, ref: BundleRef) -> None:
    """Publish new engines until their readings are in the lake and every device has proved the model."""
    _publish(house, scenario, "score", SCORE_S, lambda share: None)
    house.wait_for_rows(scenario.readings("collect") + scenario.readings("score"), LAKE_S)
    with house.display.counting("devices active", len(house.agents)) as advance:
        _wait_for_devices(house, ref, (Phase.ACTIVE,), advance)
    house.wait("the rollout to be complete", ROLLOUT_S, lambda: rollout.status(house.settings).status is Status.COMPLETE)


def running(house: House, ref: BundleRef, phases: tuple[Phase, ...] = (Phase.ACTIVE,)) -> list[str]:
    """The devices that report `ref` in one of `phases`."""
    reports = house.fleet.all_reported()
    return [device for device, (reported, _) in reports.items() if reported.active == ref and reported.phase in phases]


def _wait_for_devices(house: House, ref: BundleRef, phases: tuple[Phase, ...], advance: Callable[[int], None]) -> None:
    shown = 0

    def poll() -> bool:
        nonlocal shown
        refused = [r for r, _ in house.fleet.all_reported().values() if r.phase in REFUSED]
        if refused:
            raise PromiseError(f"device {refused[0].device} {refused[0].phase} the model: {refused[0].reason}: {refused[0].detail}")
        found = len(running(house, ref, phases))
        advance(found - shown)
        shown = found
        return found == len(house.agents)

    house.wait(f"all devices to report {ref.target} as {' or '.join(phases)}", ROLLOUT_S, poll)


def _publish(house: House, scenario: Scenario, phase: str, lasts_s: float, on_share: Callable[[float], None]) -> None:
    """Publish the messages of a phase in about `lasts_s`, in the product's own way: replay for files, the simulator for flights."""
    settings = house.settings
    journeys: list[list[Any]] = [getattr(g, phase) for g in scenario.gateways]
    total = sum(len(j) for j in journeys)
    address = settings.sensors
    broker = replay.SensorBroker(address.host, address.port, brokers.SENSOR_USER, brokers.password(settings, brokers.SENSOR_USER))
    with house.display.counting("messages acknowledged by the sensor broker", total) as advance:
        shown = 0

        def progress(done: int, _total: int) -> None:
            nonlocal shown
            advance(done - shown)
            shown = done
            on_share(done / total)
            house.check()

        if scenario.files is None:
            play(broker, journeys, total / lasts_s, progress)
            return
        path, columns = _recorded(house, scenario.files, phase)
        contract = _contract(settings)
        done = replay.replay(
            path, columns, contract, broker, [g.device for g in scenario.gateways], rows_per_s=total / lasts_s, progress=progress
        )
    if done.acknowledged != total:
        raise PromiseError(f"replay of {path} had {done.acknowledged} rows acknowledged; the file holds {total}")


def _recorded(house: House, directory: Path, phase: str) -> tuple[Path, mapping.ColumnMapping]:
    """The file of a phase, and its mapping: the product's own, with other names for the engines of each file."""
    name, part = (cmapss.TRAIN, "train") if phase == "collect" else (cmapss.TEST, "test")
    contract = _contract(house.settings)
    columns = mapping.load_mapping("cmapss", house.settings.project)
    start = datetime.fromtimestamp(START_S, UTC)
    return cmapss.find(directory, name), mapping.adjust(columns, contract, entity_prefix=f"fd001-{part}-", start=start)


def _contract(settings: Settings) -> StreamContract:
    contracts = [parse_contract(path.read_bytes(), path.name) for path in settings.contracts]
    return next(c for c in contracts if c.stream == STREAM)


def _labels(house: House, scenario: Scenario) -> pa.Table:
    """Remaining cycles of every reading of the engines that were run to failure."""
    if scenario.files is not None:
        return labels.run_to_failure(*_recorded(house, scenario.files, "collect"))
    readings = [m.reading for g in scenario.gateways for m in g.collect if m.reading is not None]
    lives = {engine.name: engine.life for engine in scenario.train}
    times = np.array([r.key[2] for r in readings], np.int64)
    values = np.array([lives[r.key[1]] - r.cycle for r in readings], np.float64)
    return pa.table(
        [pa.array([r.key[1] for r in readings]), pa.array(times, labels.SCHEMA.field("event_time").type), values], schema=labels.SCHEMA
    )
