"""Redaction: secrets are replaced in each spelling, and little else is."""

from __future__ import annotations

import html
import json
import os
import time
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.settings._redaction import proxy_user_info, redact, secrets_in_header, user_info

SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "URL": lambda text: quote(text, safe=""),
    "URL, slashes kept": quote,
    "URL, lower case": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "URL, twice": lambda text: quote(quote(text, safe=""), safe=""),
    "form": quote_plus,
    "HTML": html.escape,
    "HTML, twice": lambda text: html.escape(html.escape(text)),
    "HTML, by numbers": lambda text: "".join(each if each.isalnum() else f"&#{ord(each)};" for each in text),
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON, twice": lambda text: json.dumps(json.dumps(text)),
    "JSON of PHP": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "JSON of Go": lambda text: json.dumps(text)[1:-1].replace("<", "\\u003c").replace("&", "\\u0026"),
    "JSON in HTML": lambda text: html.escape(json.dumps(text)),
    "repr": repr,
    "repr of bytes": lambda text: repr(text.encode()),
    "repr of a repr": lambda text: repr(repr(text.encode())),
    "UTF-8 as Latin-1": lambda text: text.encode().decode("latin-1"),
}
THORNS = "'\"/\\@%41&<: +=\N{SNOWMAN}\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{GRINNING FACE}"


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@given(middle=st.text(THORNS, max_size=6))
def test_a_secret_is_found_in_every_spelling(spell: Callable[[str], str], middle: str) -> None:
    """Servers and libraries quote secrets in many ways."""
    text = redact(f"before {spell(f'Head{middle}Tail')} after", [f"Head{middle}Tail"])
    assert "Head" not in text and "Tail" not in text
    assert text.startswith("before ") and text.endswith(" after")


def test_the_longest_secret_is_replaced_first() -> None:
    """If one secret contains another, no part of the longer one may remain."""
    assert redact("Bearer abcdefgh", ["abcd", "Bearer abcdefgh"]) == "***"


def test_short_secrets_are_not_redacted() -> None:
    """A short user name is redacted only where it is a whole word."""
    assert (
        redact("a user of users, superuser, user_1", ["a", "use", ""], ["user", "of"])
        == "a *** of users, superuser, ***_1"
    )
    assert redact("xsomebodyx", [], ["somebody"]) == "x***x"


def test_user_info_and_headers_are_split_into_secrets() -> None:
    """Quoted and unquoted, encoded in base64 and plain."""
    basic = b64encode(b"u@ser:p/w").decode()
    assert user_info("u%40ser:p%2Fw") == (("u%40ser", "u@ser"), ("p%2Fw", "p/w", basic))
    assert [*secrets_in_header(f"Basic {basic}")] == [f"Basic {basic}", basic, "u@ser:p/w", "p/w"]
    assert [*secrets_in_header("Bearer x")] == ["Bearer x", "x"]
    assert "v1" in [*secrets_in_header("a=v1; b=v2")] and "v2" in [*secrets_in_header("a=v1; b=v2")]
    assert [*secrets_in_header("Basic nonsense")] == ["Basic nonsense", "nonsense"]


@pytest.mark.parametrize("value", ["http://u:p/w@host:1", "u:p/w@host", "http://u:p/w@host:port:1"])
def test_proxies_are_found_by_the_names_of_their_variables(value: str) -> None:
    """Also if their URI is not valid."""
    names, secrets = proxy_user_info([("HTTPS_proxy", value), ("NO_PROXY", "host"), ("PATH", "x@y")])
    assert "u" in names and "p/w" in secrets
    assert proxy_user_info(os.environ.items()) == ([], [])


@pytest.mark.parametrize("run", ["\\", "%25", "&amp;", " ", "\\n", "x"])
@pytest.mark.parametrize("secret", ["\\\\\\\"\\'abc\\ \\d", THORNS, "    a   b", "&&&&%%%%", "\n\\\n\\b"])
def test_no_body_makes_the_search_slow(run: str, secret: str) -> None:
    """A server chooses the text that is searched."""
    begin = time.process_time()
    redact(run * (100_000 // len(run)), [secret])
    assert time.process_time() - begin < 5
