"""uvicorn's h11 protocol, with a time limit on headers.

h11 rather than httptools, which accepts headers of any size. Neither ends a connection that sends
its headers a byte at a time, or opens and says nothing.
"""

import asyncio

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nsa_http.body_writer import BodyWriter, offer_writer

MAX_HEADER_BYTES = 64 * 1024


def make_protocol(header_timeout_s: float) -> type[asyncio.Protocol]:
    """Return the protocol class: a request's headers must be complete within the timeout."""

    class HeaderTimeoutProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            app = self.app

            async def run(scope: Scope, receive: Receive, send: Send) -> None:
                offer_writer(scope, BodyWriter(self.cycle, self.transport, self.flow))
                await app(scope, receive, send)

            self.app = run
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # The first bytes of the next request on an idle connection.
            if self._header_timer is None and self._is_idle():
                self._start_timer()
            super().data_received(data)
            if not self._is_idle():
                self._stop_timer()

        def _is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _start_timer(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._on_timeout)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _on_timeout(self) -> None:
            self._header_timer = None
            if self._is_idle() and not self.transport.is_closing():
                self.transport.close()

    return HeaderTimeoutProtocol
