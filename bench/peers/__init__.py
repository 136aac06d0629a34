"""The programs that a benchmark runs side by side, each in a process of its own: sensors, forwarders, a cloud."""
