"""MQTT on the device: `frames` (packets, no I/O), `source` (from the sensors), `link` (to the cloud)."""
