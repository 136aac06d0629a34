"""The settings of the pipeline: pipelines/params.yaml, typed and strict.

- A key that is not known here is refused.
- `Params.spec` is the one list of features: the features stage, Feast's feature view and the bundle all take it from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from edge_agent.contract.errors import BundleError, ConfigError, ContractError
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind, check_spec
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract
from edge_agent.core.functions import Functions
from edge_agent.installed_functions import load_functions

PARAMS = Path("pipelines/params.yaml")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file; unknown keys are errors."""


class Snapshot(_Section, frozen=True):
    lanes: list[str] = []


class Features(_Section, frozen=True):
    """Every aggregate of every field, over windows of one kind; `contract.feature_spec` says what they are.

    `functions` names an installed module with functions that `aggregates` may name; see `edge_agent.installed_functions`.
    """

    fields: list[str]
    aggregates: list[str]
    window_rows: int
    window_s: float
    windows: WindowKind = WindowKind.TRAILING
    every_s: float = 0.0
    lateness_s: float = 0.0
    functions: str = ""
    parts: int = 4


class Dataset(_Section, frozen=True):
    ttl_s: float
    label_max: float
    known_by_then: bool = False


class Setting(_Section, frozen=True):
    """Hyper-parameters of one trial; names are scikit-learn's."""

    learning_rate: float
    max_iter: int
    max_leaf_nodes: int
    min_samples_leaf: int
    l2_regularization: float
    max_features: float = 1.0


class Train(_Section, frozen=True):
    holdout: float
    folds: int
    seed: int
    search: list[Setting]


class Evaluate(_Section, frozen=True):
    rmse_max: float
    champion_slack: float


class Export(_Section, frozen=True):
    tolerance: float
    golden_rows: int
    score_min: float
    score_max: float
    probation_rows: int
    zones: list[str] = []


class Register(_Section, frozen=True):
    model: str


class Params(_Section, frozen=True):
    """The whole file."""

    stream: str
    contract: str
    snapshot: Snapshot
    features: Features
    dataset: Dataset
    train: Train
    evaluate: Evaluate
    export: Export
    register: Register

    @property
    def spec(self) -> FeatureSpec:
        """The features, field by field.

        Raises:
            ConfigError: the module of the functions is not installed.
        """
        f, known = self.features, self.functions
        return FeatureSpec(
            features=[Feature(field, aggregate) for field in f.fields for aggregate in f.aggregates],
            window_rows=f.window_rows,
            window_s=f.window_s,
            kind=f.windows,
            every_s=f.every_s,
            lateness_s=f.lateness_s,
            functions={name: known[name].digest for name in f.aggregates if name in known},
        )

    @property
    def functions(self) -> Functions:
        """The user's own functions that features may be made with.

        Raises:
            ConfigError: their module is not installed.
        """
        return load_functions(self.features.functions)

    @property
    def view(self) -> str:
        """The name of the feature view in Feast."""
        return f"{self.stream.replace('-', '_')}_windows"


def load_params(project: Path) -> Params:
    """Read the parameters of the project.

    Raises:
        ConfigError: the file is missing, is not YAML, has a wrong or unknown key, or values that cannot work.
    """
    path = project / PARAMS
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run in a Fenceline project or give --project DIR") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML: {e}") from e
    try:
        params = msgspec.convert(tree, Params)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path}: {e}") from e
    _check(params, path)
    return params


def load_contract(project: Path, params: Params) -> StreamContract:
    """The contract of the pipeline's stream.

    Raises:
        ConfigError: the file is missing, is no contract or that of another stream, or lacks a field of the features.
    """
    path = project / params.contract
    try:
        contract = parse_contract(path.read_bytes(), str(path))
        for name in params.features.fields:
            contract.field(name)
    except FileNotFoundError:
        raise ConfigError(f"contract {path} does not exist; `contract` in {PARAMS} must name it") from None
    except ContractError as e:
        raise ConfigError(f"{PARAMS} does not fit its contract: {e}") from e
    if contract.stream != params.stream:
        raise ConfigError(f"{path} is the contract of stream {contract.stream!r}; {PARAMS} says {params.stream!r}")
    return contract


def override(project: Path, assignments: list[str]) -> None:
    """Write `section.key=value` assignments into params.yaml, comments kept; the value is YAML.

    Raises:
        ConfigError: an assignment has no `=`, names no known key, or gives parameters that cannot work; the file is then as before.
    """
    if not assignments:
        return
    from dvc.utils.serialize import modify_yaml

    path = project / PARAMS
    before = path.read_text()
    try:
        with modify_yaml(str(path)) as tree:
            for assignment in assignments:
                _assign(tree, assignment)
        load_params(project)
    except ConfigError:
        path.write_text(before)
        raise


def _assign(tree: Any, assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    *parents, key = name.split(".")
    node = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not separator or not isinstance(node, dict) or key not in node:
        raise ConfigError(f"--set {assignment!r}: want section.key=value with a key of {PARAMS}, such as train.folds=4")
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {assignment!r}: the value is not YAML: {e}") from e


def _check(params: Params, path: Path) -> None:
    try:
        check_spec(params.spec)
    except BundleError as e:
        raise ConfigError(f"{path}: features: {e}") from e
    if not params.train.search or not 0 < params.train.holdout < 1 or params.train.folds < 2:
        raise ConfigError(f"{path}: train needs at least one setting in search, a holdout between 0 and 1, and at least 2 folds")
    if min(params.features.parts, params.export.golden_rows) < 1:
        raise ConfigError(f"{path}: features.parts and export.golden_rows must be positive")
    if params.dataset.ttl_s <= 0 or params.dataset.label_max <= 0 or params.export.score_min >= params.export.score_max:
        raise ConfigError(f"{path}: dataset.ttl_s and label_max must be positive, export.score_min below score_max")
