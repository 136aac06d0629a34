"""What all stages share: where files lie, how a stage starts, and how it ends.

- A stage is `python -m pipelines.<stage>`, run by DVC in the project directory. It reads and writes `build/pipeline/`.
- Environment: FENCELINE_STATE (state directory), MLFLOW_TRACKING_URI, RAY_ADDRESS, FENCELINE_RUN_ID; all optional.
- A person's mistake ends with its message and exit 2; what went wrong outside (a server, the disk) with exit 1. DVC hides a stage's
  exit code, so the error is also left in `build/pipeline/error.json`, where `pipelines.run` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloud import config
from cloud.roots import Roots
from edge_agent.contract.errors import ConfigError, FencelineError
from edge_agent.contract.stream import StreamContract
from pipelines import cli, cluster
from pipelines.params import Params, load_contract, load_params

BUILD = Path("build/pipeline")


@dataclass(frozen=True)
class Context:
    """Everything a stage is given."""

    project: Path
    state: Path
    params: Params
    contract: StreamContract
    lake: Roots

    @property
    def build(self) -> Path:
        return self.project / BUILD

    @property
    def readings(self) -> Path:
        """Readings in the order seen, sorted by device and epoch. One Parquet file."""
        return self.build / "snapshot/readings.parquet"

    @property
    def labels(self) -> Path:
        return self.build / "snapshot/labels.parquet"

    @property
    def lake_version(self) -> Path:
        return self.build / "snapshot/lake_version.json"

    @property
    def spec(self) -> Path:
        """What features are made with, for DVC to see: their spec with the digests of functions, and the contract's SHA-256."""
        return self.build / "snapshot/spec.json"

    @property
    def code(self) -> Path:
        """What computes, for DVC to see: the SHA-256 of Fenceline's own code, and the versions of the libraries that make numbers."""
        return self.build / "snapshot/code.json"

    @property
    def champion(self) -> Path:
        """Version and run of the champion when this pipeline run began; `null` if there was none."""
        return self.build / "snapshot/champion.json"

    @property
    def features(self) -> Path:
        """A folder of Parquet files: entity, event_time, created_time, device and the features."""
        return self.build / "features"

    @property
    def dataset(self) -> Path:
        return self.build / "dataset/dataset.parquet"

    def folder(self, stage: str) -> Path:
        """The output folder of a stage, made if need be."""
        path = self.build / stage
        path.mkdir(parents=True, exist_ok=True)
        return path


def private(path: Path) -> None:
    """Make a directory, if need be, that nobody but its owner looks into: what lies in it was taken from all zones."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def load_context(project: Path, state: Path | None = None) -> Context:
    """Read parameters, contract and settings of the project.

    Raises:
        ConfigError: one of them is missing or wrong.
    """
    params = load_params(project)
    settings = config.load(project, state)
    return Context(project, settings.state_dir, params, load_contract(project, params), settings.lake)


def main(name: str, work: Callable[[Context], None]) -> int:
    """Run the stage called `name` in the working directory, connected to Ray; the exit code."""
    error = Path.cwd() / BUILD / "error.json"
    private(error.parent)
    error.unlink(missing_ok=True)
    try:
        context = load_context(Path.cwd())
        with cluster.connected():
            work(context)
    except FencelineError as e:
        return _failed(name, str(e), 2 if isinstance(e, ConfigError) else 1, error)
    except OSError as e:
        if e.errno is None:  # not the operating system's, so a mistake of ours
            raise
        return _failed(name, str(e), 1, error)
    return 0


def _failed(name: str, message: str, code: int, error: Path) -> int:
    cli.err(f"{name}: {message}")
    try:
        error.write_text(json.dumps({"stage": name, "message": message, "exit_code": code}))
    except OSError as e:  # a full disk, which may be why the stage failed; `pipelines.run` tells what was printed then
        cli.err(f"{name}: {e}")
    return code


def write_json(path: Path, tree: object) -> None:
    """Write `tree` in the one form that gives equal files for equal content."""
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
