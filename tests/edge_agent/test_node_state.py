"""Sparkplug births over a restart: kept as they were, or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.core.sparkplug_nodes import Nodes
from edge_agent.node_state import NodeState
from tests.edge_agent.sparkplug_sender import DOUBLE, EdgeNode

METRICS = [("speed", 1, DOUBLE), ("flow", 2, DOUBLE)]


def hear(nodes: Nodes, *messages: tuple[str, bytes]) -> None:
    for topic, payload in messages:
        nodes.hear(topic, payload, 65_536)


def test_without_a_file_there_are_no_nodes(tmp_path: Path) -> None:
    assert NodeState(tmp_path / "nodes").load().state == {}


def test_births_and_the_numbers_since_come_back(tmp_path: Path) -> None:
    path, node, nodes = tmp_path / "nodes", EdgeNode(), Nodes()
    keeper = NodeState(path)
    hear(nodes, node.nbirth(), node.dbirth("m-1", METRICS))
    keeper.save(nodes)
    size = path.stat().st_size
    for n in range(300):
        hear(nodes, node.data("m-1", speed=float(n)))
        keeper.save(nodes)
        assert NodeState(path).load().state == nodes.state
    assert path.stat().st_size <= size + 16  # in place
    again = NodeState(path).load()
    hear(again, node.data("m-1", flow=1.0))
    assert again.gaps == []


def test_a_message_missed_while_down_is_a_gap(tmp_path: Path) -> None:
    node, nodes = EdgeNode(), Nodes()
    hear(nodes, node.nbirth(), node.dbirth("m-1", METRICS))
    NodeState(tmp_path / "nodes").save(nodes)
    node.skip()
    again = NodeState(tmp_path / "nodes").load()
    with pytest.raises(PayloadError) as caught:
        hear(again, node.data("m-1", flow=1.0))
    assert caught.value.reason is Reason.SEQUENCE_GAP and len(again.gaps) == 1


def test_a_damaged_file_means_to_wait_for_births(tmp_path: Path, seed: int) -> None:
    path, node, nodes, rng = tmp_path / "nodes", EdgeNode(), Nodes(), random.Random(seed)
    hear(nodes, node.nbirth(), node.dbirth("m-1", METRICS))
    NodeState(path).save(nodes)
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(len(whole))]
    for _ in range(200):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        broken.append(bytes(raw))
    for data in broken:
        path.write_bytes(data)
        assert NodeState(path).load().state == {}


def test_a_disk_that_fails_is_no_reason_to_stop(tmp_path: Path) -> None:
    keeper, node, nodes = NodeState(tmp_path / "away" / "nodes"), EdgeNode(), Nodes()
    hear(nodes, node.nbirth())
    keeper.save(nodes)
    (tmp_path / "away").mkdir()
    keeper.save(nodes)
    assert NodeState(tmp_path / "away" / "nodes").load().state == nodes.state
