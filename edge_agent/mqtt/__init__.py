"""MQTT on the device: packets (`wire`, `cutter`, `frames`, `server_frames`), from sensors (`source`, `listener`), to the cloud (`link`)."""
