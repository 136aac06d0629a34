"""Ray: one local head for all stages, or a cluster that is there already; and the three ways in which stages use it.

- `RAY_ADDRESS` says where the cluster is. Without it a stage starts a local one for itself.
- A local head listens on loopback only, has no dashboard, a small object store, and a random token: other users of the
  machine cannot hand it code.
- No usage statistics, and Ray does not touch the accelerator variables.
- Ray reads its environment when it is imported, so it is imported here only, after the environment is set.

    with connected():
        total = run(sum, [1, 2])
        for i, value in as_done(pow, [(2, 3), (3, 2)]): ...
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_agent.contract.errors import FencelineError, UnavailableError

OBJECT_STORE_BYTES = 256 * 1024 * 1024
CPUS_MAX = 16
TASK_S_MAX = 1_800
TEMP_CHARS_MAX = 24  # Ray adds up to 80

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def connected() -> Iterator[None]:
    """Be a driver of the cluster at RAY_ADDRESS, or of a local head that lives as long as this.

    Raises:
        UnavailableError: nothing answers at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        with local_head():
            yield
        return
    os.environ.update(_QUIET)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UnavailableError(f"no Ray cluster answers at RAY_ADDRESS={address} ({e}); unset it to run locally") from e
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def at_hand() -> Iterator[None]:
    """The cluster that this process is a driver or a task of; if it is none, as `connected`."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield
        return
    with connected():
        yield


def local_environment() -> dict[str, str]:
    """What Ray must find in the environment when it is imported, for a local head to be closed to others."""
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    # On Linux Ray turns 127.0.0.1 into the machine's outer address, unless it thinks it cannot form a cluster.
    return {**_QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def local_head() -> Iterator[dict[str, str]]:
    """Start a local cluster; yields the environment with which child processes find it."""
    here = local_environment()
    os.environ.update(here)
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    with _temp_dir() as temp_dir:
        ray.init(
            num_cpus=min(os.cpu_count() or 1, CPUS_MAX),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
        )
        try:
            yield {**here, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        finally:
            ray.shutdown()


@contextmanager
def _temp_dir() -> Iterator[str]:
    """A directory for Ray's session, gone afterwards; a short name, as Ray's sockets lie in it and the kernel takes 107 bytes."""
    base = tempfile.gettempdir()
    if len(base) > TEMP_CHARS_MAX:
        base = "/tmp"
    with tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True) as path:
        yield path


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` as one Ray task; its result, or its own error."""
    return next(as_done(function, [arguments]))[1]


def as_done(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> Iterator[tuple[int, Any]]:
    """Call `function` once per entry of `calls`, a Ray task each; (index, result) as they finish.

    Raises:
        UnavailableError: no task ended within TASK_S_MAX.
        FencelineError, OSError: ours, and what the operating system says, as a task raised it. Other errors come as Ray's own, with the
            task's traceback.
    """
    import ray

    task = ray.remote(function)
    waiting = {task.remote(*arguments): i for i, arguments in enumerate(calls)}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=TASK_S_MAX)
        if not done:
            raise UnavailableError(f"none of {len(waiting)} Ray tasks ended within {TASK_S_MAX} s; has the cluster a free CPU for them?")
        (ready,) = done
        try:
            result = ray.get(ready)
        except ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, FencelineError) or (isinstance(e.cause, OSError) and e.cause.errno is not None):
                raise e.cause from e
            raise
        yield waiting.pop(ready), result


def shuffle(
    split: Callable[..., list[Any]], merge: Callable[..., Any], shares: Sequence[Sequence[Any]], parts: int, *common: Any
) -> Iterator[tuple[int, Any]]:
    """Map and reduce: `split` each share into `parts` pieces, then `merge(part, *common, *pieces)`; (part, result) as they finish.

    Pieces go from task to task; this process never holds them. Raises what `as_done` raises.
    """
    import ray

    task = ray.remote(_pieces).options(num_returns=parts)
    shuffled = [task.remote(split, *arguments) for arguments in shares]
    by_share = [[one] for one in shuffled] if parts == 1 else shuffled
    yield from as_done(merge, [(part, *common, *(pieces[part] for pieces in by_share)) for part in range(parts)])


def _pieces(split: Callable[..., list[Any]], *arguments: Any) -> Any:
    """A task with several results returns them all, one with one result returns it bare."""
    pieces = split(*arguments)
    return pieces[0] if len(pieces) == 1 else pieces


def share(value: Any) -> Any:
    """Put a value where all tasks can read it; pass what comes back as an argument."""
    import ray

    return ray.put(value)


def python_path() -> str:
    """This package for child processes, also where `pipelines/` of a copied project holds no code."""
    here = str(Path(__file__).resolve().parent.parent)
    parts = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != here]
    return os.pathsep.join([here, *parts])
