"""Networks of one machine that can break: places with their own network stack, links between them, faults on the links.

- A `Place` is a network namespace with one address. Programs run in it (`command`), and a thread may enter it (`entered`), so that
  the sockets it opens are there (so do threads that it starts meanwhile). Nothing is added to the machine's own network.
- `join` lays a cable (veth) between two places. `join_slow` lays a second one with delay and loss, `use` says which of the two carries
  the traffic; addresses, and so connections, stay. The slow one is two TUN devices and a small loop, for kernels without netem.
- Faults are made by the kernel's firewall (nftables) at a place's port, for what comes from outside and in one transaction:
  `drop` (in silence, both ways or one way), `reset` (answer with a TCP reset), `heal`. Programs inside the place still reach the port.
- `count` counts the bytes that arrive at a port from outside: refused connections count too.
- All of it ends with the `Network`. Names carry the process id: what a killed process left behind is removed by the next `Network`.

Needs root, iproute2 and nftables (`make system-deps`).

    with Network() as network:
        device, region = network.place("device"), network.place("eu")
        network.join(device, region)
        broker = subprocess.Popen(region.command(["mosquitto", "-c", "region.conf"]))
        region.drop(8883)
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_RUN = Path("/run/netns")
_PREFIX = "fl-"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES_MAX = 65_535
_READY = "ready"
_numbers = itertools.count(1)
_WAIT_S = 10.0
_TABLE = "inet fenceline"
_RULES = f"""
table {_TABLE} {{
  set silent_in {{ type inet_service; }}
  set silent_out {{ type inet_service; }}
  set resetting {{ type inet_service; }}
  chain counted {{ type filter hook input priority -10; iif lo accept; }}
  chain input {{ type filter hook input priority 0; iif lo accept; tcp dport @resetting reject with tcp reset; tcp dport @silent_in drop; }}
  chain output {{ type filter hook output priority 0; oif lo accept; tcp sport @silent_out drop; }}
}}
"""


class Network:
    """Places and links; a context manager, for the thread that uses it (programs end with the thread that starts them)."""

    def __init__(self) -> None:
        remove_stale()
        self._prefix = f"{_PREFIX}{os.getpid()}-{next(_numbers)}-"
        self._places: dict[str, Place] = {}
        self._slow: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def place(self, name: str) -> Place:
        """A new place; its name is also that of the interface that leads there."""
        place = Place(f"{self._prefix}{name}", name, f"10.77.0.{len(self._places) + 1}")
        _ip("netns", "add", place.namespace)
        self._places[name] = place
        _ip("-n", place.namespace, "link", "set", "lo", "up")
        _ip("-n", place.namespace, "address", "add", f"{place.address}/32", "dev", "lo")
        place.firewall(_RULES)
        return place

    def join(self, one: Place, two: Place) -> None:
        """A cable without delay or loss."""
        _ip("link", "add", two.name, "netns", one.namespace, "type", "veth", "peer", "name", one.name, "netns", two.namespace)
        self._raise_links(one, two, "")
        self.use(one, two)

    def join_slow(self, one: Place, two: Place, *, delay_ms: float, loss: float, seed: int) -> None:
        """A second cable: packets wait `delay_ms` each way, a share `loss` of them is lost. It carries nothing until `use`."""
        words = [one.namespace, _slow(two), two.namespace, _slow(one), str(delay_ms), str(loss), str(seed)]
        loop = subprocess.Popen([*_tied(), sys.executable, __file__, *words], stdout=subprocess.PIPE)
        self._slow.append(loop)
        assert loop.stdout is not None
        if loop.stdout.readline().decode().strip() != _READY:
            raise RuntimeError(f"the slow link between {one.name} and {two.name} did not start (is there a /dev/net/tun?)")
        self._raise_links(one, two, "~")

    def use(self, one: Place, two: Place, *, slow: bool = False) -> None:
        """Send what goes between the two over the slow cable, or over the other one again."""
        mark = "~" if slow else ""
        for here, there in ((one, two), (two, one)):
            _ip("-n", here.namespace, "route", "replace", there.address, "dev", mark + there.name, "src", here.address)

    def close(self) -> None:
        """End every program in the places, and remove them."""
        for loop in self._slow:
            loop.kill()
            loop.wait()
        for place in self._places.values():
            _remove(place.namespace)
        self._places.clear()
        self._slow.clear()

    @staticmethod
    def _raise_links(one: Place, two: Place, mark: str) -> None:
        for here, there in ((one, two), (two, one)):
            _ip("-n", here.namespace, "link", "set", mark + there.name, "up")


class Place:
    """A network stack of its own."""

    def __init__(self, namespace: str, name: str, address: str) -> None:
        self.namespace, self.name, self.address = namespace, name, address

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` here, under the process id of whoever starts it, and ends with its parent."""
        return [*_tied(), "ip", "netns", "exec", self.namespace, *command]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread opens its sockets here; threads that it starts meanwhile stay here for good."""
        with Path("/proc/thread-self/ns/net").open() as before:
            self.enter()
            try:
                yield
            finally:
                _setns(before.fileno())

    def enter(self) -> None:
        """Like `entered`, for the rest of the thread's life."""
        with (_RUN / self.namespace).open() as namespace:
            _setns(namespace.fileno())

    def firewall(self, script: str) -> str:
        """Run nftables commands, as one transaction; returns what they print."""
        with self.entered():
            return _nft(script)

    def drop(self, port: int, *, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop the port's packets in silence: those from outside, the answers to outside, or both."""
        wanted = [("silent_in", incoming), ("silent_out", outgoing)]
        self.firewall("".join(f"add element {_TABLE} {name} {{ {port} }};" for name, on in wanted if on))

    def reset(self, port: int) -> None:
        """Answer every packet to the port with a TCP reset."""
        self.firewall(f"add element {_TABLE} resetting {{ {port} }}")

    def heal(self) -> None:
        """No faults any more."""
        self.firewall("".join(f"flush set {_TABLE} {name};" for name in ("silent_in", "silent_out", "resetting")))

    def count(self, port: int) -> None:
        """Begin to count what arrives at the port from outside."""
        self.firewall(f"add counter {_TABLE} port_{port}; add rule {_TABLE} counted tcp dport {port} counter name port_{port}")

    def counted_bytes(self, port: int) -> int:
        """Bytes, with their IP headers, that have arrived since `count`."""
        found = re.search(r"bytes (\d+)", self.firewall(f"list counter {_TABLE} port_{port}"))
        if found is None:
            raise RuntimeError(f"port {port} of {self.name} is not counted")
        return int(found[1])


def remove_stale() -> None:
    """Remove what processes that live no more have left behind."""
    for path in _RUN.glob(f"{_PREFIX}*"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    """End the programs in a namespace of ours, and delete it with its links."""
    for pid in map(int, _ip("netns", "pids", namespace).split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "delete", namespace)


def _tied() -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL"]


def _slow(place: Place) -> str:
    return f"~{place.name}"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_WAIT_S, check=False, env={**os.environ, "PATH": _PATH})
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns: root is needed")


def _nft(script: str) -> str:
    """In this process: a fault begins within a millisecond instead of after a program's start."""
    library = ctypes.CDLL("libnftables.so.1")
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_output_buffer.restype = library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    context = ctypes.c_void_p(library.nft_ctx_new(0))
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, script.encode()):
            raise RuntimeError(f"nft: {(library.nft_ctx_get_error_buffer(context) or b'').decode().strip()}")
        return (library.nft_ctx_get_output_buffer(context) or b"").decode()
    finally:
        library.nft_ctx_free(context)


# --- the loop of a slow link, a process of its own ---


def _tun(namespace: str, name: str) -> int:
    """A TUN device in a namespace; it lives as long as the descriptor."""
    Place(namespace, name, "").enter()
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _carry(one: int, two: int, delay_s: float, loss: float, chance: random.Random) -> None:
    """Move packets between two TUN devices until killed."""
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for descriptor in select.select([one, two], [], [], timeout)[0]:
            packet = os.read(descriptor, _PACKET_BYTES_MAX)
            if chance.random() >= loss:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, two if descriptor == one else one, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            *_, target, packet = heapq.heappop(waiting)
            with suppress(OSError):  # the other end is down for now: lost
                os.write(target, packet)


def _main(words: list[str]) -> None:
    one, two = _tun(words[0], words[1]), _tun(words[2], words[3])
    print(_READY, flush=True)
    _carry(one, two, float(words[4]) / 1_000, float(words[5]), random.Random(words[6]))


if __name__ == "__main__":
    _main(sys.argv[1:])
