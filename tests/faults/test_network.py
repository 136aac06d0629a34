"""The networks that the fault tests stand on do what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.network import Network, Place

pytestmark = pytest.mark.needs_root
PORT = 9000
ECHO = f"""
import socket, threading
server = socket.create_server(("", {PORT}))
print("ready", flush=True)
def serve(c):
    while data := c.recv(65536): c.sendall(data)
while True: threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def pair(network: Network) -> tuple[Place, Place]:
    """A device, and a region in which an echo server runs."""
    device, region = network.place("device"), network.place("eu")
    network.join(device, region)
    server = subprocess.Popen(region.command([sys.executable, "-c", ECHO]), stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    return device, region


def dial(device: Place, region: Place) -> socket.socket:
    with device.entered():
        return socket.create_connection((region.address, PORT), timeout=2)


def answers(line: socket.socket, timeout_s: float = 0.4) -> bool:
    line.settimeout(timeout_s)
    try:
        line.sendall(b"x")
        return line.recv(1) == b"x"
    except TimeoutError:
        return False


def test_dropped_packets_vanish_in_silence_and_come_again_after_healing(pair: tuple[Place, Place]) -> None:
    line = dial(*pair)
    assert answers(line)
    for incoming, outgoing in ((True, True), (True, False), (False, True)):
        pair[1].drop(PORT, incoming=incoming, outgoing=outgoing)
        assert not answers(line)
        pair[1].heal()
        line.settimeout(5)
        assert line.recv(1) == b"x"


def test_reset_ends_connections_and_refuses_new_ones(pair: tuple[Place, Place]) -> None:
    line = dial(*pair)
    pair[1].reset(PORT)
    with pytest.raises(ConnectionResetError):
        answers(line)
    with pytest.raises(ConnectionRefusedError):
        dial(*pair)
    pair[1].heal()
    assert answers(dial(*pair))


def test_bytes_at_a_port_are_counted_even_if_refused_but_not_those_from_inside(pair: tuple[Place, Place]) -> None:
    device, region = pair
    region.count(PORT)
    assert answers(dial(region, region))
    assert region.counted_bytes(PORT) == 0
    region.reset(PORT)
    with pytest.raises(ConnectionRefusedError):
        dial(device, region)
    assert region.counted_bytes(PORT) >= 40


def test_slow_cable_delays_and_loses_without_ending_connections(network: Network, pair: tuple[Place, Place], seed: int) -> None:
    device, region = pair
    network.join_slow(device, region, delay_ms=25, loss=0.0, seed=seed)
    line = dial(device, region)
    network.use(device, region, slow=True)
    started = time.monotonic()
    assert answers(line, 5)
    assert time.monotonic() - started >= 0.05
    network.use(device, region)
    assert answers(line)


def test_a_thread_started_in_a_place_stays_there_and_the_others_where_they_were(pair: tuple[Place, Place]) -> None:
    here = Path("/proc/thread-self/ns/net").readlink()
    seen: list[Path] = []
    left = threading.Event()

    def look() -> None:
        left.wait(5)
        seen.append(Path("/proc/thread-self/ns/net").readlink())

    with pair[0].entered():
        other = threading.Thread(target=look)
        other.start()
        there = Path("/proc/thread-self/ns/net").readlink()
    left.set()
    other.join()
    assert seen == [there] and there != here == Path("/proc/thread-self/ns/net").readlink()


def test_what_a_killed_process_left_behind_is_removed_by_the_next() -> None:
    script = """
import subprocess, time
from tests.faults.network import Network
network = Network()
place = network.place("left")
command = ["ip", "netns", "exec", place.namespace, "sh", "-c", "echo; exec sleep 60"]  # not tied to its parent
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.read(1)
print(place.namespace, child.pid, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    namespace, child = owner.stdout.readline().split()
    assert Path(f"/run/netns/{namespace}").exists()
    owner.kill()
    owner.wait()
    Network().close()
    assert not Path(f"/run/netns/{namespace}").exists()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def test_no_place_outlives_its_network() -> None:
    with Network() as network:
        place = network.place("gone")
        sleeper = subprocess.Popen(place.command(["sh", "-c", "echo; exec sleep 60"]), stdout=subprocess.PIPE)
        assert sleeper.stdout is not None and sleeper.stdout.read(1)
        assert Path(f"/run/netns/{place.namespace}").exists()
    assert sleeper.wait(5) == -9
    assert not list(Path("/run/netns").glob(f"fl-{os.getpid()}-*"))
