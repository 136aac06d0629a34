"""The process that runs a model. It is started as a script and imports nothing but numpy and onnxruntime.

Frames on the socket at file descriptor 0, both ways: kind (1 byte), length (u32, little endian), payload.

- in:  `L` memory_mb (u32), then the ONNX bytes · `S` rows (u32), features (u32), then float32 values
- out: `R` ready: resident bytes (u64) · `S` resident bytes (u64), then one float32 score per row · `E` a message

The process ends when its parent does: then the socket is closed, also in the middle of a score.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HEAD = struct.Struct("<cI")
MIB = 1024 * 1024


def main() -> None:
    parent = socket.socket(fileno=0)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    kind, payload = receive(parent)
    assert kind == b"L", kind
    memory_mb = int.from_bytes(payload[:4], "little")
    try:
        session = _load(payload[4:], memory_mb)
    except Exception as e:  # noqa: BLE001 - whatever onnxruntime raises goes to the parent, which ends this process
        send(parent, b"E", f"model does not load: {e}".encode())
        return
    del payload
    send(parent, b"R", _resident_bytes().to_bytes(8, "little"))
    while True:
        _, payload = receive(parent)
        try:
            scores = _score(session, payload)
        except Exception as e:  # noqa: BLE001 - as above
            send(parent, b"E", f"model does not score: {e}".encode())
            return
        send(parent, b"S", _resident_bytes().to_bytes(8, "little") + scores.tobytes())


def send(peer: socket.socket, kind: bytes, payload: bytes) -> None:
    """Send one frame."""
    peer.sendall(HEAD.pack(kind, len(payload)) + payload)


def receive(peer: socket.socket) -> tuple[bytes, bytes]:
    """Read one frame; ends the process when the parent is gone."""
    kind, length = HEAD.unpack(_read(peer, HEAD.size))
    return kind, _read(peer, length)


def _read(peer: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = peer.recv_into(view[done:])
        if not got:
            raise SystemExit(0)
        done += got
    return bytes(data)


def _end_with_parent(parent: socket.socket) -> None:
    poll = select.poll()
    poll.register(parent.fileno(), select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    os._exit(0)


def _load(model: bytes, memory_mb: int) -> Any:
    import onnxruntime  # here, so that its own memory does not count: it is the same for every model

    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + memory_mb * MIB,) * 2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # rows vary from batch to batch; the arena would keep the largest for ever
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _score(session: Any, payload: bytes) -> npt.NDArray[np.float32]:
    import numpy as np

    rows, features = struct.unpack_from("<II", payload)
    values = np.frombuffer(payload, np.float32, offset=8).reshape(rows, features)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or not outputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs; want one input and a first output of scores")
    scores = np.asarray(session.run([outputs[0].name], {inputs[0].name: values})[0])
    if scores.shape not in ((rows,), (rows, 1)) or scores.dtype != np.float32:
        raise ValueError(f"scores are {scores.dtype} of shape {scores.shape}; want float32 of ({rows},) or ({rows}, 1)")
    return scores


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _data_bytes() -> int:
    """What RLIMIT_DATA counts now: private writable memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone
        main()
