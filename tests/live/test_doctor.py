"""`runqueue doctor` against real servers and MLflow's own stores, each in a process of its own."""

from __future__ import annotations

import base64
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
import trustme

from support.embedded import run_script
from support.mlflow_server import HOST, MlflowServer, clean_environment, free_port
from support.postgres import DRIVERS, PASSWORD_ROLE, Postgres, shared_postgres
from support.postgres import PASSWORD as ROLES_PASSWORD

pytestmark = pytest.mark.live


def doctor(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program in this folder, which is its home too. No variable names the system's certificates."""
    environment = {key: value for key, value in clean_environment().items() if not key.startswith("SSL_CERT_")}
    return subprocess.run(
        [sys.executable, "-m", "runqueue", "doctor", *arguments],
        check=False,
        cwd=folder,
        env=environment | {"HOME": str(folder)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the rows of the table."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def test_the_table_has_the_servers_version(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Address and token come from variables; the open server ignores the token."""
    done = doctor(tmp_path, MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_TRACKING_TOKEN="s3cret-token")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["resolved from"] == "the environment variable MLFLOW_TRACKING_URI"
    assert found["version"] == f"mlflow {version('mlflow')}"
    assert found["credentials"] == "token, of MLFLOW_TRACKING_TOKEN"
    assert "s3cret" not in done.stdout
    assert 0 < float(found["round trip"].split(" ")[0]) < 10_000


def test_a_wrong_path_of_a_real_server_is_reported(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """The server's own 404 page is not an answer of its API."""
    done = doctor(tmp_path, "--tracking-uri", f"{mlflow_server.uri}/nowhere")
    assert done.returncode == 1
    assert "not as an MLflow server does" in done.stderr and done.stderr.count("\n") == 1


def test_a_database_is_read_and_not_changed(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """MLflow's own store answers in a worker thread; nothing but the table is printed."""
    database = mlflow_server.folder / "mlflow.db"
    done = doctor(tmp_path, "--tracking-uri", f"sqlite:///{database}")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["transport"] == "calls of mlflow in worker threads"
    assert found["version"] == f"mlflow {mlflow.__version__}"
    assert "1,000 metrics" in found["limits"]
    assert "tls" not in found


def test_a_file_that_is_no_database_is_reported_in_one_line(tmp_path: Path) -> None:
    """SQLAlchemy's text of several lines, with its hints, is shortened to one."""
    (tmp_path / "notes.db").write_text("these are notes, and no database " * 100)
    done = doctor(tmp_path, "--tracking-uri", "sqlite:///notes.db")
    assert done.returncode == 1
    assert "file is not a database" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.sample("mlruns")
@pytest.mark.parametrize("path", ["mlruns", "file:mlruns"])
def test_a_folder_that_mlflow_refuses_is_reported(tmp_path: Path, path: str) -> None:
    """MLflow takes it with MLFLOW_ALLOW_FILE_STORE. Either way the check creates nothing."""
    refused = doctor(tmp_path, "--tracking-uri", path)
    assert refused.returncode == 1
    assert "MLFLOW_ALLOW_FILE_STORE" in refused.stderr and refused.stderr.count("\n") == 1
    allowed = doctor(tmp_path, "--tracking-uri", path, MLFLOW_ALLOW_FILE_STORE="true")
    assert (allowed.returncode, allowed.stderr) == (0, "")
    assert rows(allowed)["reachable"] == "not yet: the first run will make mlruns"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.whole
def test_a_folder_that_mlflow_has_not_used_is_not_changed(tmp_path: Path) -> None:
    """Opening it by MLflow's store would create files. A folder that MLflow has used is opened."""
    (tmp_path / "runs").mkdir()
    allowed = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    found = rows(doctor(tmp_path, "--tracking-uri", "runs", **allowed))
    assert found["reachable"] == "not yet: the first run will make MLflow's folders in runs"
    assert list((tmp_path / "runs").iterdir()) == []
    first = f"import sys, mlflow.store.tracking.file_store as f; f.FileStore({str(tmp_path / 'used')!r})"
    made = subprocess.run([sys.executable, "-c", first], check=True, env=clean_environment() | allowed, timeout=60)
    assert made.returncode == 0
    found = rows(doctor(tmp_path, "--tracking-uri", "used", **allowed))
    assert (found["reachable"], found["authentication"]) == ("yes", "not asked for")


def schema(path: Path) -> list[tuple[str, ...]]:
    """Return the schema of the database: everything but rows."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()


@pytest.fixture
def used(mlflow_server: MlflowServer, tmp_path: Path) -> Path:
    """A copy of a database that MLflow has used."""
    path = tmp_path / "used.db"
    with closing(sqlite3.connect(mlflow_server.folder / "mlflow.db")) as source, closing(sqlite3.connect(path)) as copy:
        source.backup(copy)
    return path


def change(path: Path, statement: str) -> None:
    """Change the database by an SQL statement."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.whole
def test_a_database_without_tables_is_not_changed(tmp_path: Path) -> None:
    """Whatever else is in it. Opening it by MLflow's store would create 65 tables."""
    change(tmp_path / "runs.db", "CREATE TABLE notes (text)")
    before = schema(tmp_path / "runs.db")
    done = doctor(tmp_path, "--tracking-uri", "sqlite:///runs.db")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert (found["reachable"], found["tables"]) == ("yes", "not yet: the first run will make MLflow's tables")
    assert found["version"] == f"mlflow {mlflow.__version__}" and "1,000 metrics" in found["limits"]
    assert schema(tmp_path / "runs.db") == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs.db"]


def test_a_database_of_an_older_mlflow_is_not_migrated(used: Path, tmp_path: Path) -> None:
    """MLflow's store migrates it without being asked, wherever a table is missing."""
    change(used, "DROP TABLE webhook_events")
    before = schema(used)
    done = doctor(tmp_path, "--tracking-uri", f"sqlite:///{used}")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done)["tables"].startswith("not yet: the first run will bring MLflow's tables up to date, which are")
    assert schema(used) == before


@pytest.mark.whole
def test_a_database_without_an_experiment_is_not_changed(used: Path, tmp_path: Path) -> None:
    """Opening it by MLflow's store would create the default experiment."""
    change(used, "DELETE FROM experiments")
    done = doctor(tmp_path, "--tracking-uri", f"sqlite:///{used}")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done)["tables"] == "not yet: the first run will make MLflow's experiment 'Default'"
    with closing(sqlite3.connect(used)) as connection:
        assert connection.execute("SELECT COUNT(*) FROM experiments").fetchone() == (0,)


def test_a_database_server_that_is_down_is_reported_in_time(tmp_path: Path) -> None:
    """MLflow itself would retry for minutes. A password in the URI is not shown."""
    uri = f"postgresql://user:s3cret-word@{HOST}:{free_port()}/runs"
    done = doctor(tmp_path, "--tracking-uri", uri, MLFLOW_HTTP_REQUEST_TIMEOUT="8")
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr
    assert "postgresql://***@" in done.stderr and "is not available" in done.stderr
    assert "cannot be opened: OperationalError" in done.stderr
    assert done.stderr.count("\n") == 1


# -- servers as companies run them -----------------------------------------------------------------------------------

USER, PASSWORD = "admin", "p@ss: 100%/ü"
PREFIX = "/mlflow"
API_BELOW = "not as an MLflow server does below /api/2.0/mlflow/"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    """The authority that has signed the company server's certificate."""
    return trustme.CA()


@pytest.fixture(scope="module")
def company(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server with https only, a path prefix, and users. Each test gets one of these wrong."""
    folder = tmp_path_factory.mktemp("company-server")
    pem = folder / "server.pem"
    ca.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(pem)
    with MlflowServer(folder, static_prefix=PREFIX, admin=(USER, PASSWORD), certificate=pem) as server:
        yield server


@pytest.fixture
def trusted(ca: trustme.CA, tmp_path: Path) -> str:
    """The file with the authority's certificate."""
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return str(path)


def credentials(trusted: str, password: str = PASSWORD) -> dict[str, str]:
    """The variables with a user's name and password for the company's server."""
    return {
        "MLFLOW_TRACKING_SERVER_CERT_PATH": trusted,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


def assert_no_secret(done: subprocess.CompletedProcess[str], *secrets: str) -> None:
    """Assert that no form of the password is shown (plain, escaped, encoded), and that each finding is one line."""
    said = done.stdout + done.stderr
    for secret in secrets:
        sent = base64.b64encode(f"{USER}:{secret}".encode()).decode()
        assert [each for each in (secret, quote(secret, safe=""), sent) if each in said] == []
    assert done.stderr.count("\n") == done.returncode


PLACES = {
    "variables": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "file": "~/.mlflow/credentials",
    "uri": "the URI's user info",
}


@pytest.mark.sample("variables")
@pytest.mark.parametrize("place", PLACES)
def test_a_companys_server_is_healthy_with_the_right_settings(
    company: MlflowServer, trusted: str, tmp_path: Path, place: str
) -> None:
    """The table names the sources of certificate and password, and not the password."""
    uri, variables = company.uri, credentials(trusted)
    if place != "variables":
        del variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]
    if place == "file":
        (tmp_path / ".mlflow").mkdir()
        password = PASSWORD.replace("%", "%%")
        (tmp_path / ".mlflow" / "credentials").write_text(
            f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {password}\n"
        )
    elif place == "uri":
        uri = uri.replace("://", f"://{USER}:{quote(PASSWORD, safe='')}@")
    done = doctor(tmp_path, "--tracking-uri", uri, **variables)
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert_no_secret(done, PASSWORD)
    assert found["tracking uri"] == company.uri.replace("://", "://***@" if place == "uri" else "://")
    assert found["store"] == "MLflow's REST API"
    assert found["credentials"] == f"user and password, of {PLACES[place]}"
    assert found["tls"] == f"verified by MLFLOW_TRACKING_SERVER_CERT_PATH={trusted}"
    assert found["reachable"] == "yes"
    assert found["version"] == f"mlflow {version('mlflow')}"
    assert found["authentication"] == "accepted"
    assert found["round trip"].endswith(" ms (median of 5)")


@pytest.mark.sample("password")
@pytest.mark.parametrize("kind", ["password", "user"])
def test_credentials_that_the_server_refuses_are_reported(
    company: MlflowServer, trusted: str, tmp_path: Path, kind: str
) -> None:
    """The table names their source, and that the server is reachable."""
    variables = credentials(trusted, "wr0ng-word" if kind == "password" else PASSWORD)
    if kind == "user":
        variables["MLFLOW_TRACKING_USERNAME"] = "stranger"
    done = doctor(tmp_path, "--tracking-uri", company.uri, **variables)
    found = rows(done)
    assert done.returncode == 1
    assert_no_secret(done, "wr0ng-word", PASSWORD)
    assert (found["reachable"], found["authentication"]) == ("yes", "refused")
    assert "the server refused the credentials (401: " in done.stderr
    assert done.stderr.endswith(
        "; credentials: user and password, of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD\n"
    )
    assert "version" not in found and "round trip" not in found


def test_missing_credentials_are_reported_with_the_variables_to_set(
    company: MlflowServer, trusted: str, tmp_path: Path
) -> None:
    """The server has answered 401 to a request without credentials."""
    done = doctor(tmp_path, "--tracking-uri", company.uri, MLFLOW_TRACKING_SERVER_CERT_PATH=trusted)
    found = rows(done)
    assert done.returncode == 1
    assert_no_secret(done)
    assert (found["credentials"], found["authentication"]) == ("none", "refused")
    assert done.stderr.endswith(
        "; none were found, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN\n"
    )


def test_a_token_that_the_server_does_not_take_is_reported(company: MlflowServer, trusted: str, tmp_path: Path) -> None:
    """MLflow's own users have passwords only."""
    done = doctor(
        tmp_path,
        "--tracking-uri",
        company.uri,
        MLFLOW_TRACKING_SERVER_CERT_PATH=trusted,
        MLFLOW_TRACKING_TOKEN="s3cret-token",
    )
    assert done.returncode == 1
    assert_no_secret(done, "s3cret-token")
    assert rows(done)["authentication"] == "refused"
    assert done.stderr.endswith("; credentials: token, of MLFLOW_TRACKING_TOKEN\n")


@pytest.mark.sample("usual")
@pytest.mark.parametrize("kind", ["usual", "other"])
def test_an_unknown_authority_is_reported(company: MlflowServer, trusted: str, tmp_path: Path, kind: str) -> None:
    """Whether the variable names no authority or another one. No request is sent to such a server."""
    variables = credentials(trusted)
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    del variables["MLFLOW_TRACKING_SERVER_CERT_PATH"]
    if kind == "other":
        variables["MLFLOW_TRACKING_SERVER_CERT_PATH"] = str(other)
    done = doctor(tmp_path, "--tracking-uri", company.uri, **variables)
    found = rows(done)
    assert done.returncode == 1
    assert_no_secret(done, PASSWORD)
    by = "the usual certificates" if kind == "usual" else f"MLFLOW_TRACKING_SERVER_CERT_PATH={other}"
    assert (found["tls"], found["reachable"]) == (f"verified by {by}", "no")
    assert f"{company.uri} is not available: TLS: unable to get local issuer certificate" in done.stderr
    assert "authentication" not in found


@pytest.mark.whole
def test_an_unverified_certificate_is_reported(company: MlflowServer, trusted: str, tmp_path: Path) -> None:
    """The server is healthy, and the table warns of the missing verification."""
    variables = credentials(trusted) | {"MLFLOW_TRACKING_INSECURE_TLS": "true"}
    del variables["MLFLOW_TRACKING_SERVER_CERT_PATH"]
    done = doctor(tmp_path, "--tracking-uri", company.uri, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert_no_secret(done, PASSWORD)
    assert rows(done)["tls"] == "the server's certificate is NOT verified (MLFLOW_TRACKING_INSECURE_TLS)"


@pytest.mark.sample("/other")
@pytest.mark.parametrize("path", ["", "/other"])
def test_a_wrong_prefix_is_reported(company: MlflowServer, trusted: str, tmp_path: Path, path: str) -> None:
    """The server is there, but has no API at that path."""
    uri = company.uri.removesuffix(PREFIX) + path
    done = doctor(tmp_path, "--tracking-uri", uri, **credentials(trusted))
    assert done.returncode == 1
    assert_no_secret(done, PASSWORD)
    assert rows(done)["reachable"] == "something answers"
    assert f"{uri} answers, but {API_BELOW}; check host, port and path" in done.stderr


def test_http_to_an_https_server_is_reported_as_unavailable(company: MlflowServer, tmp_path: Path) -> None:
    """The server closes the connection."""
    plain = doctor(tmp_path, "--tracking-uri", company.uri.replace("https://", "http://"))
    assert (plain.returncode, rows(plain)["reachable"]) == (1, "no")
    assert "is not available: the connection broke: " in plain.stderr


def test_https_to_an_http_server_is_reported_as_unavailable(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """The finding names TLS."""
    done = doctor(tmp_path, "--tracking-uri", mlflow_server.uri.replace("http://", "https://"))
    assert (done.returncode, rows(done)["reachable"]) == (1, "no")
    assert "is not available: TLS: " in done.stderr


@pytest.mark.whole
def test_a_server_that_was_stopped_is_reported_as_down(tmp_path: Path) -> None:
    """At once, since no process listens on its port any more."""
    with MlflowServer(tmp_path / "server") as server:
        assert doctor(tmp_path, "--tracking-uri", server.uri).returncode == 0
    done = doctor(tmp_path, "--tracking-uri", server.uri.replace("://", "://user:s3cret-word@"))
    found = rows(done)
    assert done.returncode == 1
    assert_no_secret(done, "s3cret-word")
    assert found["reachable"] == "no"
    assert found["tracking uri"] == server.uri.replace("://", "://***@")
    assert "is not available: cannot connect: " in done.stderr


# -- PostgreSQL ------------------------------------------------------------------------------------------------------

FIRST_RUN = """
import sys
import runqueue
with runqueue.Client(sys.argv[1]) as client:
    client.create_run("0")
"""
"""Creates MLflow's tables, if they do not exist."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A database with MLflow's tables, and a role with a password that may only read them."""
    with shared_postgres() as postgres:
        made = run_script(FIRST_RUN, tmp_path_factory.mktemp("first run"), postgres.uri("mlflow", DRIVERS[0]))
        assert made.returncode == 0, made.stderr
        postgres.execute(f"GRANT pg_read_all_data TO {PASSWORD_ROLE}")
        yield postgres
        postgres.execute(f"REVOKE pg_read_all_data FROM {PASSWORD_ROLE}")


@pytest.mark.sample("None")
@pytest.mark.parametrize("driver", [None, *DRIVERS])
def test_a_healthy_postgresql_is_reported_in_full(database: Postgres, tmp_path: Path, driver: str | None) -> None:
    """A role that may only read suffices, since nothing is written."""
    uri = database.uri("mlflow", driver, f"{PASSWORD_ROLE}:{ROLES_PASSWORD}")
    done = doctor(tmp_path, "--tracking-uri", uri)
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert_no_secret(done, ROLES_PASSWORD)
    scheme = uri.partition(":")[0]
    assert found["tracking uri"] == f"{scheme}://***@/mlflow?host={database.folder}"
    assert found["store"] == f"MLflow's own, in a database ({scheme})"
    assert found["credentials"] == "user and password, of the URI's user info"
    assert found["transport"] == "calls of mlflow in worker threads"
    assert found["reachable"] == "yes"
    assert found["version"] == f"mlflow {mlflow.__version__}"
    assert found["authentication"] == "accepted"
    assert found["round trip"].endswith(" ms (median of 5)")


@pytest.mark.sample("psycopg")
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_password_that_postgresql_refuses_is_reported(database: Postgres, tmp_path: Path, driver: str) -> None:
    """Neither the password nor the role is shown, although PostgreSQL's text names the role."""
    done = doctor(tmp_path, "--tracking-uri", database.uri("mlflow", driver, f"{PASSWORD_ROLE}:wr0ng-word"))
    found = rows(done)
    assert done.returncode == 1
    assert_no_secret(done, "wr0ng-word", PASSWORD_ROLE)
    assert (found["reachable"], found["authentication"]) == ("yes", "refused")
    assert "password authentication failed for user ***" in done.stderr


@pytest.mark.sample("psycopg2")
@pytest.mark.parametrize("driver", DRIVERS)
def test_an_empty_postgresql_stays_empty(database: Postgres, tmp_path: Path, driver: str) -> None:
    """The first run will create the tables. A user without a password, whom PostgreSQL trusts, is shown as such."""
    database.execute("CREATE DATABASE empty")
    try:
        done = doctor(tmp_path, "--tracking-uri", database.uri("empty", driver))
        tables = database.execute("SELECT COUNT(*) FROM pg_tables WHERE schemaname = 'public'", "empty")
    finally:
        database.execute("DROP DATABASE empty")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["credentials"] == "user, of the URI's user info"
    assert (found["reachable"], found["authentication"]) == ("yes", "accepted")
    assert found["tables"] == "not yet: the first run will make MLflow's tables"
    assert "round trip" not in found
    assert tables == [(0,)]


@pytest.mark.sample("psycopg2")
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_missing_privilege_is_reported(database: Postgres, tmp_path: Path, driver: str) -> None:
    """PostgreSQL knows the role, but denies it to read."""
    database.execute("CREATE ROLE blind LOGIN")
    try:
        done = doctor(tmp_path, "--tracking-uri", database.uri("mlflow", driver, "blind"))
    finally:
        database.execute("DROP ROLE blind")
    found = rows(done)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (found["reachable"], found["authentication"]) == ("yes", "refused")
    assert "permission denied for " in done.stderr
    assert done.stderr.endswith("; credentials: user, of the URI's user info\n")


@pytest.mark.whole
def test_a_database_that_postgresql_does_not_have_is_reported(database: Postgres, tmp_path: Path) -> None:
    """The finding names the database, and does not claim that the server is down."""
    done = doctor(tmp_path, "--tracking-uri", database.uri("nosuch", DRIVERS[0]))
    assert done.returncode == 1
    assert 'database "nosuch" does not exist' in done.stderr and done.stderr.count("\n") == 1
    assert "is not available" not in done.stderr


@pytest.mark.sample("psycopg")
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_postgresql_that_was_stopped_is_reported_as_down(database: Postgres, tmp_path: Path, driver: str) -> None:
    """At once, where MLflow would retry for minutes."""
    database.stop()
    try:
        uri = database.uri("mlflow", driver, f"{PASSWORD_ROLE}:{ROLES_PASSWORD}")
        done = doctor(tmp_path, "--tracking-uri", uri)
    finally:
        database.start()
    assert (done.returncode, rows(done)["reachable"]) == (1, "no")
    assert_no_secret(done, ROLES_PASSWORD)
    assert "is not available: the store cannot be opened: OperationalError" in done.stderr
