"""What devices and users wrote is printed as text: no markup, no escape codes; JSON is exact."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from decimal import Decimal

import pytest

from cloud.commands.output import positive, print_devices, print_json, print_records, print_table, printable, seconds


def test_cells_are_no_markup_and_no_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("[/head]", "b"), [("[bold]x[/bold] [/oops]", "[1, 2]"), ("\x1b]0;owned\x07", None), ("a\nb\u202e", 1)])
    out = capsys.readouterr().out
    for text in ("[/head]", "[bold]x[/bold] [/oops]", "[1, 2]", r"\x1b]0;owned\x07", r"a\nb\u202e"):
        assert text in out
    assert len(out.splitlines()) == 4


def test_a_devices_free_text_does_not_break_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("device", "desired", "active", "phase", "reason", "zone", "blocks_waiting", "seen_s_ago")
    print_devices([{**dict.fromkeys(names, "x"), "zone": "[/x]"}])
    assert "[/x]" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "2147483648", "9" * 5_000, "1.0", "٣"])
def test_a_number_that_no_database_takes_is_refused(text: str) -> None:
    assert positive("2147483647") == 2147483647
    with pytest.raises(ArgumentTypeError, match="is not a whole number from 1 to 2147483647"):
        positive(text)


def test_text_that_can_be_seen_stays_as_it_is() -> None:
    assert printable("größer → 3 µm 水") == "größer → 3 µm 水" and printable("\x00\t\ud800") == r"\x00\t\ud800"


def test_json_keeps_what_text_would_escape_and_whole_numbers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"text": "\x1b[2J\n[/x]", "sum": Decimal(73), "huge": Decimal(10**37), "list": [Decimal("1.50")]}
    print_json(document)
    out = capsys.readouterr().out
    assert json.loads(out) == {"text": "\x1b[2J\n[/x]", "sum": 73, "huge": 10**37, "list": [1.5]} and "\x1b" not in out
    assert isinstance(json.loads(out)["sum"], int)


@pytest.mark.parametrize(
    ("reads", "text"),
    [*((positive, t) for t in ("0", "-1", "²", "x", "1.5", "")), *((seconds, t) for t in ("-1", "nan", "inf", "x", ""))],
)
def test_numbers_that_make_no_sense_are_refused(reads: Callable[[str], float], text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="is not a"):
        reads(text)


def test_rows_too_wide_for_a_line_are_printed_value_by_value(capsys: pytest.CaptureFixture[str]) -> None:
    heads = tuple(f"sensor_{i}" for i in range(30))
    print_records(heads, [tuple(range(30)), (None, "a\x1bb", *range(28))])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 62 and lines[0] == "row 1" and lines[30] == "  sensor_29  29"
    assert lines[32:34] == ["  sensor_0   -", "  sensor_1   a\\x1bb"]
    print_records(heads[:3], [(1, 2, 3)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "2", "3"]
