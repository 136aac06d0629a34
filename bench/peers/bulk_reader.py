"""The machine's limit: reads a broker in bulk, PUBACKs, and does nothing else with the readings."""

from __future__ import annotations

import argparse
import time

from edge_agent.mqtt.inlet import BatchLimits, Inlet
from edge_agent.mqtt.source import Source, SourceConfig
from edge_agent.subscriptions import Subscriptions

POLL_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    arguments = parser.parse_args()
    inlet = Inlet(BatchLimits(ms=20.0))
    source = Source(SourceConfig("127.0.0.1", arguments.port, "reader", "sensors/#"), inlet, Subscriptions(None))
    source.start()
    while not source.status.connected:
        time.sleep(0.01)
    print("ready", flush=True)
    seen = 0
    while seen < arguments.count:
        batch = inlet.get(POLL_S)
        if batch is not None:
            seen += len(batch)
            batch.release()
    print(time.monotonic(), flush=True)
    time.sleep(3600.0)  # the parent still reads our CPU time


if __name__ == "__main__":
    main()
