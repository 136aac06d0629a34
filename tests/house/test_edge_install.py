"""The agent stays light: no cloud library is loaded by it, and none is installed with the edge extra."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

import edge_agent

HEAVY = ("dask", "deltalake", "duckdb", "dvc", "feast", "mlflow", "pandas", "pyarrow", "ray", "scipy", "sklearn", "sqlalchemy", "starlette")


# RFC 8032, section 7.1, test 2.
SIGNED = """
import sys
sys.modules["cryptography"] = None
from securesystemslib.signer import Signature, SSlibKey
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
signature = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
key = SSlibKey.from_dict("k", {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public}})
key.verify_signature(Signature("k", signature), b"\x72")
try:
    key.verify_signature(Signature("k", signature), b"\x73")
except (UnverifiedSignatureError, VerificationError):
    print("verified and refused")
"""


def modules() -> list[str]:
    found = pkgutil.walk_packages(edge_agent.__path__, "edge_agent.")
    return ["edge_agent", *(m.name for m in found if not m.name.endswith("__main__"))]


def test_no_module_of_the_agent_loads_a_cloud_library() -> None:
    code = f"import importlib, sys\nfor name in {modules()}:\n    importlib.import_module(name)\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert not {m.partition(".")[0] for m in run.stdout.split()} & {*HEAVY, "cloud", "pipelines"}


def test_release_signatures_verify_without_the_cryptography_library() -> None:
    run = subprocess.run([sys.executable, "-c", SIGNED], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.strip() == "verified and refused", run.stderr


@pytest.mark.skipif(not os.environ.get("FENCELINE_EDGE_ONLY"), reason="for `make test-edge`, where only the edge extra is installed")
def test_edge_extra_installs_no_cloud_library() -> None:
    assert [name for name in HEAVY if importlib.util.find_spec(name)] == []
