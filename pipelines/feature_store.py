"""The project's feature repository: its definitions, applied to Feast's registry, and what they name.

    repo = open_repo(project)
    repo.store.get_online_features(features=repo.service, entity_rows=[{"engine": "engine-1"}])

Importing Feast costs seconds and 220 MB: only who opens a repository imports it.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.contract.errors import ConfigError, FencelineError
from edge_agent.core.settings import nearest
from pipelines.online_writer import available

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView

FEATURE_REPO = Path("feature_repo")
DEFINITIONS, SETTINGS = "feature_definitions.py", "feature_store.yaml"


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
        ConfigError: there are none, they lack `view` or `service`, or they or the store's settings are wrong.
        UnavailableError: the registry or the online store does not answer.
    """
    os.environ.setdefault("FEAST_USAGE", "False")
    from feast import FeatureView

    folder = project / FEATURE_REPO
    found = _definitions(folder / DEFINITIONS)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    store = _open(folder)
    _apply(store, found, folder / DEFINITIONS)
    views = [value for value in found.values() if isinstance(value, FeatureView)]
    return Repo(store, found["view"], found["service"], {view.name: store.get_feature_view(view.name) for view in views})


def _definitions(path: Path) -> dict[str, Any]:
    """The names that the definitions file binds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise ConfigError(f"{path} does not exist; copy {FEATURE_REPO}/ into the project")
    from feast import FeatureService, FeatureView

    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FencelineError:
        raise
    except Exception as e:  # whatever the user's own code raises
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{path}{f', line {lines[-1]}' if lines else ''}: {type(e).__name__}: {e}") from e
    for name, kind in (("view", FeatureView), ("service", FeatureService)):
        if not isinstance(getattr(module, name, None), kind):
            raise ConfigError(f"{path} defines no {name!r}; `view` is the pipeline's feature view, `service` its model's feature service")
    return vars(module)


def _open(folder: Path) -> FeatureStore:
    from feast import FeatureStore

    try:
        return FeatureStore(repo_path=str(folder))
    except FileNotFoundError as e:
        raise ConfigError(f"{folder / SETTINGS} does not exist; copy {FEATURE_REPO}/ into the project") from e
    except Exception as e:  # Feast's, pydantic's, YAML's, of whatever class the settings name
        raise ConfigError(f"{folder / SETTINGS}: {e}") from e


def _apply(store: FeatureStore, names: dict[str, Any], path: Path) -> None:
    """Everything that the definitions bind, on-demand views included."""
    from feast import Entity, FeatureService
    from feast.base_feature_view import BaseFeatureView
    from feast.data_source import DataSource

    found: list[Any] = [v for v in names.values() if isinstance(v, Entity | BaseFeatureView | FeatureService | DataSource)]
    try:
        with available(store):
            store.apply(found)
    except FencelineError:
        raise
    except Exception as e:  # Feast checks definitions in many places, each with errors of its own
        raise ConfigError(f"{path} cannot be applied: {type(e).__name__}: {e}") from e
