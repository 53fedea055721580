r"""
Redaction: replaces secrets by `***` in text, URIs and headers.
"""

# Rules of this file:
# - Callers pass the secrets. This module does not know where they are configured.
# - A server or a library may echo a secret in its own spelling. So letters and digits are matched as they are, and any
#   other character as itself, after backslashes, percent-encoded once or twice (%22, %2522), as an HTML entity (&quot;
#   &#34; &amp;quot;), or as an escape of JSON or Python (\u0022, \x22), in any mixture.
# - It is slow, and meant for error messages only.

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

MIN_SECRET_LENGTH: Final = 4
"""Shorter secrets are not redacted: a password of one letter would make every message unreadable."""
_MIN_NAME_LENGTH_IN_WORDS: Final = 6
"""Names of at least this length are redacted inside of longer words, too."""

SECRET_HEADER_NAME: Final = re.compile(r"(?i)auth|token|key|secret|cookie|sign|cred|pass|jwt|session")
"""Matches the names of headers whose values are secret."""
SECRET_QUERY_ITEM: Final = re.compile(r"(?i)(\b[^=&]*(?:pass|pwd|token|secret|key|odbc_connect)[^=&]*=)[^&]*")
"""Matches an item of a URI's query whose value is secret; the group is the item up to its value."""

_BEFORE_USER_INFO: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_CHARACTER_OR_RUN: Final = re.compile(r"\\+|\s+|.", re.DOTALL)


def redact(text: str, secrets: Iterable[str], names: Iterable[str] = ()) -> str:
    """
    Replace each secret in a text by `***`, in whichever spelling it occurs.

    Args:
        text: The text to be shown.
        secrets: Replaced wherever they occur, unless they are shorter than MIN_SECRET_LENGTH.
        names: User names. A short one is replaced only where it is a whole word: it may be a common one, like "user".
    """
    patterns = {secret: _pattern(secret) for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}
    for name in names:
        if len(name) >= MIN_SECRET_LENGTH and name not in patterns:
            patterns[name] = (
                _pattern(name) if len(name) >= _MIN_NAME_LENGTH_IN_WORDS else rf"(?<![^\W_]){_pattern(name)}(?![^\W_])"
            )
    for secret in sorted(patterns, key=len, reverse=True):  # longest first: one secret may contain another
        text = re.sub(patterns[secret], "***", text)
    return text


def user_info(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    Return the names and the secrets in the user info of a URI, both as they are written there and unquoted.

    Args:
        text: The part of the URI before the `@`: `user:password`.
    """
    user, _, password = text.partition(":")
    plain = f"{unquote(user)}:{unquote(password)}"
    return (user, unquote(user)), (password, unquote(password), b64encode(plain.encode()).decode())


def secrets_in_header(value: str) -> Iterator[str]:
    """
    Yield a header's value and the secrets inside it: the part after a scheme, the password of Basic, cookies' values.
    """
    scheme, _, rest = value.partition(" ")
    yield from (value, rest)
    if scheme.lower() == "basic":
        try:
            plain = b64decode(rest, validate=True).decode()
        except ValueError:
            return
        yield from (plain, plain.partition(":")[2])
    elif "=" in value:
        yield from (item.partition("=")[2].strip() for item in value.split(";"))


def proxy_user_info(environment: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """
    Return the names and the secrets in the user info of all proxy variables. The URIs need not be valid.

    Args:
        environment: Names and values of environment variables.
    """
    names: list[str] = []
    secrets: list[str] = []
    for variable, value in environment:
        if variable.lower().endswith("_proxy") and "@" in value:
            head = value.rpartition("@")[0]
            found = user_info(head.partition("//")[2] or head)
            names += found[0]
            secrets += found[1]
    return names, secrets


def strip_secrets(uri: str) -> str:
    """Remove the user info from a URI, and the items of its query that look like secrets."""
    parts = urlsplit(uri)
    query = "&".join(item for item in parts.query.split("&") if SECRET_QUERY_ITEM.search(item) is None)
    if "@" not in parts.netloc and query == parts.query:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def redact_uri(uri: str) -> str:
    """Replace the user info of a URI by `***`, and the values in its query that look like secrets."""
    try:
        urlsplit(uri)
    except ValueError:
        return "***"
    head, _, tail = uri.rpartition("@")
    scheme, _, user_info = head.partition("//")
    if ":" in head and not _BEFORE_USER_INFO.match(head):  # the user forgot the scheme or a slash
        return f"***@{tail}"
    # Not by urlsplit: an unquoted password may contain a slash, which ends the host for urlsplit.
    if user_info and not user_info.startswith("/"):
        uri = f"{scheme}//***@{tail}"
    parts = urlsplit(uri)
    query = SECRET_QUERY_ITEM.sub(r"\1***", parts.query)
    if "@" not in parts.netloc:
        return uri if query == parts.query else urlunsplit(parts._replace(query=query))
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2], query=query))


def _pattern(secret: str) -> str:
    return "".join(_spellings(each) for each in _CHARACTER_OR_RUN.findall(secret))


def _spellings(run: str) -> str:
    """
    Return a pattern of all spellings of one character, or of a run of backslashes or of blanks.

    A run is matched as a whole, as servers collapse blanks and double backslashes.
    """
    character = run[0]
    if character.isascii() and character.isalnum():
        return character
    if character == "\\":
        return rf"(?:\\|{_escaped(character)}){{1,{4 * len(run)}}}"
    if character.isspace():
        return rf"(?:\s|\+|\\{{1,4}}[nrt]|\\{{0,4}}{_escaped(character)}){{1,{2 + len(run)}}}"
    return rf"\\{{0,8}}(?:{re.escape(character)}|{_escaped(character)})"


def _escaped(character: str) -> str:
    """
    Return a pattern of all escapes of a character; those of JSON and Python without their backslashes.

    No two alternatives match the same text: else the time of a search could grow exponentially.
    """
    from html.entities import codepoint2name  # not at the top: a table of thousands that few processes need

    data, point = character.encode("utf-8", "surrogatepass"), ord(character)
    entities = [f"#0*{point}", f"#x0*{point:x}", *filter(None, [codepoint2name.get(point)])]
    if character == "'":
        entities.append("apos")
    spellings = [
        "".join(f"%(?:25){{0,4}}{byte:02x}" for byte in data),
        f"&(?:amp;){{0,4}}(?:{'|'.join(entities)});",
    ]
    if character != "\\":
        units = character.encode("utf-16-be", "surrogatepass").hex()
        spellings.append(r"\\{1,8}".join(f"u{units[at : at + 4]}" for at in range(0, len(units), 4)))
        spellings.append(r"\\{1,8}".join(f"x{byte:02x}" for byte in data))
    if not character.isascii():
        spellings += [f"x{point:02x}", f"u{point:08x}", re.escape(data.decode("latin-1"))]
    return f"(?i:{'|'.join(spellings)})"
