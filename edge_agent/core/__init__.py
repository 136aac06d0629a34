"""Decisions without I/O: inputs and `now` go in, results come out. No socket, file, clock, thread or log."""
