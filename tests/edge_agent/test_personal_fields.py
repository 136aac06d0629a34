"""Personal fields through the intake: whatever is sent, what is protected is in nothing that would be stored."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import config
from edge_agent.contract.errors import ConfigError
from edge_agent.core.privacy import Pseudonyms
from edge_agent.core.rejects import from_text, to_text
from edge_agent.intake import Intake, Intaken
from tests.edge_agent.core.test_privacy import KEY, RIDES, rides
from tests.edge_agent.test_config import write
from tests.edge_agent.test_intake import POSITION, make

SECRET = "jane-doe"
GOOD = {"ts": 1_700_000_000, "driver": SECRET, "note": SECRET, "pulse": 71, "weight": 70.3, "born": 1984, "speed": 40}


def intake(tmp_path: Path, topic: str = "sensors/plane-01/rides") -> Intake:
    return Intake((rides(topic=topic),), POSITION, make(tmp_path).fence, 1_000, pseudonyms=Pseudonyms(KEY))


def stored_text(found: Intaken) -> str:
    """Everything of a batch that would reach the disk, as text."""
    texts = [repr((r.topic, r.detail, r.payload)) for r in found.rejected]
    texts += [repr(c.tolist()) for r in found.readings for c in r.table.values()]
    return " ".join(texts)


def test_readings_are_treated_before_they_are_known_again(tmp_path: Path) -> None:
    work = intake(tmp_path)
    found = work.take(["sensors/plane-01/rides"] * 2, [json.dumps(GOOD).encode()] * 2, 1)
    assert len(found.readings[0]) == 1 and found.redelivered == {"rides": 1} and SECRET not in stored_text(found)
    again = intake(tmp_path)  # after a restart the buffer gives treated readings back
    again.remember("rides", found.readings[0].table)
    assert again.take(["sensors/plane-01/rides"], [json.dumps(GOOD).encode()], 2).redelivered == {"rides": 1}


def test_nothing_that_is_refused_gives_the_secret_away(tmp_path: Path, seed: int) -> None:
    work, chance = intake(tmp_path), random.Random(seed)
    whole = json.dumps(GOOD).encode()
    payloads = [whole[: chance.randrange(len(whole))] for _ in range(50)]
    for name in GOOD:
        odd = (SECRET, [SECRET], {"x": SECRET}) if name not in ("ts", "speed") else (None, [1], -1e9)
        payloads += [json.dumps({**GOOD, name: value}).encode() for value in (*odd, None)]
        payloads.append(json.dumps({k: v for k, v in GOOD.items() if k != name}).encode())
    payloads += [whole + whole, b"[" + whole + b"]", json.dumps({**GOOD, "extra": SECRET, "speed": 400}).encode(), SECRET.encode()]
    found = work.take(["sensors/plane-01/rides"] * len(payloads), payloads, 1)
    assert len(found.rejected) > 60 and found.readings and SECRET not in stored_text(found)


def test_a_reading_on_a_wrong_topic_is_withheld(tmp_path: Path) -> None:
    found = intake(tmp_path, "taxis/{driver}/rides").take([f"taxi/{SECRET}/rides"], [json.dumps(GOOD).encode()], 1)
    assert len(found.rejected) == 1 and SECRET not in stored_text(found)


def test_hashed_fields_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    text = path.read_text()
    contract = tmp_path / "rides.yaml"
    contract.write_text(RIDES.replace("ENCODING", "json").replace("TOPIC", "sensors/{device}/turbofan"))
    start = text.index('contract = "')
    text = text[:start] + 'contract = "rides.yaml"' + text[text.index("\n", start) :]
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rides\.driver are hashed: set \[privacy\] key_file"):
        config.load(path)
    (tmp_path / "pii.key").write_text(KEY.hex() + "\n")
    path.write_text(text + '\n[privacy]\nkey_file = "pii.key"\n')
    assert config.load(path).pii_key == KEY
    path.write_text(text)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert config.load(path).pii_key == KEY


def test_only_what_was_treated_is_marked_so(tmp_path: Path) -> None:
    own = b'redacted:{"driver": "jane"}'
    (treated,) = intake(tmp_path).take(["sensors/plane-01/rides"], [json.dumps({**GOOD, "speed": 400}).encode()], 1).rejected
    ride = rides(topic="sensors/plane-01/rides")
    public = replace(ride, fields=tuple(replace(f, pii=None) for f in ride.fields))
    (plain,) = Intake((public,), POSITION, make(tmp_path).fence, 1_000).take([ride.topic], [own], 1).rejected
    assert to_text(treated.payload, treated=treated.treated).startswith("redacted:{")
    assert from_text(to_text(plain.payload, treated=plain.treated)) == own and not plain.treated
