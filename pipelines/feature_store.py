"""The project's feature repository: its definitions, applied to Feast's registry, and what they name.

    repo = open_repo(project)
    repo.store.get_online_features(features=repo.service, entity_rows=[{"engine": "engine-1"}])

Importing Feast costs seconds and 220 MB: only who opens a repository imports it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.contract.errors import ConfigError
from edge_agent.core.settings import nearest

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView

FEATURE_REPO = Path("feature_repo")
DEFINITIONS = "feature_definitions.py"


@dataclass(frozen=True)
class Repo:
    """An applied repository: the store, the pipeline's view and the feature service of its model, and all views by name."""

    store: FeatureStore
    view: FeatureView
    service: FeatureService
    views: dict[str, FeatureView]

    @property
    def data(self) -> Path:
        """Where the repository keeps what it makes."""
        return Path(str(self.store.repo_path)) / "data"

    def named(self, name: str | None) -> list[FeatureView]:
        """The view called `name`, or all that go online.

        Raises:
            ConfigError: there is no such view.
        """
        if name is None:
            return [view for view in self.views.values() if view.online]
        if name not in self.views:
            raise ConfigError(f"there is no feature view {name!r} in {FEATURE_REPO}/{DEFINITIONS}{nearest(name, self.views)}")
        return [self.views[name]]


def open_repo(project: Path) -> Repo:
    """Apply the definitions of the project and open its store.

    Raises:
        ConfigError: there are none, or they lack `view` or `service`.
    """
    os.environ.setdefault("FEAST_USAGE", "False")
    from feast import FeatureStore, FeatureView

    folder = project / FEATURE_REPO
    found = _definitions(folder / DEFINITIONS)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    store = FeatureStore(repo_path=str(folder))
    store.apply(_objects(found))
    views = [value for value in found.values() if isinstance(value, FeatureView)]
    return Repo(store, found["view"], found["service"], {view.name: store.get_feature_view(view.name) for view in views})


def _definitions(path: Path) -> dict[str, Any]:
    """The names that the definitions file binds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ConfigError(f"{path} does not exist; copy {FEATURE_REPO}/ into the project")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("view", "service"):
        if not hasattr(module, name):
            raise ConfigError(f"{path} defines no {name!r}; `view` is the pipeline's feature view, `service` its model's feature service")
    return vars(module)


def _objects(names: dict[str, Any]) -> list[Any]:
    from feast import Entity, FeatureService, FeatureView
    from feast.data_source import DataSource

    return [value for value in names.values() if isinstance(value, Entity | FeatureView | FeatureService | DataSource)]
