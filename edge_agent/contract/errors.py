"""Errors, sorted by what the caller does next, and the reasons they are counted under."""

from __future__ import annotations

from enum import StrEnum

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes from outside: text that is not UTF-8 and deep nesting have errors of their own."""


class FencelineError(Exception):
    """The base of every error that Fenceline raises on purpose."""


class ContractError(FencelineError):
    """Input breaks what edge and cloud agreed on: reject it, count it, never retry."""


class BundleError(FencelineError):
    """A bundle may not run here: reject it, report why, keep the active one."""


class UnavailableError(FencelineError):
    """Something outside does not answer now: keep the data, back off, retry."""


class ConfigError(FencelineError):
    """A person has to change a setting or a command: show the hint, exit 2."""


class Reason(StrEnum):
    """Why something was refused. One word for the result, the log line and the metric label."""

    # A reading goes to quarantine.
    MALFORMED = "malformed"  # the payload is not in the contract's encoding
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    OVERSIZE = "oversize"
    UNKNOWN_TOPIC = "unknown_topic"
    NO_BIRTH = "no_birth"  # Sparkplug: no birth certificate says what these metrics are
    SEQUENCE_GAP = "sequence_gap"  # Sparkplug: messages are missing, a new birth certificate may be among them
    # A position is refused; what follows for readings is in core.track.
    NULL_ISLAND = "null_island"
    IMPOSSIBLE_JUMP = "impossible_jump"  # faster than this device can move
    FUTURE_FIX = "future_fix"
    STALE_FIX = "stale_fix"
    # A stored block is given up; it is named in the loss ledger.
    EVICTED_FULL = "evicted_full"  # to make room for newer readings
    EVICTED_AGE = "evicted_age"  # older than the buffer's limit
    DAMAGED = "damaged"  # the disk gave other bytes back than were written
    # A block is refused by ingest; one of the loss ledger that names too many ranges is OVERSIZE.
    CORRUPT = "corrupt"
    WRONG_DEVICE = "wrong_device"  # header and topic name different devices, lanes or streams
    UNKNOWN_STREAM = "unknown_stream"
    DENIED = "denied"  # the broker refused a topic that is not this device's, or not of this region's zones
    WRONG_REGION = "wrong_region"  # this region may not hold the block's zone
    NO_ROOT = "no_root"  # the lake's settings do not say where the block's lane lies
    CONTRACT_BROKEN = "contract_broken"  # the block's contract does not fit the rows that the lake holds already
    # A row of a block goes to the lake's quarantine; so it may for reasons of the first group.
    WRONG_UNIT = "wrong_unit"  # the device's contract has other units
    NOT_PRIVATE = "not_private"  # a personal value that was not treated as the contract says
    # A bundle is refused by the device.
    UNSIGNED = "unsigned"
    TAMPERED = "tampered"
    STALE = "stale"
    FOREIGN = "foreign"  # meant for another stream, contract version or zone
    SELF_TEST = "self_test"
    PROBATION = "probation"  # the first windows after activation were bad
    # The model worker failed.
    WORKER_TIMEOUT = "worker_timeout"
    WORKER_DIED = "worker_died"
    BAD_SCORES = "bad_scores"
    UNDONE = "undone"  # an operator asked for the previous bundle


class PayloadError(ContractError):
    """One payload breaks its contract; `reason` is what it is counted under."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
