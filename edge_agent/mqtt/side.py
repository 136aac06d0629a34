"""What the sides of the sensors share: how one stands, and its thread, which ends when asked and takes the agent along when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from edge_agent.mqtt.inlet import Batch, Inlet, Wake

STOP_S_MAX = 10.0


@dataclass(frozen=True)
class SideStatus:
    """How a side stands. `error` is why its last connection failed or ended, empty while all is well; `last_received_us` is wall time."""

    connected: bool = False
    error: str = ""
    messages: int = 0
    batches: int = 0
    paused: bool = False
    last_received_us: int | None = None

    def after(self, batch: Batch) -> Self:
        """With this batch handed over."""
        messages, batches = self.messages + len(batch), self.batches + 1
        return replace(self, messages=messages, batches=batches, last_received_us=batch.received_us)

    def ended(self) -> Self:
        """It reads nothing any more."""
        return replace(self, connected=False, paused=False)


class SideThread:
    """The thread of a side, from `start` to `stop`. It waits on `wake`, and looks at `stopping`."""

    def __init__(self, name: str, run: Callable[[], None], inlet: Inlet) -> None:
        """`run` is what it does; if it raises, the inlet's consumer is told."""
        self.wake = Wake()
        self.stopping = threading.Event()
        self._run, self._inlet = run, inlet
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)
        inlet.attach(self.wake.set)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self.stopping.set()
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S_MAX)
        if not self._thread.is_alive():
            self.wake.close()

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as e:
            self._inlet.fail(e)
            raise
