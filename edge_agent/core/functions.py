"""Functions of the user's own in features: NumPy code that is installed on the device and in the cloud, never sent in a bundle.

- A function takes the values of many windows, float64 (windows, n): a row is one window's values, oldest first, none missing, n the same
  for all. It returns one number per row, and a row's number depends on that row alone.
- It is called once for each n that occurs, never for windows without values (they give NaN). What it gets is a copy.
- A spec names each by the digest of its module: a device that has it not, or another version of it, refuses the bundle.

>>> double = Function("double", "0" * 64, lambda values: values.sum(axis=1) * 2)
>>> double.over(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
[6.0, 14.0]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_agent.contract.columns import Floats
from edge_agent.contract.errors import BundleError, ContractError
from edge_agent.contract.feature_spec import FeatureSpec


class FunctionError(ContractError):
    """The function `name` failed. Its words may hold values that it was given."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(detail)
        self.name = name


@dataclass(frozen=True)
class Function:
    """One function; `digest` is the SHA-256 of the module that it comes from."""

    name: str
    digest: str
    call: Callable[[Any], Any]

    def over(self, values: Floats) -> Floats:
        """Its result for windows of equally many values, (windows, n): float64 (windows,).

        Raises:
            FunctionError: it failed.
            ContractError: it did not give one number per window.
        """
        given = np.repeat(values, 2, axis=0) if len(values) == 1 else values.copy()  # one row alone might be added up in another order
        try:
            result = np.asarray(self.call(given), np.float64)
        except Exception as e:
            raise FunctionError(self.name, f"function {self.name!r} failed on windows of shape {values.shape}: {e!r}") from e
        if result.shape != (len(given),):
            raise ContractError(f"function {self.name!r} gave shape {result.shape} for windows {given.shape}; want one number per row")
        return result[: len(values)]


Functions = Mapping[str, Function]
NO_FUNCTIONS: Functions = {}


def check_functions(spec: FeatureSpec, functions: Functions) -> None:
    """Raise BundleError unless every function of the spec is installed here, in the version that it names."""
    for name, digest in spec.functions.items():
        found = functions.get(name)
        if found is None:
            have = ", ".join(functions) or "none"
            raise BundleError(
                f"function {name!r} is not installed here (there are: {have}); install its module and name it: `functions` in agent.toml, "
                "`fenceline release --functions`"
            )
        if found.digest != digest:
            raise BundleError(f"function {name!r} is another version here: module {found.digest[:12]}, the bundle wants {digest[:12]}")
