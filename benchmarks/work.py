"""The work of one measurement: the arguments of a worker, and what a measurement function uses."""

from typing import Any

from attrs import define, field

from benchmarks.clients import Options
from benchmarks.peer import Peer


@define(kw_only=True, eq=False)
class Work:
    """A peer, the amount of its work, and the address of its server."""

    peer: Peer
    size: int
    """Calls, metrics or runs, as the case says."""

    tracking_uri: str
    options: Options
    _connected: list[Any] = field(factory=list[Any], init=False)

    @property
    def calls(self) -> int:
        """The size for cases that time single calls: slow peers make fewer."""
        return max(self.size // self.peer.divisor, 10)

    def connect(self) -> Any:
        """Return a new client of the peer's. It sends nothing yet."""
        client = self.peer.connect(self.tracking_uri, self.options)
        self._connected.append(client)
        return client

    def finish(self) -> None:
        """End processes that clients have started (wandb's). No measurement includes this."""
        for client in self._connected:
            finish = getattr(client, "finish", None)
            if finish is not None:
                finish()
