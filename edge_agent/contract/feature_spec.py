"""How readings become the inputs of a model: what a bundle's manifest says about windows and features.

- Three kinds of windows, all in event time and per entity. `trailing`: one per reading, of it and those seen before it. `tumbling` and
  `hopping`: one every `every_s`, `window_s` long, counted from 1970 UTC; it closes once and is final.
- A kind or aggregate that an older device does not know needs a higher `format` of the manifest: that device refuses it.

>>> spec = FeatureSpec(features=[Feature("x", "quantile(0.95)")], window_rows=200, window_s=1.0, kind=WindowKind.TUMBLING)
>>> spec.names, spec.format, spec.overlap
(['x_q95'], 2, 1)
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from edge_agent.contract.errors import BundleError

FEATURES_MAX = 2_048
WINDOW_ROWS_MAX = 1_024
CLOSING_ROWS_MAX = 65_536
OVERLAP_MAX = 64
OPEN_MAX = 1_024  # windows of one entity that are open at a time
EVERY_US_MIN = 1_000
WINDOW_S_MAX = 10.0 * 366 * 86_400
FORMAT_MAX = 2
FIRST_AGGREGATES = ("last", "mean", "std", "min", "max", "slope", "count")
AGGREGATES = (*FIRST_AGGREGATES, "rms", "delta")
"""Those without a parameter."""

_QUANTILE = re.compile(r"quantile\((0(?:\.\d{1,6})?|1(?:\.0{1,6})?)\)")
_FUNCTION = re.compile(r"[a-z][a-z0-9_]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class WindowKind(StrEnum):
    """What the windows of a spec are; see FeatureSpec."""

    TRAILING = "trailing"
    TUMBLING = "tumbling"
    HOPPING = "hopping"


class Feature(msgspec.Struct, frozen=True, array_like=True):
    """One aggregate over the values of one field in a window; missing values are left out.

    `last`: of the newest reading, missing if it misses there · `delta`: newest value less oldest · `slope`: per hour, least squares ·
    `std`: the population's · `rms`: root of the mean square · `count`: of values present · `quantile(q)`: linear between the two nearest ·
    or the name of a function of the spec.
    """

    field: str
    aggregate: str

    @property
    def name(self) -> str:
        """A column's name: `x_mean`; for `quantile(0.995)`: `x_q99_5`."""
        q = quantile_of(self.aggregate)
        return f"{self.field}_{self.aggregate if q is None else 'q' + f'{q * 100:.6g}'.replace('.', '_')}"


class FeatureSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Features in the order listed, over windows of one kind.

    - trailing: the window of a reading holds it and the readings of the same entity that the device saw before it, at most
      `window_rows` of them, those with an event time in (t - window_s, t].
    - tumbling, hopping: windows [k · every_s, k · every_s + window_s) of each entity; tumbling ones begin where the one before ends,
      so that their `every_s` is `window_s`. `window_rows` is what a window can hold, shared out evenly over its hops; what is seen
      after its hop is full is left out and counted.
    - A window closes when the newest event time seen of its entity, less `lateness_s`, has reached its end. A reading that comes
      after that misses the window and is counted. Windows without readings are not made.
    - functions: functions that are installed on the device, by the SHA-256 of their module; see `edge_agent.functions`.
    """

    features: list[Feature]
    window_rows: int
    window_s: float
    kind: WindowKind = WindowKind.TRAILING
    every_s: float = 0.0
    lateness_s: float = 0.0
    functions: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.features]

    @property
    def fields(self) -> list[str]:
        """The fields that features are made of, each once."""
        return list(dict.fromkeys(f.field for f in self.features))

    @property
    def window_us(self) -> int:
        return round(self.window_s * 1e6)

    @property
    def every_us(self) -> int:
        return round(self.every_s * 1e6) if self.kind is WindowKind.HOPPING else self.window_us

    @property
    def lateness_us(self) -> int:
        return round(self.lateness_s * 1e6)

    @property
    def overlap(self) -> int:
        """Windows that a reading belongs to."""
        return self.window_us // self.every_us

    @property
    def open_max(self) -> int:
        """Windows of one entity that can be open, and hold readings, at a time."""
        return 1 if self.kind is WindowKind.TRAILING else -(-(self.window_us + self.lateness_us) // self.every_us) + 1

    @property
    def hop_rows(self) -> int:
        """Readings that one hop can hold."""
        return self.window_rows // self.overlap

    @property
    def format(self) -> int:
        """The lowest manifest format whose readers understand this spec."""
        known = all(f.aggregate in FIRST_AGGREGATES for f in self.features)
        return 1 if known and self.kind is WindowKind.TRAILING and not self.functions else 2


def quantile_of(aggregate: str) -> float | None:
    """The q of `quantile(q)`, or None."""
    found = _QUANTILE.fullmatch(aggregate)
    return float(found[1]) if found else None


def check_spec(spec: FeatureSpec) -> None:
    """Raise BundleError unless the spec is within limits and agrees with itself."""
    trailing = spec.kind is WindowKind.TRAILING
    rows_max = WINDOW_ROWS_MAX if trailing else CLOSING_ROWS_MAX
    if not 1 <= len(spec.features) <= FEATURES_MAX or not 1 <= spec.window_rows <= rows_max or not spec.window_s > 0:
        raise BundleError(
            f"{len(spec.features)} features over {spec.window_rows} rows and {spec.window_s} s; "
            f"1 to {FEATURES_MAX} features, 1 to {rows_max} rows and a positive time are allowed"
        )
    if trailing and (spec.every_s or spec.lateness_s):
        raise BundleError(f"trailing windows have no every_s ({spec.every_s}) and no lateness_s ({spec.lateness_s}): set neither")
    if not trailing:
        _check_times(spec)
    _check_functions(spec)
    unknown = sorted({f.aggregate for f in spec.features if quantile_of(f.aggregate) is None} - {*AGGREGATES, *spec.functions})
    if unknown:
        raise BundleError(f"unknown aggregates {unknown}; this version knows {', '.join(AGGREGATES)}, quantile(q) and the spec's functions")


def _check_times(spec: FeatureSpec) -> None:
    """Windows that close: finite times, whole hops, few enough open at once."""
    if spec.kind is WindowKind.TUMBLING and spec.every_s not in (0.0, spec.window_s):
        raise BundleError(f"tumbling windows of {spec.window_s} s begin where the one before ends: leave every_s ({spec.every_s}) out")
    if not (spec.window_s <= WINDOW_S_MAX and 0 <= spec.lateness_s <= WINDOW_S_MAX and 0 <= spec.every_s <= spec.window_s):
        raise BundleError(
            f"windows of {spec.window_s} s every {spec.every_s} s with lateness {spec.lateness_s} s; "
            f"0 <= every_s <= window_s and 0 <= lateness_s, all at most {WINDOW_S_MAX:.0f} s"
        )
    if spec.every_us < EVERY_US_MIN or spec.window_us % spec.every_us or spec.overlap > OVERLAP_MAX:
        raise BundleError(
            f"windows of {spec.window_s} s every {spec.every_s} s; window_s must be 1 to {OVERLAP_MAX} times every_s, "
            f"a whole number, and every_s at least {EVERY_US_MIN / 1e6} s"
        )
    if spec.open_max > OPEN_MAX or spec.hop_rows < 1:
        raise BundleError(
            f"up to {spec.open_max} windows of an entity would be open, {spec.hop_rows} readings a hop; "
            f"at most {OPEN_MAX} and at least 1: lower lateness_s, or raise every_s or window_rows"
        )


def _check_functions(spec: FeatureSpec) -> None:
    for name, digest in spec.functions.items():
        if not _FUNCTION.fullmatch(name) or name in AGGREGATES or not _DIGEST.fullmatch(digest):
            raise BundleError(
                f"function {name!r} with digest {digest!r}; want a lower-case name that is no aggregate, and a SHA-256 in hex"
            )
