"""Marks: how far work on a feature view has come, kept in a file, and what the work depended on: its definition.

Values of two definitions are never online together: times say nothing about which of them is right. So whoever first comes with
another definition takes away what is there (`begin`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from feast import FeatureView

    from pipelines.feature_store import Repo
    from pipelines.online_writer import OnlineWriter

M = TypeVar("M", bound=msgspec.Struct)


def read_mark(path: Path, kind: type[M]) -> M | None:
    """The mark in a file; None if there is none yet.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as e:
        raise ConfigError(f"{path} does not say how far the last run came ({e}); delete it, and the next run takes everything") from e


def write_mark(path: Path, mark: msgspec.Struct) -> None:
    """Replace the mark, durably: after a power cut there is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(mark))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def definition(repo: Repo, view: FeatureView) -> str:
    """A digest of what the values online depend on beside the rows: the view, with its windows, and the store."""
    spec = view.to_proto().spec
    for source in (spec.batch_source, spec.stream_source, spec.stream_source.batch_source):
        source.ClearField("meta")  # when it was made and last applied, which every `open_repo` does
    store = json.dumps(repo.store.config.online_store.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(spec.SerializeToString(deterministic=True) + store.encode()).hexdigest()


class Online(msgspec.Struct, frozen=True):
    """Of what definition the values of a view are that lie online."""

    definition: str


def begin(repo: Repo, writer: OnlineWriter) -> str:
    """Take the values of another definition away, if the store has such; the definition now.

    Raises:
        UnavailableError: the store does not answer.
    """
    path, current = _online(repo, writer.view), definition(repo, writer.view)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second one must not take away what the first has written since
        before = read_mark(path, Online)
        if before is not None and before.definition != current:
            writer.empty()
        write_mark(path, Online(current))
    return current


def check_current(repo: Repo, view: FeatureView, definition: str) -> None:
    """For a process that goes on writing values of the definition with which it began.

    Raises:
        ConfigError: another one has begun with another definition.
    """
    mark = read_mark(_online(repo, view), Online)
    if mark is not None and mark.definition != definition:
        raise ConfigError(f"feature view {view.name!r} or its store has another definition than when this process started; start it again")


def _online(repo: Repo, view: FeatureView) -> Path:
    return repo.data / "online" / f"{view.name}.json"
