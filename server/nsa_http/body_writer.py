"""A way around ASGI's `send` for the chunks of a stream: a call, not a message through every layer.

Through `send` a chunk passes each middleware and h11's state machine, which costs more than making
it. The response still begins and ends through `send`; in between h11 keeps no state that a chunk
would change.
"""

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

_KEY = "nsa_http.body_writer"


class BodyWriter:
    """Writes chunks (RFC 9112, 7.1) to a connection whose response has begun."""

    __slots__ = ("_cycle", "_flow", "_transport")

    def __init__(
        self, cycle: RequestResponseCycle, transport: asyncio.Transport, flow: FlowControl
    ) -> None:
        self._cycle = cycle
        self._transport = transport
        self._flow = flow

    @property
    def is_paused(self) -> bool:
        """True when the client reads too slowly: `drain` before writing more."""
        return self._flow.write_paused

    def write(self, data: bytes) -> None:
        """Send `data`, which must not be empty: that would end the body."""
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def drain(self) -> None:
        """Wait until the client has read, or left."""
        await self._flow.drain()


def offer_writer(scope: Scope, writer: BodyWriter) -> None:
    """Put the writer where `find_writer` looks, if chunks are what this client gets."""
    if scope["http_version"] == "1.1" and scope["method"] == "POST":
        scope.setdefault("extensions", {})[_KEY] = writer


def find_writer(scope: Scope) -> BodyWriter | None:
    """Return the connection's writer; None for HTTP/1.0, and where no connection is (tests)."""
    writer: BodyWriter | None = scope.get("extensions", {}).get(_KEY)
    return writer
