"""Payloads as quarantine keeps them: any bytes come back, and nothing a sensor sends looks like a mark of ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.rejects import BASE64, REDACTED, from_text, to_text


@given(st.sampled_from([b"", BASE64.encode(), REDACTED.encode()]), st.binary(max_size=20))
def test_any_payload_comes_back_and_no_other_text_stands_for_it(prefix: bytes, rest: bytes) -> None:
    payload = prefix + rest
    text = to_text(payload)
    assert from_text(text) == payload and not text.startswith(REDACTED)
    assert text.startswith(BASE64) or text.encode() == payload


def test_what_was_treated_keeps_its_mark() -> None:
    assert to_text(b'redacted:{"a":1}', treated=True) == 'redacted:{"a":1}'


def test_what_older_agents_kept_as_it_was_is_plain_text() -> None:
    for text in ("base64:abc", "base64:é", "base64:a b=", "base64: YWJj"):
        assert from_text(text) == text.encode()
