"""Progress without a terminal: lines, not too many, and the time of each phase."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cloud.demo.display import Display


def test_lines_are_few_and_end_with_the_total() -> None:
    out = io.StringIO()
    with Display(Console(file=out)).counting("readings", 1_000) as advance:
        for _ in range(1_000):
            advance(1)
    assert out.getvalue() == "  readings: 1,000 of 1,000\n"


def test_a_phase_that_fails_has_a_time_too() -> None:
    display = Display(Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="broken"), display.phase("train", "a model"):
        raise ValueError("broken")
    assert display.seconds["train"] >= 0


def test_markup_in_a_message_is_only_text() -> None:
    out = io.StringIO()
    Display(Console(file=out)).say("[1/7] snapshot")
    assert out.getvalue() == "  [1/7] snapshot\n"
