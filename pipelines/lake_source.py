"""Where a training dataset came from, in the words of MLflow's dataset tracking: the lake's tables at fixed versions."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from mlflow.data.dataset_source import DatasetSource

from cloud.lake import Lake
from cloud.roots import Roots


class LakeSource(DatasetSource):
    """The readings of a stream, by lane and Delta version. `lake` says where its roots are, without secrets."""

    def __init__(self, lake: dict[str, Any], stream: str, lanes: dict[str, int], labels_version: int | None) -> None:
        self.lake, self.stream, self.lanes, self.labels_version = lake, stream, lanes, labels_version

    @staticmethod
    def _get_source_type() -> str:
        return "fenceline_lake"

    def load(self) -> pa.Table:
        """Read exactly those readings again."""
        return Lake(Roots.restore(self.lake)).read(self.stream, versions=self.lanes)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False  # never guessed from a path

    @classmethod
    def _resolve(cls, raw_source: Any) -> LakeSource:
        raise TypeError("a LakeSource is made, not guessed")

    def to_dict(self) -> dict[Any, Any]:
        return {"lake": self.lake, "stream": self.stream, "lanes": self.lanes, "labels_version": self.labels_version}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> LakeSource:
        return cls(**source_dict)
