"""Personal fields: what a contract's `pii` tag makes of a value, and how anyone can see that it was done.

| `pii` | of | is stored as |
| --- | --- | --- |
| `drop` | optional numbers, text | nothing: NaN, or the empty text |
| `hash` | text | `pii:KEYID:` and 128 bits of HMAC-SHA256 under the device's key, in hex: the same text gives the same name |
| `round` | numbers, integers | the nearest multiple of `piiStep` (ties to the even one) |

- The device applies them before anything is stored (`core.privacy`); ingest checks what can be seen of it and has no key.
- KEYID names the key, so a change of keys can be seen in the data. Under another key the same text has another name.
- The fields that name a reading, and the entity, must stay usable: they may be hashed, not dropped or rounded.
- A range is that of the value stored: of a rounded field it must begin and end on the step. Rounded integers need one, within 2**53.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs_tree import number

KEY_ID_CHARACTERS = 8
HASH_CHARACTERS = 32
EXACT_MAX = 2.0**52
_HASHED = re.compile(rf"pii:[0-9a-f]{{{KEY_ID_CHARACTERS}}}:[0-9a-f]{{{HASH_CHARACTERS}}}")

Floats = npt.NDArray[np.float64]


class PiiKind(StrEnum):
    """What becomes of a personal value."""

    DROP = "drop"
    HASH = "hash"
    ROUND = "round"


@dataclass(frozen=True)
class Pii:
    """The tag of one field; `step` in the field's unit, for `round`."""

    kind: PiiKind
    step: float = 0.0


def parse_pii(custom: dict[str, Any], name: str, kind: str, required: bool) -> Pii | None:
    """The tag among a property's custom properties.

    Args:
        name: of the field; `kind`: its logical type; `required`: whether it must be there.

    Raises:
        ContractError: the tag does not fit the field.
    """
    if "pii" not in custom:
        if "piiStep" in custom:
            raise ContractError(f"field {name!r}: piiStep without pii: round")
        return None
    try:
        tag = PiiKind(str(custom["pii"]))
    except ValueError:
        raise ContractError(f"field {name!r}: pii {custom['pii']!r} is none of {', '.join(PiiKind)}") from None
    fits = {
        PiiKind.DROP: kind == "string" or (kind == "number" and not required),
        PiiKind.HASH: kind == "string",
        PiiKind.ROUND: kind in ("number", "integer"),
    }
    if not fits[tag]:
        what = {PiiKind.DROP: "text and optional numbers", PiiKind.HASH: "text", PiiKind.ROUND: "numbers and integers"}[tag]
        raise ContractError(f"field {name!r}: pii: {tag} is for {what}; this is a {'required ' if required else ''}{kind}")
    if tag is not PiiKind.ROUND:
        return Pii(tag)
    step = number(custom, "piiStep", math.nan)
    if not 0 < step < math.inf or (kind == "integer" and not step.is_integer()):
        raise ContractError(f"field {name!r}: pii: round needs piiStep, a {'whole number' if kind == 'integer' else 'number'} above 0")
    return Pii(tag, step)


def is_hashed(text: str) -> bool:
    """Whether a text looks like what `hash` leaves."""
    return _HASHED.fullmatch(text) is not None


def to_step(values: Floats, step: float) -> Floats:
    """The nearest multiples of `step`.

    >>> to_step(np.array([0.26, -0.04, 7.0]), 0.1).tolist()
    [0.3, 0.0, 7.0]
    """
    per_unit = np.rint(1 / step)
    with np.errstate(over="ignore"):
        # Of steps like 0.1 and 0.05 the quotient is the shortest decimal, the product is not.
        decimal = per_unit and abs(per_unit * step - 1) < 1e-12
        rounded = np.rint(values * per_unit) / per_unit if decimal else np.rint(values / step) * step
    return np.where(np.abs(values) < EXACT_MAX * step, rounded, values) + 0.0  # beyond, floats lie further apart; no -0.0


def off_step(values: Floats, step: float) -> npt.NDArray[np.bool_]:
    """Which values are no multiples of `step`; NaN, missing, is none of them."""
    off: npt.NDArray[np.bool_] = ~np.isnan(values) & (to_step(values, step) != values)
    return off
