"""Marks: how far work on a feature view has come, kept in a file, and what the work depended on."""

from __future__ import annotations

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
    spec = view.to_proto().spec.SerializeToString(deterministic=True)
    store = json.dumps(repo.store.config.online_store.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(spec + store.encode()).hexdigest()
