"""The oracle of bench/edge_ingest.py: it must see every reading that is lost, repeated or changed."""

from __future__ import annotations

import numpy as np

from bench.peers.sensors import CONTRACT, Checked, check, payload
from edge_agent.contract.columns import Table, take
from edge_agent.contract.odcs import parse_contract
from edge_agent.core.decode import Decoder
from edge_agent.core.validate import validate

COUNT = 2_000  # more than any channel has different values


def table() -> Table:
    contract = parse_contract(CONTRACT, "vibration")
    decoded = Decoder(contract).decode([payload(i) for i in range(COUNT)])
    assert not decoded.rejects
    assert validate(contract, decoded.table)[0].all()
    return decoded.table


def test_all_readings_as_published_are_right_in_any_order_and_cut() -> None:
    whole = table()
    backwards = [take(whole, slice(1_500, None)), take(whole, np.arange(1_499, -1, -1))]
    assert check(backwards, COUNT) == Checked(lost=0, repeated=0, wrong=0)


def test_a_reading_that_never_came_is_lost() -> None:
    assert check([take(table(), np.delete(np.arange(COUNT), [3, 77]))], COUNT) == Checked(lost=2, repeated=0, wrong=0)


def test_a_reading_that_came_again_is_repeated() -> None:
    whole = table()
    assert check([whole, take(whole, slice(5, 7))], COUNT) == Checked(lost=0, repeated=2, wrong=0)


def test_a_value_that_differs_in_its_last_bit_is_wrong_and_its_reading_lost() -> None:
    whole = table()
    pressure = np.array(whole["pressure"])
    pressure[10] = np.nextafter(pressure[10], np.inf)
    assert check([{**whole, "pressure": pressure}], COUNT) == Checked(lost=1, repeated=0, wrong=1)


def test_a_reading_that_nobody_published_is_wrong() -> None:
    assert check([table()], COUNT - 1) == Checked(lost=0, repeated=0, wrong=1)
