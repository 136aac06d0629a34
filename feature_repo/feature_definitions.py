"""What Feast knows of the project: its entity, its window features, and what its model is served with.

Names, units and limits come from the stream's contract and pipelines/params.yaml, so there is nothing to edit here for another
stream. The pipeline finds `view` and `service` by these names; further views and services of your own may stand beside them.
`feast apply` imports every .py file here as a top-level module, so this is the only one.
"""

from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import msgspec
import yaml
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Float64

from edge_agent.contract.feature_spec import Feature
from pipelines.features import CREATED_TIME, EVENT_TIME
from pipelines.params import load_contract, load_params

_PROJECT = Path(__file__).resolve().parent.parent
_params = load_params(_PROJECT)
_contract = load_contract(_PROJECT, _params)
_document = yaml.safe_load((_PROJECT / _params.contract).read_text())
_owner = str(_document.get("tenant", ""))
_tags = {
    "stream": _contract.stream,
    "contract": str(_document.get("id", "")),
    "contract_version": _contract.version,
    "windows": str(_params.spec.kind),
    "window_rows": str(_params.spec.window_rows),
    "window_s": str(_params.spec.window_s),
    "spec": sha256(msgspec.json.encode(_params.spec, order="deterministic")).hexdigest(),  # values of another spec are other values
}


def _field(feature: Feature) -> Field:
    """A feature with the unit of its field; a slope's is per hour, a count has none."""
    of = _contract.field(feature.field)
    unit = {"slope": f"{of.unit}/h", "count": "1"}.get(feature.aggregate, of.unit)
    return Field(name=feature.name, dtype=Float64, description=f"{feature.aggregate} of {of.description}", tags={"unit": unit})


entity = Entity(
    name=_contract.entity,
    join_keys=[_contract.entity],
    value_type=ValueType.STRING,
    description=_contract.field(_contract.entity).description,
    tags=_tags,
    owner=_owner,
)

source = FileSource(
    name=f"{_params.view}_source",
    path="../build/pipeline/features",
    timestamp_field=EVENT_TIME,
    created_timestamp_column=CREATED_TIME,
    description="what the features stage made of the lake",
    owner=_owner,
)

push_source = PushSource(
    name=f"{_params.view}_push",
    batch_source=source,
    description="windows of readings that have just reached the lake: fenceline features live",
    owner=_owner,
)

view = FeatureView(
    name=_params.view,
    entities=[entity],
    ttl=timedelta(seconds=_params.dataset.ttl_s),
    schema=[_field(feature) for feature in _params.spec.features],
    source=push_source,
    online=True,
    description=f"{_params.spec.kind} windows of {_params.spec.window_s:g} s, of at most {_params.spec.window_rows} readings",
    tags=_tags,
    owner=_owner,
)

service = FeatureService(
    name=_params.register.model,
    features=[view],
    description=f"what model {_params.register.model} takes, in the order of pipelines/params.yaml",
    tags=_tags,
    owner=_owner,
)
