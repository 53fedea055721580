"""
Credentials: the Authorization header of requests to an HTTP server.

The first of these that is set counts:

    user info in the URI
    `token=` of the constructor
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, each completed by `~/.mlflow/credentials`
    MLFLOW_TRACKING_TOKEN
    `~/.netrc`, which requests reads, the library that MLflow sends by
"""

# Rules of this file: variables are read for every request, so that a changed token is used; files are read and a
# callable is called again after a 401. The callable runs in a worker thread, because it may block, even for ever. No
# secret appears in a text or in a repr.

from __future__ import annotations

import base64
import configparser
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio

from runqueue.errors import AuthError
from runqueue.http._signing import Outgoing
from runqueue.runtime._waiting import in_thread, wait_for
from runqueue.settings import _environment as environment
from runqueue.settings._config import Token, is_header_value
from runqueue.settings._redaction import redact, secrets_in_header, user_info

_USERNAME = "MLFLOW_TRACKING_USERNAME"
_PASSWORD = "MLFLOW_TRACKING_PASSWORD"
_FILE = "~/.mlflow/credentials"
_CALL_TIMEOUT = 600.0
"""Seconds after which a call of the token's callable counts as stuck, and another call is made."""
_THREADS = 8
"""Threads for calls of the token's callable. All but one of them may hold stuck calls."""
_AUTHORIZATION = re.compile(r"(?i)\b(basic|bearer)\s+[A-Za-z0-9+/=._~-]{6,}")

logger = logging.getLogger("runqueue")


def read_file() -> tuple[str | None, str | None]:
    """
    User and password of `~/.mlflow/credentials`, the file that `mlflow` itself reads: an INI file with a section
    [mlflow] of `mlflow_tracking_username` and `mlflow_tracking_password`.

    Raises:
        AuthError: The file exists and cannot be read. Its content is not shown.
    """
    path = os.path.expanduser("~/.mlflow/credentials")  # Path.expanduser raises where there is no home
    if not os.path.exists(path):  # False, too, in a home that is closed to this user
        return None, None
    parser = configparser.ConfigParser()
    fault = None
    try:
        with open(path) as file:  # ConfigParser.read would pass over a file that it may not open
            parser.read_file(file)
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        fault = type(error).__name__
    if fault is not None:
        raise AuthError(f"the file ~/.mlflow/credentials cannot be read ({fault})")
    if "mlflow" not in parser:
        return None, None
    section = parser["mlflow"]
    return _value(section, "mlflow_tracking_username"), _value(section, "mlflow_tracking_password")


def _value(section: configparser.SectionProxy, name: str) -> str | None:
    """The value as mlflow reads it (`%%` is one %); where mlflow fails at a single %, the text as it is."""
    try:
        return section.get(name)
    except configparser.InterpolationError:
        return section.get(name, raw=True)


def find_netrc() -> str | None:
    """The file that requests reads: the one that NETRC names, else `~/.netrc` or `~/_netrc`."""
    named = os.environ.get("NETRC")
    paths = ("~/.netrc", "~/_netrc") if named is None else (named,)
    return next((path for path in paths if os.path.exists(os.path.expanduser(path))), None)


def read_netrc(path: str, host: str) -> tuple[str, str] | None:
    """
    User and password of the file's entry for this host, else of its default entry, as in requests.

    Raises:
        OSError, ValueError, netrc.NetrcParseError: The file cannot be read.
    """
    from netrc import netrc

    found = netrc(os.path.expanduser(path)).authenticators(host)
    if found is None or not any(found):
        return None
    login, account, password = found
    return login or account or "", password or ""


class Credentials:
    """
    Args:
        uri: The tracking URI, with or without user info.
        token: The constructor's.
        passwords: Whether a user and password are used at all.
        netrc: Whether `~/.netrc` is used if nothing else is found.
    """

    def __init__(self, uri: str, token: Token | None, *, passwords: bool = True, netrc: bool = True) -> None:
        parts = urlsplit(uri)
        named = passwords and parts.username is not None
        self._user_info_text = parts.netloc.rpartition("@")[0]
        self._user_info = (unquote(parts.username or ""), unquote(parts.password or "")) if named else None
        self._host = parts.hostname or ""
        self._passwords = passwords
        self._takes_netrc = passwords and netrc
        self._netrc: tuple[str, str] | None = None
        self._netrc_is_read = False
        self._netrc_is_faulty = False
        self._token = token
        self._last: str | None = None
        self._last_header: str | None = None
        self._file: tuple[str | None, str | None] | None = None
        # One call of the token's callable at a time: requests that come meanwhile wait for its result.
        self._call: Future[str | None] | None = None
        self._begun = 0.0
        self._threads = anyio.CapacityLimiter(_THREADS) if callable(token) else None

    def __repr__(self) -> str:
        return "<Credentials ***>"

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        if self._threads is not None and self._user_info is None and (fresh or self._last is None):
            await self._ask()
        given = [name for name in request.headers if name.lower() == "authorization"]
        value = self.header(fresh=fresh, netrc=not given)
        if value is not None:
            for name in given:
                del request.headers[name]
            request.headers["Authorization"] = value

    def header(self, *, fresh: bool = False, netrc: bool = True) -> str | None:
        """
        The value of the Authorization header; None without credentials.

        Args:
            fresh: Whether the files are read again.
            netrc: Whether `~/.netrc` may be used for this request.
        """
        self._last_header = self._header(fresh=fresh, netrc=netrc)
        return self._last_header

    def source(self) -> str:
        """
        The kind of the credentials and the place where they were found, in words, for a diagnosis. The token of a
        callable counts once it has been called.

        Raises:
            AuthError: MLflow's file cannot be read.
        """
        user, token, source = self._found(fresh=False, netrc=True)
        if token:
            return f"token, of {source}"
        if user is not None:
            kinds = [kind for kind, value in zip(("user", "password"), user, strict=True) if value]
            return f"{' and '.join(kinds) or 'an empty user'}, of {source}"
        return f"none; {find_netrc()} cannot be read" if self._netrc_is_faulty else "none"

    def _header(self, *, fresh: bool, netrc: bool) -> str | None:
        user, token, _ = self._found(fresh=fresh, netrc=netrc)
        if user is not None:
            return _basic(user)
        if not is_header_value(token):
            raise AuthError("the token holds a character that no header can hold (it is not shown)")
        return f"Bearer {token}" if token else None

    def _found(self, *, fresh: bool, netrc: bool) -> tuple[tuple[str, str] | None, str, str]:
        """User and password, or a token, and the place where they were found."""
        if self._user_info is not None:
            return self._user_info, "", "the URI's user info"
        if self._token is None:
            user, source = self._user_and_password(fresh=fresh)
            if user is not None:
                return user, "", source
        token = (self._bearer() or "").strip()  # a token that was read from a file may end with a line break
        if token:
            return None, token, "MLFLOW_TRACKING_TOKEN" if self._token is None else "token="
        user = self._of_netrc(fresh=fresh) if netrc and self._takes_netrc else None
        return user, "", "" if user is None else find_netrc() or ""

    def _of_netrc(self, *, fresh: bool) -> tuple[str, str] | None:
        """A file that cannot be read counts as missing, as in requests, but a warning names it."""
        if self._netrc_is_read and not fresh:
            return self._netrc
        self._netrc_is_read, self._netrc = True, None
        path = find_netrc()
        if path is None:
            return None
        try:
            self._netrc = read_netrc(path, self._host)
        except Exception as error:  # of the netrc module's, which is imported only where there is a file
            if not self._netrc_is_faulty:
                line = getattr(error, "lineno", None)
                where = "" if line is None else f" at line {line}"
                logger.warning("the file %s is not used, it cannot be read: %s%s", path, type(error).__name__, where)
            self._netrc_is_faulty = True
        return self._netrc

    def _user_and_password(self, *, fresh: bool) -> tuple[tuple[str, str] | None, str]:
        """Each from its variable, else from MLflow's file, as in MLflow; and the places where they were found."""
        if not self._passwords:
            return None, ""
        name, password = environment.text(_USERNAME), environment.text(_PASSWORD)
        if name and password:  # an unreadable file does not matter then
            return (name, password), f"{_USERNAME} and {_PASSWORD}"
        if fresh or self._file is None:
            self._file = read_file()
        sources = dict.fromkeys((_USERNAME if name else _FILE, _PASSWORD if password else _FILE))
        name, password = name or self._file[0], password or self._file[1]
        return ((name, password) if name and password else None), " and ".join(sources)

    def redact(self, text: str) -> str:
        """The text with `***` in place of these credentials, and of any other Authorization header."""
        names, secrets = user_info(self._user_info_text)
        known = [
            *secrets,
            *secrets_in_header(self._last_header or ""),
            self._last or "",
            environment.text("MLFLOW_TRACKING_PASSWORD") or "",
            environment.text("MLFLOW_TRACKING_TOKEN") or "",
            (self._file and self._file[1]) or "",
            self._netrc[1] if self._netrc is not None else "",
        ]
        # Known secrets come first: of a secret with a blank or a quote the expression matches only the beginning.
        return _AUTHORIZATION.sub(r"\1 ***", redact(text, known, names))

    def _bearer(self) -> str | None:
        if callable(self._token):
            return self._last
        return self._token or environment.text("MLFLOW_TRACKING_TOKEN")

    async def _ask(self) -> None:
        call, now = self._call, anyio.current_time()
        if call is None or call.done() or now - self._begun > _CALL_TIMEOUT:
            call = self._call = Future()
            self._begun = now
            try:
                await in_thread(self._perform, call, limiter=self._threads)
            finally:
                call.cancel()  # has an effect only if the call has not begun
        else:
            with suppress(CancelledError):
                await wait_for(call, cancel=False)
            if call.cancelled():
                return await self._ask()
        fault = call.result()
        if fault is not None:
            raise AuthError(fault)

    def _perform(self, call: Future[str | None]) -> None:
        """Call the callable, in a worker thread; the result is a text that says what is wrong with it, or None."""
        assert callable(self._token)
        ask: Callable[[], Any] = self._token  # may return anything, whatever its annotation says
        if not call.set_running_or_notify_cancel():
            return
        fault = None
        try:
            token = ask()
            if token is not None and not isinstance(token, str):
                fault = f"the callable of token= gave {type(token).__name__}, and not text"
            elif self._call is call:  # else this call counted as stuck, and a later one replaces it
                self._last = token
        except BaseException as error:  # neither its text nor its frames are passed on: they may hold secrets
            fault = f"the callable of token= raised {type(error).__name__}"
        call.set_result(fault)


def _basic(user: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(user).encode()).decode()
