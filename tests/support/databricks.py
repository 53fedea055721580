"""A Databricks workspace as its documentation describes its answers: authentication, and OAuth tokens."""

# Rules of this file: requests with a valid token are answered as by any `ScriptedServer`; other requests do not reach the
# scripts of the API.

from __future__ import annotations

import base64
from urllib.parse import parse_qs

from support.proxy import Fault, ScriptedServer, reply
from support.recorder import Reply, Request

DISCOVERY = ".well-known/databricks-config"
OAUTH_SERVER = ".well-known/oauth-authorization-server"
TOKEN = "oidc/v1/token"

UNAUTHENTICATED = reply(
    401,
    {"error_code": 401, "message": "Credential was not sent or was of an unsupported type for this API."},
)
INVALID_TOKEN = reply(403, {"error_code": 403, "message": "Invalid access token."})
"""A number where other errors have a name, as seen in databricks/databricks-sdk-go, issue 917."""
INVALID_TOKEN_PAGE = reply(
    403,
    "<html><head><title>Error 403 Invalid access token.</title></head><body><h2>HTTP ERROR 403</h2>"
    "<p>Problem accessing /api/2.0/mlflow/runs/log-batch. Reason:<pre>    Invalid access token.</pre></p></body></html>",
)


class Workspace(ScriptedServer):
    """
    A workspace.

    Args:
        tokens: The valid tokens.
        client: Id and secret of its one service principal.
        workspace_id: The id that its answers name.
    """

    def __init__(
        self, *tokens: str, client: tuple[str, str] | None = None, workspace_id: str | None = "6051921418418893"
    ) -> None:
        super().__init__()
        self.tokens = set(tokens)
        self.refusal = UNAUTHENTICATED
        self.issued: list[str] = []
        self.lifetime = 3_600
        """Of a token that is issued, in seconds; the SDK holds one of less than 40 to have expired."""
        self._client = client
        self._workspace_id = workspace_id

    @property
    def calls(self) -> list[Request]:
        """Return the requests to MLflow's API."""
        return [request for request in self.requests if request.path.startswith("/api/2.0/mlflow/")]

    def sent(self, header: str = "authorization") -> list[str | None]:
        """Return the values of this header in the requests to MLflow's API."""
        return [request.headers.get(header) for request in self.calls]

    def _choose(self, request: Request) -> Fault:
        if request.path.startswith("/api/") and not self._knows(request):
            return Fault(reply=self.refusal, forwards=False)
        return super()._choose(request)

    def _knows(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return scheme == "Bearer" and token in self.tokens

    def _forward(self, request: Request) -> Reply:
        if request.at(DISCOVERY):
            found = {"oidc_endpoint": f"{self.uri}/oidc", "account_id": "a0b1", "cloud": "aws"}
            return reply(200, found | ({"workspace_id": self._workspace_id} if self._workspace_id else {}))
        if request.at(OAUTH_SERVER):
            ends = {"authorization_endpoint": f"{self.uri}/oidc/v1/authorize", "token_endpoint": f"{self.uri}/{TOKEN}"}
            return reply(200, ends)
        if request.at(TOKEN):
            return self._issue(request)
        return super()._forward(request)

    def _issue(self, request: Request) -> Reply:
        expected = base64.b64encode(":".join(self._client or ("", "")).encode()).decode()
        if self._client is None or request.headers.get("authorization") != f"Basic {expected}":
            return reply(401, {"error": "invalid_client", "error_description": "Client authentication failed"})
        assert parse_qs(request.body.decode())["grant_type"] == ["client_credentials"]
        token = f"issued-{len(self.issued)}-c0ffee"
        self.issued.append(token)
        self.tokens.add(token)
        return reply(200, {"access_token": token, "token_type": "Bearer", "expires_in": self.lifetime})
