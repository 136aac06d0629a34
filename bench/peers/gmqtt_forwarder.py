"""A forwarder as one writes it with gmqtt (asyncio): each message goes on in the callback. QoS 1, in memory only."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv311


async def forward(port: int, upstream: int) -> None:
    up = Client("forwarder-up", clean_session=False)
    await up.connect("127.0.0.1", upstream, version=MQTTv311)
    down = Client("forwarder", clean_session=False)

    def on_message(_client: Any, topic: str, payload: bytes, _qos: int, _properties: Any) -> int:
        up.publish(topic, payload, qos=1)
        return 0

    down.on_message = on_message
    down.on_subscribe = lambda *_: print("ready", flush=True)
    await down.connect("127.0.0.1", port, version=MQTTv311)
    down.subscribe("sensors/#", qos=1)
    await asyncio.sleep(3600.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(forward(arguments.port, arguments.upstream))


if __name__ == "__main__":
    main()
