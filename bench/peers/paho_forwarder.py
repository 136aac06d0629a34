"""A forwarder as one writes it with paho-mqtt: each message goes on in the callback. QoS 1, in memory only."""

from __future__ import annotations

import argparse
import time
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", type=int, required=True)
    arguments = parser.parse_args()
    up = Client(CallbackAPIVersion.VERSION2, "forwarder-up", clean_session=False)
    up.max_inflight_messages_set(1_000)
    up.connect("127.0.0.1", arguments.upstream)
    up.loop_start()
    down = Client(CallbackAPIVersion.VERSION2, "forwarder", clean_session=False)

    def forward(_client: Client, _data: Any, message: MQTTMessage) -> None:
        up.publish(message.topic, message.payload, qos=1)

    down.on_message = forward
    down.on_connect = lambda client, *_: client.subscribe("sensors/#", qos=1)
    down.on_subscribe = lambda *_: print("ready", flush=True)
    down.connect("127.0.0.1", arguments.port)
    down.loop_start()
    time.sleep(3600.0)


if __name__ == "__main__":
    main()
