"""The user's own functions for features: a Python module that is installed beside the agent, and in the cloud.

The module holds `FUNCTIONS`, a dict of names and functions as `core.functions` describes them:

    def crest(values):  # (windows, n)
        return np.abs(values).max(axis=1) / np.sqrt((values * values).mean(axis=1))

    FUNCTIONS = {"crest": crest}

- Code is never in a bundle: agent.toml names the module (`functions = "pump_functions"`), the operator installs it.
- The digest is that of the module's file. What the module imports is not in it: keep it to NumPy. The golden vectors of a bundle show on
  the device what the digest cannot: another NumPy that gives other bits.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

from edge_agent.contract.errors import ConfigError
from edge_agent.core.functions import NO_FUNCTIONS, Function, Functions


def load_functions(module: str | None) -> Functions:
    """The functions of an installed module; none for None.

    Raises:
        ConfigError: there is no such module, it does not import, or it has no FUNCTIONS.
    """
    if not module:
        return NO_FUNCTIONS
    try:
        loaded = importlib.import_module(module)
    except Exception as e:
        raise ConfigError(f"functions: module {module!r} does not import ({e!r}); install it for this Python") from e
    found, file = getattr(loaded, "FUNCTIONS", None), getattr(loaded, "__file__", None)
    if not isinstance(found, dict) or file is None or not all(isinstance(n, str) and callable(f) for n, f in found.items()):
        raise ConfigError(f"functions: module {module!r} must be a file with FUNCTIONS, a dict of names and functions; it has {found!r}")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {name: Function(name, digest, call) for name, call in found.items()}
