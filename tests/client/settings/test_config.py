"""The settings of a client: bad values raise at construction by name, and no message shows a secret."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

import runqueue
from runqueue import CallTypeError, ConfigError, Limits
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.stores._resolve import check_uri

URI = "http://127.0.0.1:1"
BOTH_CLIENTS = pytest.mark.parametrize("client_class", [runqueue.Client, runqueue.AsyncClient])


# -- values ----------------------------------------------------------------------------------------------------------


@BOTH_CLIENTS
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_workers", 0, ConfigError),
        ("max_workers", -1, ConfigError),
        ("max_workers", 1.5, CallTypeError),
        ("max_workers", True, CallTypeError),
        ("max_workers", "8", CallTypeError),
        ("max_workers", None, CallTypeError),
        ("request_timeout", -0.1, ConfigError),
        ("request_timeout", 0, ConfigError),
        ("request_timeout", float("inf"), ConfigError),
        ("request_timeout", float("nan"), ConfigError),
        ("request_timeout", "60", CallTypeError),
        ("request_timeout", True, CallTypeError),
        ("retry_timeout", -1, ConfigError),
        ("retry_timeout", float("nan"), ConfigError),
        ("retry_timeout", "300", CallTypeError),
        ("limits", 1_000, CallTypeError),
        ("limits", {"metrics": 1}, CallTypeError),
        ("token", 5, CallTypeError),
        ("token", b"bytes", CallTypeError),
        ("token", "", ConfigError),
        ("headers", "X: y", CallTypeError),
        ("headers", {"X": 1}, CallTypeError),
        ("headers", {1: "x"}, CallTypeError),
        ("headers", [("X", "y")], CallTypeError),
        ("transport", "requests", ConfigError),
        ("transport", None, CallTypeError),
        ("transport", [], CallTypeError),
        ("proxies", None, CallTypeError),
        ("proxies", 0, CallTypeError),
        ("proxies", "http://proxy:8080", CallTypeError),
        ("tracking_uri", 5, CallTypeError),
        ("tracking_uri", b"http://x", CallTypeError),
        ("tracking_uri", "", ConfigError),
        ("tracking_uri", "http://", ConfigError),
        ("tracking_uri", "http://:80", ConfigError),
        ("tracking_uri", "http://host:port", ConfigError),
        ("tracking_uri", "http://host:99999", ConfigError),
        ("tracking_uri", "http://[::1", ConfigError),
        ("tracking_uri", "gopher://host", ConfigError),
    ],
)
def test_a_bad_setting_raises_at_construction(
    client_class: type[runqueue.Client | runqueue.AsyncClient], name: str, value: object, kind: type[Exception]
) -> None:
    """The message names the setting, and the class tells if the type or the value is wrong."""
    settings: dict[str, Any] = {"tracking_uri": URI, name: value}
    with pytest.raises(kind) as caught:
        client_class(**settings)
    assert name in str(caught.value).replace("tracking URI", "tracking_uri")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TypeError) is (kind is CallTypeError)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5", float("inf")])
@pytest.mark.parametrize("name", ["metrics", "params", "tags", "entities", "datasets", "bytes"])
def test_a_bad_limit_raises_at_construction(name: str, value: Any) -> None:
    """Each limit is a whole number from 1 on."""
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})


def test_limits_without_room_for_an_entry_raise_at_construction() -> None:
    """A part of the limit of bytes is needed for the body around the entries."""
    with pytest.raises(ConfigError, match="bytes"):
        runqueue.Client(URI, limits=Limits(bytes=100))


@BOTH_CLIENTS
def test_an_unknown_setting_raises(client_class: Any) -> None:
    """No client accepts an option that it does not honour."""
    with pytest.raises(TypeError):
        client_class(URI, no_such_setting=1)
    with pytest.raises(TypeError):
        client_class(URI, 8)


def test_good_settings_are_kept() -> None:
    """Each keyword is a field, and later changes of the caller's objects change nothing."""
    headers = {"X-Team": "vision"}
    config = Config(tracking_uri=URI, max_workers=3, request_timeout=0.5, retry_timeout=0, headers=headers)
    headers["X-Team"] = "other"
    assert config.headers == {"X-Team": "vision"}
    assert (config.max_workers, config.seconds_per_request(), config.retry_settings().timeout) == (3, 0.5, 0)
    assert (Config().seconds_per_request(), Config().retry_settings().timeout) == (60, 300)
    with pytest.raises(AttributeError):
        config.max_workers = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["abc", "-5", "0", "inf", "nan", "1e999", "60s"])
@BOTH_CLIENTS
def test_a_bad_request_timeout_of_the_environment_raises_at_construction(
    monkeypatch: pytest.MonkeyPatch, client_class: Any, text: str
) -> None:
    """The message names the variable. The constructor's `request_timeout` overrides it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", text)
    with pytest.raises(ConfigError, match="MLFLOW_HTTP_REQUEST_TIMEOUT"):
        client_class(URI)
    assert Config(request_timeout=5).seconds_per_request() == 5


@pytest.mark.parametrize(("text", "seconds"), [("5", 5.0), ("0.5", 0.5), (" 7 ", 7.0), ("", 60.0)])
def test_the_request_timeout_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: float
) -> None:
    """An empty variable counts as not set."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", text)
    assert Config().seconds_per_request() == seconds


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://u:p@host/x", "http://***@host/x"),
        ("http://u@host", "http://***@host"),
        ("http://u:p%40q@host:5", "http://***@host:5"),
        ("http://u:p@q@host", "http://***@host"),
        ("postgresql://u:p@host/db?x=1", "postgresql://***@host/db?x=1"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("relative/path", "relative/path"),
        ("http://[u:p@", "***"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    """Only the user info is replaced."""
    assert redact_uri(uri) == shown


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("u:s3cret@host:5000", "***@host:5000"),
        ("http:/u:s3cret@host", "***@host"),
        ("http:u:s3cret@host", "***@host"),
        ("http:/u:s3cret//more@host", "***@host"),
        ("u:s3cret//more@host", "***@host"),
        ("//u:s3cret@host", "//***@host"),
        ("some/folder@home", "some/folder@home"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
    ],
)
def test_user_info_is_redacted_in_a_uri_with_wrong_slashes(uri: str, shown: str) -> None:
    """The text may hold a password although it is no valid URI."""
    assert redact_uri(uri) == shown


@pytest.mark.parametrize("uri", ["u:1234/s3cret@host", "u:1234?s3cret@host:80", "u:1234#s3cret@host", "host/s3cret@x"])
def test_an_at_sign_after_the_host_raises_without_being_shown(uri: str) -> None:
    """The slash in an unquoted password would end the host, and the request would go to another one."""
    for scheme in ("http", "https"):
        with pytest.raises(ConfigError, match="%2F") as caught:
            check_uri(f"{scheme}://{uri}")
        assert "s3cret" not in str(caught.value) and "1234" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "localhost:5000/base", "u:s3cret@host:5000", "http:/host", "HTTPS:host"]
)
def test_a_server_uri_without_slashes_is_not_used_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """It raises, unless a folder of that name exists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(ConfigError, match="counts as a path; the URI of a server begins with http://") as caught:
        check_uri(uri)
    assert "s3cret" not in str(caught.value)
    Path(uri).mkdir(parents=True)
    check_uri(uri)


def test_a_config_is_not_pickled() -> None:
    """A pickle would hold the token, the headers and the URI."""
    for dump in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="secrets"):
            dump(Config(token="s3cret"))


@pytest.mark.parametrize("headers", [{"Authorization: Bearer s3cret": ""}, {"s3cret ": "x"}, {b"s3cret": "x"}])
def test_a_bad_header_name_is_not_shown(headers: Any) -> None:
    """It may be a whole header, secret included."""
    with pytest.raises(ConfigError, match="headers=") as caught:
        Config(headers=headers)
    assert "s3cret" not in str(caught.value)


def test_a_password_in_the_query_of_a_uri_is_redacted() -> None:
    """SQLAlchemy accepts a password in the query, too."""
    assert "s3cret" not in redact_uri("postgresql://host/db?user=u&password=s3cret&sslmode=require")


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "file:///tmp/x", "/tmp/x", "x", "postgresql+psycopg2://host/db"])
def test_without_mlflow_its_own_stores_raise_at_construction(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """The message says what to install."""
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "mlflow" else find_spec(name, package)
    )
    with pytest.raises(ConfigError, match=r"pip install 'runqueue\[mlflow\]'"):
        runqueue.Client(uri)
