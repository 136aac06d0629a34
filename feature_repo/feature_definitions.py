"""What Feast knows: one entity and one feature view, named by pipelines/params.yaml and the stream's contract.

`feast apply` imports every .py file here as a top-level module, so this is the only one.
"""

from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64

from pipelines.params import load_contract, load_params

_PROJECT = Path(__file__).resolve().parent.parent
_params = load_params(_PROJECT)
_contract = load_contract(_PROJECT, _params)

entity = Entity(name=_contract.entity, join_keys=[_contract.entity], value_type=ValueType.STRING)

source = FileSource(
    name=f"{_params.view}_source",
    path="../build/pipeline/features",
    timestamp_field="event_time",
    created_timestamp_column="created_time",
)

view = FeatureView(
    name=_params.view,
    entities=[entity],
    ttl=timedelta(seconds=_params.dataset.ttl_s),
    schema=[Field(name=name, dtype=Float64) for name in _params.spec.names],
    source=source,
    online=True,
)
