"""The inlet between sensor sides and data path."""

from __future__ import annotations

import pytest

from edge_agent.mqtt.inlet import Batch, Inlet


def test_a_side_that_died_ends_the_agent_though_another_side_goes_on_without_a_pause() -> None:
    inlet = Inlet(batches_max=2)
    for n in range(10):
        inlet.put(Batch(["t"], [b"%d" % n], 0, None))
        if n < 5:
            batch = inlet.get(0.0)
            assert batch is not None and batch.payloads == [b"%d" % n]
        elif n == 5:
            inlet.fail(ZeroDivisionError("a defect"))
    assert inlet.waiting, "the other side keeps the inlet filled"
    with pytest.raises(RuntimeError, match="sensor side died: ZeroDivisionError"):
        inlet.get(0.0)
