"""
What a request to an HTTP server authenticates itself with.

Rules of this file: variables are looked up for every request, so that a token that changes is taken over; a callable
and the files are asked again after a 401. A callable runs in a worker thread: it may take its time, or never return. A user
and password come before a token: of the URI, then of the variables, then of MLflow's file; a `token=` of the
constructor comes before the latter two. Last of all comes the file of requests, which MLflow sends by: `~/.netrc`.
Nothing here is ever shown.
"""

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
_GIVEN_UP = 600.0
"""Seconds after which a call of the token's callable is no longer waited for, and another is begun."""
_THREADS = 8
"""Of them all but one hold a call that was given up."""
_AUTHORIZATION = re.compile(r"(?i)\b(basic|bearer)\s+[A-Za-z0-9+/=._~-]{6,}")

logger = logging.getLogger("runqueue")


def read_file() -> tuple[str | None, str | None]:
    """
    User and password of `~/.mlflow/credentials`, the file that `mlflow` itself reads: an INI file with a section
    [mlflow] of `mlflow_tracking_username` and `mlflow_tracking_password`.

    Raises:
        AuthError: It is there, and cannot be read; what stands in it is not shown.
    """
    path = os.path.expanduser("~/.mlflow/credentials")  # Path.expanduser raises where there is no home
    if not os.path.exists(path):  # nor in a home that is closed to us, as in a container under another user
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
    """As mlflow reads it, `%%` being one %; where it would fail at a single %, the text as it stands."""
    try:
        return section.get(name)
    except configparser.InterpolationError:
        return section.get(name, raw=True)


def find_netrc() -> str | None:
    """The file that requests would look into: that of the variable NETRC alone, else `~/.netrc` or `~/_netrc`."""
    named = os.environ.get("NETRC")
    paths = ("~/.netrc", "~/_netrc") if named is None else (named,)
    return next((path for path in paths if os.path.exists(os.path.expanduser(path))), None)


def read_netrc(path: str, host: str) -> tuple[str, str] | None:
    """
    User and password for this host, or by default, as requests takes them.

    Raises:
        OSError, ValueError, netrc.NetrcParseError: It cannot be read.
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
        uri: The tracking URI, maybe with user info in it.
        token: Of the constructor.
        passwords: Whether a user and password count at all.
        netrc: Whether requests' file counts, where nothing else is found.
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
        # One call of the token's callable at a time: whoever comes while it is under way waits for it.
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
            fresh: The files are read again.
            netrc: Whether requests' file counts now.
        """
        self._last_header = self._header(fresh=fresh, netrc=netrc)
        return self._last_header

    def source(self) -> str:
        """
        What is sent now and where it stands, in words: for a diagnosis. A callable counts once it has been asked.

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
        """User and password, or a token, and where they stand."""
        if self._user_info is not None:
            return self._user_info, "", "the URI's user info"
        if self._token is None:
            user, source = self._user_and_password(fresh=fresh)
            if user is not None:
                return user, "", source
        token = (self._bearer() or "").strip()  # a file's last line break is no part of its token
        if token:
            return None, token, "MLFLOW_TRACKING_TOKEN" if self._token is None else "token="
        user = self._of_netrc(fresh=fresh) if netrc and self._takes_netrc else None
        return user, "", "" if user is None else find_netrc() or ""

    def _of_netrc(self, *, fresh: bool) -> tuple[str, str] | None:
        """What cannot be read counts as not there, as with requests; but it is said."""
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
        """Each from its variable, else from the file, as in MLflow; and where they stand."""
        if not self._passwords:
            return None, ""
        name, password = environment.text(_USERNAME), environment.text(_PASSWORD)
        if name and password:  # whatever is wrong with the file
            return (name, password), f"{_USERNAME} and {_PASSWORD}"
        if fresh or self._file is None:
            self._file = read_file()
        sources = dict.fromkeys((_USERNAME if name else _FILE, _PASSWORD if password else _FILE))
        name, password = name or self._file[0], password or self._file[1]
        return ((name, password) if name and password else None), " and ".join(sources)

    def redact(self, text: str) -> str:
        """The text with `***` for whatever of these credentials, or of the like, a server has put into it."""
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
        # Known ones first: of one with a blank or a quote in it, the expression takes but the beginning.
        return _AUTHORIZATION.sub(r"\1 ***", redact(text, known, names))

    def _bearer(self) -> str | None:
        if callable(self._token):
            return self._last
        return self._token or environment.text("MLFLOW_TRACKING_TOKEN")

    async def _ask(self) -> None:
        call, now = self._call, anyio.current_time()
        if call is None or call.done() or now - self._begun > _GIVEN_UP:
            call = self._call = Future()
            self._begun = now
            try:
                await in_thread(self._perform, call, limiter=self._threads)
            finally:
                call.cancel()  # if it has not begun
        else:
            with suppress(CancelledError):
                await wait_for(call, cancel=False)
            if call.cancelled():
                return await self._ask()
        fault = call.result()
        if fault is not None:
            raise AuthError(fault)

    def _perform(self, call: Future[str | None]) -> None:
        """In a worker thread: call the callable, and say what is wrong with it."""
        assert callable(self._token)
        ask: Callable[[], Any] = self._token  # whatever its type says
        if not call.set_running_or_notify_cancel():
            return
        fault = None
        try:
            token = ask()
            if token is not None and not isinstance(token, str):
                fault = f"the callable of token= gave {type(token).__name__}, and not text"
            elif self._call is call:  # else it was given up, and there is a later one
                self._last = token
        except BaseException as error:  # its words may hold secrets: they and its frames end here
            fault = f"the callable of token= raised {type(error).__name__}"
        call.set_result(fault)


def _basic(user: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(user).encode()).decode()
