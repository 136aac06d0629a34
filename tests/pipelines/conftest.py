"""One Ray for the tests of this folder, as it takes long to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines import cluster


@pytest.fixture(scope="package")
def ray_head() -> Iterator[dict[str, str]]:
    """A local cluster that this process is a driver of; the environment with which other processes find it."""
    with cluster.local_head() as environment:
        yield environment
