"""One Ray for the tests of this folder, as it takes long to start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipelines import cluster

# Ray reads it when it is imported, which any test may do before one starts a cluster.
os.environ.update(cluster.local_environment())


@pytest.fixture(scope="package")
def ray_head() -> Iterator[dict[str, str]]:
    """A local cluster that this process is a driver of; the environment with which other processes find it."""
    with cluster.local_head() as environment:
        yield environment
