r"""
Takes secrets out of text, however whoever shows them writes them.

Rules of this file: it knows nothing of where secrets come from. A letter or digit is looked for as it stands, any other
character as itself, behind backslashes, as URLs quote it (%22, and %2522 where they do so twice), as HTML does (&quot;
&#34; &amp;quot;), as JSON and Python do (\u0022, \x22), in any mixture. Only errors are looked through, no usual path.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

SHORTEST: Final = 4
"""Characters of a secret that is redacted in messages; a password of one letter would leave none of them readable."""
_TELLING: Final = 6
"""Characters of a name that is redacted inside of words, too."""

SECRET_NAME: Final = re.compile(r"(?i)auth|token|key|secret|cookie|sign|cred|pass|jwt|session")
"""Of a header."""

_BEFORE_USER_INFO: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
SECRET_QUERY_ITEM: Final = re.compile(r"(?i)(\b[^=&]*(?:pass|pwd|token|secret|key|odbc_connect)[^=&]*=)[^&]*")
_RUN: Final = re.compile(r"\\+|\s+|.", re.DOTALL)


def redact(text: str, secrets: Iterable[str], names: Iterable[str] = ()) -> str:
    """
    The text with `***` in place of each secret, in whatever spelling.

    Args:
        text: To be shown.
        secrets: Wherever they stand; those too short to tell are passed over.
        names: Of users. A short one only where it is a word of its own: it may be one, such as "user".
    """
    patterns = {secret: _pattern(secret) for secret in secrets if len(secret) >= SHORTEST}
    for name in names:
        if len(name) >= SHORTEST and name not in patterns:
            patterns[name] = _pattern(name) if len(name) >= _TELLING else rf"(?<![^\W_]){_pattern(name)}(?![^\W_])"
    for secret in sorted(patterns, key=len, reverse=True):  # one may hold another
        text = re.sub(patterns[secret], "***", text)
    return text


def user_info(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """
    Names and secrets of `user:password`, as it stands in a URI: both as they are and unquoted.

    Args:
        text: What stands before the `@`.
    """
    user, _, password = text.partition(":")
    plain = f"{unquote(user)}:{unquote(password)}"
    return (user, unquote(user)), (password, unquote(password), b64encode(plain.encode()).decode())


def secrets_in_header(value: str) -> Iterator[str]:
    """The value of a header, and what is secret in it: what follows a scheme; user and password; a cookie's value."""
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
    Names and secrets in the user info of proxies, be their URIs valid or not.

    Args:
        environment: Variables and their values.
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
    """The URI without its user info, and without what looks like a secret in its query."""
    parts = urlsplit(uri)
    query = "&".join(item for item in parts.query.split("&") if SECRET_QUERY_ITEM.search(item) is None)
    if "@" not in parts.netloc and query == parts.query:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def redact_uri(uri: str) -> str:
    """The URI with `***` for its user info, and for what looks like a secret in its query."""
    try:
        urlsplit(uri)
    except ValueError:
        return "***"
    head, _, tail = uri.rpartition("@")
    scheme, _, user_info = head.partition("//")
    if ":" in head and not _BEFORE_USER_INFO.match(head):  # a scheme or a slash was forgotten
        return f"***@{tail}"
    if user_info and not user_info.startswith("/"):  # by the raw text: a password may hold what ends a host for others
        uri = f"{scheme}//***@{tail}"
    parts = urlsplit(uri)
    query = SECRET_QUERY_ITEM.sub(r"\1***", parts.query)
    if "@" not in parts.netloc:
        return uri if query == parts.query else urlunsplit(parts._replace(query=query))
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2], query=query))


def _pattern(secret: str) -> str:
    return "".join(_spelt(each) for each in _RUN.findall(secret))


def _spelt(run: str) -> str:
    """A pattern of one character, or of a run of backslashes or blanks: those that follow each other count as one."""
    character = run[0]
    if character.isascii() and character.isalnum():
        return character
    if character == "\\":
        return rf"(?:\\|{_escaped(character)}){{1,{4 * len(run)}}}"
    if character.isspace():
        return rf"(?:\s|\+|\\{{1,4}}[nrt]|\\{{0,4}}{_escaped(character)}){{1,{2 + len(run)}}}"
    return rf"\\{{0,8}}(?:{re.escape(character)}|{_escaped(character)})"


def _escaped(character: str) -> str:
    """What stands for it, in JSON and Python after backslashes; no two of them match the same text."""
    from html.entities import codepoint2name  # a table of thousands, which few processes need

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
