"""A project of its own in a directory of its own, so that the demonstration touches nothing of the user's.

What is copied is what defines a project: contracts, the pipeline graph with its parameters, and the feature definitions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from edge_agent.contract.errors import ConfigError

PARTS = (
    "contracts",
    "pipelines/dvc.yaml",
    "pipelines/params.yaml",
    "feature_repo/feature_store.yaml",
    "feature_repo/feature_definitions.py",
)


def make_project(source: Path, target: Path) -> Path:
    """Copy the project at `source` to `target` and make it a DVC repository; returns `target`.

    Raises:
        ConfigError: `source` lacks a part of a project, or DVC cannot be set up.
    """
    for part in PARTS:
        origin, copy = source / part, target / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if origin.is_dir():
                shutil.copytree(origin, copy)
            else:
                shutil.copyfile(origin, copy)
        except FileNotFoundError as e:
            raise ConfigError(f"{source} is not a whole Fenceline project: {part} is missing; give --project DIR") from e
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"]
    made = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
    if made.returncode:
        raise ConfigError(f"{target} cannot become a DVC repository: {made.stderr.strip()}")
    return target
