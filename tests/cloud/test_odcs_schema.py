"""Contracts against the schema that the Open Data Contract Standard publishes (not on the device: it needs jsonschema)."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import yaml

CONTRACTS = Path(__file__).parents[2] / "contracts"


def test_every_contract_is_valid_by_the_schema_of_the_standard() -> None:
    schema = json.loads((resources.files("open_data_contract_standard") / "schema.json").read_text())
    assert "v3.1.0" in schema["properties"]["apiVersion"]["enum"]
    validator = jsonschema.validators.validator_for(schema)(schema)
    paths = sorted(CONTRACTS.glob("*.odcs.yaml"))
    assert paths
    for path in paths:
        tree = yaml.safe_load(path.read_bytes())
        assert tree["apiVersion"] == "v3.1.0"
        assert [f"{path.name} {e.json_path}: {e.message}" for e in validator.iter_errors(tree)] == []
