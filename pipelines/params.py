"""The settings of the pipeline: pipelines/params.yaml, typed and strict.

- A key that is not known here is refused, and so is a number that cannot work; infinity and NaN never do.
- `Params.spec` is the one list of features: the features stage, Feast's feature view and the bundle all take it from here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from edge_agent.contract.errors import BundleError, ConfigError, ContractError
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind, check_spec
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import FieldType, StreamContract
from edge_agent.contract.topics import check_name
from edge_agent.core.functions import Functions
from edge_agent.installed_functions import load_functions

PARAMS = Path("pipelines/params.yaml")

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file; unknown keys are errors."""


class Snapshot(_Section, frozen=True):
    """`memory_mb`: how much of the readings is held while they are sorted; `score` sorts with it too. See `cloud.sorting`."""

    lanes: list[str] = []
    memory_mb: Annotated[int, Meta(ge=256)] = 1_024


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
    parts: Count = 4


class Dataset(_Section, frozen=True):
    ttl_s: Positive
    label_max: Positive
    known_by_then: bool = False


class Setting(_Section, frozen=True):
    """Hyper-parameters of one trial; names are scikit-learn's."""

    learning_rate: Positive
    max_iter: Count
    max_leaf_nodes: Annotated[int, Meta(ge=2)]
    min_samples_leaf: Count
    l2_regularization: NotNegative
    max_features: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Train(_Section, frozen=True):
    holdout: Annotated[float, Meta(gt=0, lt=1)]
    folds: Annotated[int, Meta(ge=2)]
    seed: Annotated[int, Meta(ge=0, lt=2**32)]
    search: Annotated[list[Setting], Meta(min_length=1)]


class Evaluate(_Section, frozen=True):
    rmse_max: Positive
    champion_slack: NotNegative


class Export(_Section, frozen=True):
    tolerance: NotNegative
    golden_rows: Count
    score_min: float
    score_max: float
    probation_rows: Annotated[int, Meta(ge=0)]
    zones: list[str] = []


class Register(_Section, frozen=True):
    """`model` is its name in MLflow, and in the bundle that is released."""

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


def params_file(project: Path) -> Path:
    """The parameters of the project.

    Raises:
        ConfigError: there is no such file.
    """
    path = project / PARAMS
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; run in a Fenceline project or give --project DIR")
    return path


def load_params(project: Path) -> Params:
    """Read the parameters of the project.

    Raises:
        ConfigError: the file is missing, is not YAML, has a wrong or unknown key, or values that cannot work.
    """
    path = params_file(project)
    try:
        params = msgspec.convert(_tree(path), Params)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path}: {e}") from e
    _check(params, path)
    return params


def load_contract(project: Path, params: Params) -> StreamContract:
    """The contract of the pipeline's stream.

    Raises:
        ConfigError: the file is missing, is no contract or that of another stream, or a feature's field is not there or holds no numbers.
    """
    path = project / params.contract
    try:
        contract = parse_contract(path.read_bytes(), str(path))
        types = {name: contract.field(name).type for name in params.features.fields}
    except FileNotFoundError:
        raise ConfigError(f"contract {path} does not exist; `contract` in {PARAMS} must name it") from None
    except OSError as e:
        raise ConfigError(f"contract {path} does not read ({e.strerror}); `contract` in {PARAMS} must name a file") from e
    except ContractError as e:
        raise ConfigError(f"{PARAMS} does not fit its contract: {e}") from e
    other = [f"{name} ({kind})" for name, kind in types.items() if kind not in (FieldType.INTEGER, FieldType.NUMBER)]
    if other:
        raise ConfigError(f"{PARAMS}: features.fields: {', '.join(other)} in {path}; features are made of numbers")
    if contract.stream != params.stream:
        raise ConfigError(f"{path} is the contract of stream {contract.stream!r}; {PARAMS} says {params.stream!r}")
    return contract


def override(project: Path, assignments: list[str]) -> None:
    """Write `section.key=value` assignments into params.yaml, comments kept; the value is YAML.

    Raises:
        ConfigError: there is no such file or it is not YAML; an assignment has no `=`, names no known key, or gives parameters that cannot
            work, or not with their contract. The file is then as before.
    """
    if not assignments:
        return
    from dvc.utils.serialize import YAMLFileCorruptedError, modify_yaml

    path = params_file(project)
    _tree(path)
    before = path.read_text()
    try:
        with modify_yaml(str(path)) as tree:
            for assignment in assignments:
                _assign(tree, assignment)
        load_contract(project, load_params(project))
    except YAMLFileCorruptedError as e:  # stricter than `_tree`: a key that is there twice
        raise ConfigError(f"{path}: not YAML: {e.__cause__ or e}") from e
    except ConfigError:
        path.write_text(before)
        raise


def _assign(tree: Any, assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    *parents, key = name.split(".")
    node, known = tree, _keys(Params)
    for parent in parents:
        node, known = node.get(parent) if isinstance(node, dict) else None, _keys(known.get(parent))
    if not separator or not isinstance(node, dict) or key not in known:
        raise ConfigError(f"--set {assignment!r}: want section.key=value with a key of {PARAMS}, such as train.folds=4")
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"--set {assignment!r}: the value is not YAML: {e}") from e


def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a section with their types, also those that the file leaves out; none of what is no section."""
    return {f.name: f.type for f in msgspec.structs.fields(kind)} if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else {}


def _tree(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not YAML: {e}") from e


def _check(params: Params, path: Path) -> None:
    endless = _not_finite(msgspec.to_builtins(params), "")
    if endless:
        raise ConfigError(f"{path}: {', '.join(endless)}: want a finite number")
    try:
        check_spec(params.spec)
    except BundleError as e:
        raise ConfigError(f"{path}: features: {e}") from e
    try:
        check_name(params.register.model, "register.model")  # a release would refuse it, after the training
    except ContractError as e:
        raise ConfigError(f"{path}: {e}") from e
    twice = sorted({name for name in params.spec.names if params.spec.names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: features: {', '.join(twice)} more than once; name each field and each aggregate once")
    if params.export.score_min >= params.export.score_max:
        raise ConfigError(f"{path}: export.score_min must be below score_max")


def _not_finite(node: Any, name: str) -> list[str]:
    """The names of numbers that are infinite or NaN."""
    if isinstance(node, dict | list):
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in inner for found in _not_finite(value, f"{name}.{key}" if name else str(key))]
    return [name] if isinstance(node, float) and not math.isfinite(node) else []
