"""Models on the whole agent: activated in mid-stream, over restarts and swaps, and given up when they are bad.

What the cloud can check afterwards: sort a stream's readings by ordinal, push them through `Windows` once, run the model that each
block names. The scores must be those of the device in every bit.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from edge_agent.contract.block import ORDINAL, SCORE
from edge_agent.contract.bundle import Bundle, Golden
from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from edge_agent.contract.state import BundleRef, Desired
from edge_agent.core.features import Windows
from tests.brokers import nats_broker
from tests.edge_agent import models
from tests.edge_agent.gateway import START_S, Bench, reading, wait_for
from tests.edge_agent.tuf_repository import TufRepository

FEATURES = [*(Feature("sensor_2", aggregate) for aggregate in ("last", "mean", "std", "slope")), Feature("sensor_11", "max")]
SPEC = FeatureSpec(features=FEATURES, window_rows=7, window_s=40.0)


class Fleet:
    """One gateway with a release repository."""

    def __init__(self, bench: Bench, repository: TufRepository) -> None:
        self.bench, self.repository = bench, repository
        self.bundles: dict[str, Bundle] = {}
        self.version = self.sent = 0
        (bench.path / "root.json").write_bytes(repository.root)
        bench.replace("[position]", f'[releases]\nurl = "{repository.url}"\nroot = "root.json"\n[position]')

    def release(self, version: int, **manifest: Any) -> BundleRef:
        bundle = turbofan_bundle(version, **manifest)
        ref = self.repository.add(bundle)
        self.bundles[ref.sha256] = bundle
        return ref

    def desire(self, ref: BundleRef | None) -> None:
        self.version += 1
        self.bench.cloud.desire(Desired(version=self.version, bundle=ref))

    def publish(self, count: int) -> None:
        """Readings of three engines, some of them late."""
        rng = np.random.default_rng(self.sent)
        for _ in range(count):
            self.sent += 1
            late = 31 if self.sent % 11 == 0 else 0
            value = round(float(rng.normal(640, 2)), 2)
            self.bench.publish(reading(self.sent, engine=f"e{self.sent % 3}", ts=START_S + self.sent - late + 0.25, sensor_2=value))

    def wait_for_phase(self, phase: str, sha256: str | None) -> None:
        def reached() -> bool:
            model = self.bench.status()["model"]
            return model["phase"] == phase and (model["active"] or {}).get("sha256") == sha256

        wait_for(reached, lambda: f"{self.bench.status()['model']}\n{self.bench.log()}")

    def wait_for_readings(self) -> None:
        wait_for(lambda: len(self.bench.cloud.readings()) == self.sent, self.bench.log)

    def device_scores(self) -> tuple[Strings, Ints, dict[str, Any], list[str | None], Floats]:
        """Entity, event time, fields, model and score of every reading, by ordinal."""
        rows: list[tuple[int, str, int, float, float, str | None, float]] = []
        for header, table in self.bench.cloud.arrived("turbofan"):
            scores = table[SCORE] if SCORE in table else np.full(header.rows, np.nan)
            columns = [table[c].tolist() for c in (ORDINAL, "engine", "ts", "sensor_2", "sensor_11")]
            rows += list(zip(*columns, [header.model] * header.rows, scores.tolist(), strict=True))  # type: ignore[union-attr]
        rows.sort()
        assert [r[0] for r in rows] == list(range(len(rows)))
        fields = {"sensor_2": np.array([r[3] for r in rows]), "sensor_11": np.array([r[4] for r in rows])}
        return (
            Strings.of([r[1] for r in rows]),
            np.array([r[2] for r in rows]),
            fields,
            [r[5] for r in rows],
            np.array([r[6] for r in rows]),
        )

    def assert_scores_can_be_made_again(self) -> list[str | None]:
        """Returns the model of each reading."""
        entity, event_us, fields, used, scores = self.device_scores()
        features = Windows(SPEC).push(entity, event_us, fields).features.astype(np.float32)
        want = np.full(len(scores), np.nan)
        for sha256, bundle in self.bundles.items():
            rows = [i for i, model in enumerate(used) if model == sha256]
            if rows:
                session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
                want[rows] = session.run(None, {"x": features[rows]})[0][:, 0]
        np.testing.assert_array_equal(scores, want)
        return used


def turbofan_bundle(version: int, **manifest: Any) -> Bundle:
    weights = (1.0, 0.5, 0.25 * version, 3.0, -0.5)
    rows = 4
    fields = {"sensor_2": [640.0, 641.5, 639.25, 644.0], "sensor_11": [47.0, 47.5, 47.25, 47.125]}
    event_us = [i * 1_000_000 for i in range(rows)]
    features = Windows(SPEC).push(Strings.of(["a"] * rows), np.array(event_us), {k: np.array(v) for k, v in fields.items()}).features
    scores = (features.astype(np.float32) @ np.array(weights, np.float32)).astype(float)
    golden = Golden(
        entity=["a"] * rows, event_us=event_us, fields=dict(fields), features=features.tolist(), scores=scores.tolist(), tolerance=1e-2
    )
    base = models.bundle()
    made = msgspec.structs.replace(
        base.manifest, model_version=str(version), stream="turbofan", features=SPEC, golden=golden, probation_rows=10
    )
    return Bundle(msgspec.structs.replace(made, **manifest), models.linear(weights))


def golden_with(field: str) -> Golden:
    golden = turbofan_bundle(1).manifest.golden
    return msgspec.structs.replace(golden, fields={"sensor_2": golden.fields["sensor_2"], field: golden.fields["sensor_11"]})


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    repository = TufRepository(tmp_path / "repository")
    repository.start()
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        bench = Bench(tmp_path, sensors, eu)
        yield Fleet(bench, repository)
        bench.close()
    repository.stop()


def test_scores_are_those_of_one_pass_over_all_readings_whatever_happened_in_between(fleet: Fleet) -> None:
    bench, first, second = fleet.bench, fleet.release(1), fleet.release(2)
    bench.start()
    fleet.publish(25)
    fleet.desire(first)
    fleet.wait_for_phase("probation", first.sha256)
    fleet.publish(60)
    fleet.wait_for_phase("active", first.sha256)
    bench.kill()
    fleet.publish(15)
    bench.start()
    fleet.publish(20)
    fleet.desire(second)
    fleet.publish(30)
    fleet.wait_for_phase("probation", second.sha256)
    fleet.publish(15)
    bench.kill(signal.SIGTERM)
    fleet.publish(5)
    bench.start()
    fleet.publish(5)
    fleet.wait_for_readings()
    used = fleet.assert_scores_can_be_made_again()
    assert used[0] is None
    assert used[-1] == second.sha256
    assert used.count(first.sha256) >= 75


def test_a_model_whose_first_scores_are_out_of_range_goes_and_the_one_before_comes_back(fleet: Fleet) -> None:
    bench, good, bad = fleet.bench, fleet.release(1), fleet.release(2, score_min=0.0, score_max=1.0)
    bench.start()
    fleet.desire(good)
    fleet.wait_for_phase("probation", good.sha256)
    fleet.publish(20)
    fleet.wait_for_phase("active", good.sha256)
    fleet.desire(bad)
    fleet.wait_for_phase("probation", bad.sha256)
    fleet.publish(20)
    fleet.wait_for_phase("rolled_back", good.sha256)

    def scored_again() -> bool:
        fleet.publish(1)
        return bench.cloud.headers[max(bench.cloud.headers)].model == good.sha256

    wait_for(scored_again, bench.log)
    fleet.wait_for_readings()
    used = fleet.assert_scores_can_be_made_again()
    assert bad.sha256 not in used
    assert used[-1] == good.sha256
    assert used.count(None) >= 1  # those of the failed batch are stored all the same
    wait_for(lambda: bench.cloud.reported.get("phase") == "rolled_back", bench.log)
    assert bench.cloud.reported["reason"] == "probation"


def test_a_model_for_fields_that_the_stream_lacks_is_refused(fleet: Fleet) -> None:
    spec = FeatureSpec(features=[*FEATURES[:4], Feature("vibration", "last")], window_rows=7, window_s=40.0)
    golden = golden_with("vibration")
    bench, foreign = fleet.bench, fleet.release(1, features=spec, golden=golden)
    bench.start()
    fleet.publish(5)
    fleet.desire(foreign)
    fleet.wait_for_phase("rejected", None)
    assert "vibration" in bench.status()["model"]["detail"]
    fleet.publish(5)
    fleet.wait_for_readings()


def test_a_desired_document_that_waits_at_the_broker_is_taken_at_start(fleet: Fleet) -> None:
    bench, first, second = fleet.bench, fleet.release(1), fleet.release(2)
    bench.start()
    fleet.desire(first)
    fleet.wait_for_phase("probation", first.sha256)
    bench.kill()
    fleet.desire(second)
    bench.start()  # the endpoint answers long before the first model has been loaded again
    fleet.wait_for_phase("probation", second.sha256)


def test_a_model_for_another_contract_version_does_not_come_back_after_a_restart(fleet: Fleet) -> None:
    bench, first = fleet.bench, fleet.release(1)
    bench.start()
    fleet.desire(first)
    fleet.wait_for_phase("probation", first.sha256)
    bench.kill(signal.SIGTERM)
    contract = bench.path / "turbofan.odcs.yaml"
    contract.write_text(contract.read_text().replace("version: 1.0.0", "version: 2.0.0"))
    bench.start()
    fleet.wait_for_phase("rolled_back", None)
    fleet.publish(3)
    fleet.wait_for_readings()
    assert set(fleet.assert_scores_can_be_made_again()) == {None}
