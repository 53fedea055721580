"""One measurement's work: what a worker is given, and what a measurement function sees."""

from typing import Any

from attrs import define, field

from benchmarks.clients import Options
from benchmarks.peer import Peer


@define(kw_only=True, eq=False)
class Work:
    """A peer, how much it has to do, and where."""

    peer: Peer
    size: int
    """Calls, metrics or runs, as the case says."""

    tracking_uri: str
    options: Options
    _connected: list[Any] = field(factory=list[Any], init=False)

    @property
    def calls(self) -> int:
        """The size, where it is calls that are timed one by one: slow peers make fewer."""
        return max(self.size // self.peer.divisor, 10)

    def connect(self) -> Any:
        """A new client of the peer's. Nothing is sent by this."""
        client = self.peer.connect(self.tracking_uri, self.options)
        self._connected.append(client)
        return client

    def finish(self) -> None:
        """End what a client has started besides itself (wandb's process); no part of any measurement."""
        for client in self._connected:
            finish = getattr(client, "finish", None)
            if finish is not None:
                finish()
