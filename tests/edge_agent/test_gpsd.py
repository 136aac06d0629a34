"""gpsd's protocol, replayed by a server that says what a real gpsd 3.22 says, and breaks off when told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import gpsd
from edge_agent.contract.errors import ContractError
from edge_agent.core.fix import Position
from edge_agent.gpsd import Gpsd, read_report

VERSION = b'{"class":"VERSION","release":"3.22","rev":"3.22","proto_major":3,"proto_minor":14}'
DEVICES = (
    b'{"class":"DEVICES","devices":[{"class":"DEVICE","path":"/dev/ttyACM0","driver":"u-blox","activated":"2023-11-14T22:13:20.000Z","flags":1,'
    b'"native":1,"bps":9600,"parity":"N","stopbits":1,"cycle":1.00,"mincycle":0.02}]}'
)
WATCHING = b'{"class":"WATCH","enable":true,"json":true,"nmea":false,"raw":0,"scaled":false,"timing":false,"split24":false,"pps":false}'
SKY = b'{"class":"SKY","device":"/dev/ttyACM0","xdop":0.6,"hdop":0.9,"satellites":[{"PRN":5,"el":22.0,"az":67.0,"ss":30.0,"used":true}]}'
NO_FIX = b'{"class":"TPV","device":"/dev/ttyACM0","mode":1,"time":"2023-11-14T22:13:20.000Z"}'
FIX_2D = (
    b'{"class":"TPV","device":"/dev/ttyACM0","mode":2,"time":"2023-11-14T22:13:21.000Z","ept":0.005,"lat":47.458300,"lon":8.555600,'
    b'"epx":3.0,"epy":4.0,"track":10.3,"speed":0.09}'
)
FIX_3D = (
    b'{"class":"TPV","device":"/dev/ttyACM0","mode":3,"time":"2023-11-14T22:13:22.500Z","leapseconds":18,"ept":0.005,"lat":47.458400000,'
    b'"lon":8.555700000,"altHAE":486.1,"altMSL":438.7,"alt":438.7,"epx":8.101,"epy":10.2,"epv":23.0,"magvar":3.1,"speed":0.097,"climb":0.1,'
    b'"eps":20.4,"epc":46.0,"geoidSep":47.4,"eph":19.0,"sep":24.32}'
)
POSITION_2D = Position(1_700_000_001_000_000, 47.4583, 8.5556, 5.0, "gpsd")
POSITION_3D = Position(1_700_000_002_500_000, 47.4584, 8.5557, 19.0, "gpsd")


class Server:
    """A gpsd for one client at a time; it says `lines` after a WATCH, then waits, or hangs up."""

    def __init__(self, lines: list[bytes], hang_up: bool = False) -> None:
        self.lines, self.hang_up = lines, hang_up
        self.watches = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._stop = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                client.sendall(VERSION + b"\r\n")
                if b'?WATCH={"enable":true,"json":true}' not in client.recv(1024):
                    continue
                self.watches += 1
                for line in self.lines:
                    client.sendall(line + b"\r\n")
                if not self.hang_up:
                    self._stop.wait(30)

    def close(self) -> None:
        self._stop.set()
        self.listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, Gpsd]]]:
    made: list[tuple[Server, Gpsd]] = []

    def make(lines: list[bytes], hang_up: bool = False, **options: float) -> tuple[Server, Gpsd]:
        server = Server(lines, hang_up)
        reader = Gpsd("127.0.0.1", server.port, **options)
        made.append((server, reader))
        reader.start()
        return server, reader

    yield make
    for server, reader in made:
        reader.stop()
        server.close()
        assert reader.failure is None and not reader.alive


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fixes_of_a_session_are_handed_over_in_order_once(serve: Callable[..., tuple[Server, Gpsd]]) -> None:
    _, reader = serve([DEVICES, WATCHING, NO_FIX, SKY, FIX_2D, SKY, FIX_3D])
    until(lambda: reader.status.fixes == 2)
    assert reader.take() == [POSITION_2D, POSITION_3D]
    assert reader.take() == [] and reader.status.connected and reader.status.malformed == 0


def test_a_gpsd_that_goes_away_is_connected_again(serve: Callable[..., tuple[Server, Gpsd]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpsd, "BACKOFF_S", (0.02, 0.1))
    server, reader = serve([WATCHING, FIX_2D], hang_up=True)
    until(lambda: server.watches >= 3)
    assert "closed" in reader.status.error or reader.status.connected
    server.close()
    until(lambda: not reader.status.connected and bool(reader.status.error))


def test_a_silent_gpsd_is_connected_again(serve: Callable[..., tuple[Server, Gpsd]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpsd, "BACKOFF_S", (0.02, 0.1))
    monkeypatch.setattr(gpsd, "POLL_S", 0.02)
    _, reader = serve([WATCHING], silence_s=0.1)
    until(lambda: "silent" in reader.status.error)


def test_what_nobody_takes_is_bounded_and_counted(serve: Callable[..., tuple[Server, Gpsd]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpsd, "POSITIONS_MAX", 3)
    _, reader = serve([FIX_2D] * 5 + [FIX_3D])
    until(lambda: reader.status.fixes == 6)
    assert reader.status.dropped == 3
    assert reader.take() == [POSITION_2D, POSITION_2D, POSITION_3D]


def test_an_endless_line_does_not_fill_the_memory(serve: Callable[..., tuple[Server, Gpsd]]) -> None:
    _, reader = serve([b"x" * 200_000])
    until(lambda: "a line of more than" in reader.status.error or reader.status.malformed == 1)


def test_accuracy_is_the_worst_of_what_is_known() -> None:
    assert read_report(FIX_3D, 0.0) == POSITION_3D
    found = read_report(FIX_3D, 25.0)
    assert found is not None and found.accuracy_m == 25.0
    bare = b'{"class":"TPV","mode":3,"time":"2023-11-14T22:13:22.5Z","lat":1.0,"lon":2.0}'
    with pytest.raises(ContractError, match="accuracy_m"):
        read_report(bare, 0.0)
    found = read_report(bare, 30.0)
    assert found is not None and found.accuracy_m == 30.0


@pytest.mark.parametrize(
    "line",
    [
        b'{"class":"VERSION","release":"4.0","proto_major":4,"proto_minor":0}',
        FIX_3D.replace(b"2023-11-14T22:13:22.500Z", b"yesterday"),
        FIX_3D.replace(b'"time":"2023-11-14T22:13:22.500Z",', b""),
        FIX_3D.replace(b"47.458400000", b'"47"'),
        b"$GPGGA,123519,4807.038,N",
    ],
)
def test_what_is_not_the_protocol_is_refused(line: bytes) -> None:
    with pytest.raises(ContractError):
        read_report(line, 0.0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_position_or_a_contract_error(line: bytes) -> None:
    with contextlib.suppress(ContractError):
        read_report(line, 10.0)
