"""References to bundles that tests of rollouts move about."""

from __future__ import annotations

from edge_agent.contract.state import BundleRef


def a_ref(version: int) -> BundleRef:
    """The reference of a version of model `m`."""
    return BundleRef(target=f"bundles/m/{version}.bundle", model="m", model_version=str(version), sha256=f"{version:064x}")


OLD, NEW = a_ref(1), a_ref(2)
