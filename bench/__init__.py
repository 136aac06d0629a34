"""Measurements: `python -m bench.NAME` prints a table for people and takes `--json FILE`."""
