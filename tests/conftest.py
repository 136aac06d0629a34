"""House rules of the tests.

- A test says what it needs with a marker (`needs_mosquitto`, `needs_postgres`, `needs_redis`, `needs_chromium`, `needs_root`) and is
  skipped where that is missing. Under CI=true a test that is skipped for want of something that can be installed fails instead:
  a missing package must not look like a passed test.
- Randomness comes from the `seed` fixture. The seed of the run stands in pytest's header; FENCELINE_SEED repeats it. Processes that share
  the tests (pytest-xdist) inherit it.
- Hypothesis has no deadline (2 shared cores) and prints how to repeat a failure.
- Threads of OpenMP (scikit-learn's) sleep while they wait, in child processes too: where they spin, and other processes want the cores, a
  fit of one second of processor time took sixty.

Nothing heavy is imported here: the edge-only environment uses this file too.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import zlib
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CI = os.environ.get("CI") == "true"
SEED = int(os.environ.get("FENCELINE_SEED") or random.SystemRandom().randrange(2**32))
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_INSTALLABLE = re.compile(r"not installed|could not import|needs (?!root)")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the library is loaded
settings.register_profile("fenceline", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fenceline")


def pytest_configure() -> None:
    os.environ["FENCELINE_SEED"] = str(SEED)


def pytest_report_header() -> str:
    return f"seed: {SEED} (repeat with FENCELINE_SEED={SEED})"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test: different for every test, the same for the same FENCELINE_SEED."""
    value = zlib.crc32(f"{SEED} {request.node.nodeid}".encode())
    print(f"seed: {value}, from FENCELINE_SEED={SEED}")
    return value


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_mosquitto") and not shutil.which("mosquitto", path=SYSTEM_PATH):
        pytest.skip("needs mosquitto: make system-deps")
    if item.get_closest_marker("needs_postgres") and not has_postgres():
        pytest.skip("needs PostgreSQL: make system-deps")
    if item.get_closest_marker("needs_redis") and not shutil.which("redis-server", path=SYSTEM_PATH):
        pytest.skip("needs redis-server: make system-deps")
    if item.get_closest_marker("needs_chromium") and not find_chromium():
        pytest.skip("needs chromium: make system-deps")
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")


def has_postgres() -> bool:
    """Whether a PostgreSQL server is installed; Debian keeps it off the path."""
    return any(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or bool(shutil.which("postgres"))


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name, path=SYSTEM_PATH))), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_missing_package(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_missing_package(report)
    return report


def _fail_missing_package(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not CI or not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if _INSTALLABLE.search(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI=true: {reason}"
