"""The API without a stack: what it answers to those who ask for too much, and while a part of what it shows is broken."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from cloud import config
from cloud.api import build, token
from cloud.config import Settings
from cloud.fleet import Fleet
from edge_agent.contract.errors import ConfigError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return config.load(Path(__file__).parents[2], tmp_path / "state")


def get(settings: Settings, path: str, **params: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(build(settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            return await client.get(path, params=params, headers={"Authorization": f"Bearer {token(settings)}"})

    return asyncio.run(ask())


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "9" * 5_000])
def test_a_limit_that_is_none_is_refused_in_words(settings: Settings, limit: str) -> None:
    answer = get(settings, "/v1/events", limit=limit)
    assert answer.status_code == 400 and "is not between 1 and 1000" in answer.json()["error"]


def test_events_of_one_device_are_found_among_those_of_all(settings: Settings) -> None:
    fleet = Fleet(settings.fleet_db)
    for device in ("d1", "d2", "d2"):
        fleet.record_event(device, b"{}")
    assert [event["device"] for event in get(settings, "/v1/events", device="d1").json()] == ["d1"]
    assert [event["device"] for event in get(settings, "/v1/events").json()] == ["d2", "d2", "d1"]
    assert get(settings, "/v1/events", device="none").json() == []


@pytest.mark.parametrize("path", ["/v1/status", "/metrics"])
def test_a_database_that_is_away_is_named_on_every_page_that_needs_it(settings: Settings, path: str) -> None:
    assert isinstance(settings.fleet_db, Path)
    settings.fleet_db.mkdir(parents=True)
    answer = get(settings, path)
    assert answer.status_code == 503 and "fleet.db" in answer.json()["error"]


def test_an_empty_token_opens_nothing(settings: Settings) -> None:
    settings.state_dir.mkdir()
    settings.token_path.touch()
    with pytest.raises(ConfigError, match="api-token is empty"):
        build(settings)
