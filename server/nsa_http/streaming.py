"""Server-sent events, and stopping work when the client leaves or the server goes down.

A stream begins with its first event, or with the first keep-alive comment if that comes earlier:
an error until then is a response with its own status. It is `data: {...}` events, then
`data: [DONE]`, always: an error after it has begun is an event `data: {"error": ...}` before that.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nsa_http.body_writer import BodyWriter, find_writer
from nsa_http.errors import (
    ClientDisconnectedError,
    ShutdownError,
    describe,
    error_body,
    response_of,
)
from nsa_http.state import ServerState

_T = TypeVar("_T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class ChunkEncoder:
    """Encodes the chunks of one stream; what they have in common is encoded once.

    has_usage: OpenAI's include_usage, under which every chunk has a `usage` (mostly null).
    """

    def __init__(self, base: dict[str, Any], *, has_usage: bool) -> None:
        self._head = b"data: " + orjson.dumps(base)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> bytes:
        """Return the event of one choice's delta."""
        if usage is None:
            return self._head + orjson.dumps(choice) + self._tail
        return self._head + orjson.dumps(choice) + self._usage_tail(usage)

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """Return the event that carries only the usage."""
        return self._head + self._usage_tail(usage)

    @staticmethod
    def _usage_tail(usage: dict[str, Any]) -> bytes:
        return b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class EventStreamResponse(Response):
    """Sends events as they come; the end of the client or of the server ends the generation.

    end: what is sent after the last event, whatever it was.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], state: ServerState, *, end: bytes = DONE
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._end = end
        self._state = state
        self._num_sent = 0
        self._has_begun = False
        self._beginning = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to the end, or to the client's."""
        failure: Exception | None = None
        keep_alive = asyncio.create_task(self._keep_alive(send))
        try:
            sending = self._send_events(send, find_writer(scope))
            await run_until_disconnect(receive, sending, self._state)
        except TimeoutError:
            # The client reads too slowly; nothing more can be told to it.
            return
        except Exception as error:
            failure = error
        finally:
            keep_alive.cancel()
            await asyncio.gather(keep_alive, return_exceptions=True)
        if isinstance(failure, ClientDisconnectedError):
            if not self._has_begun:
                await Response(status_code=499)(scope, receive, send)
            return
        if failure is not None:
            if not self._has_begun:
                await response_of(failure)(scope, receive, send)
                return
            await self._send(send, _error_event(failure))
        await self._begin(send)
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def _begin(self, send: Send) -> None:
        """Send status and headers, unless that has been done."""
        async with self._beginning:
            if self._has_begun:
                return
            headers = self.raw_headers
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": headers}
            )
            self._has_begun = True

    async def _send_events(self, send: Send, writer: BodyWriter | None) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                if not self._has_begun:
                    await self._begin(send)
                if writer is None:
                    await self._send(send, event)
                    continue
                self._num_sent += 1
                writer.write(event)
                if writer.is_paused:
                    async with asyncio.timeout(self._state.config.response_write_timeout):
                        await writer.drain()

    async def _send(self, send: Send, event: bytes) -> None:
        self._num_sent += 1
        async with asyncio.timeout(self._state.config.response_write_timeout):
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment when nothing was sent for an interval: proxies cut silent streams."""
        interval_s = self._state.config.sse_keep_alive_interval
        while interval_s:
            num_sent = self._num_sent
            await asyncio.sleep(interval_s)
            if num_sent == self._num_sent:
                await self._begin(send)
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


async def run_until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, _T], state: ServerState
) -> _T:
    """Run `work`, cancelling it when the client leaves or the server aborts its work.

    Raises ClientDisconnectedError or ShutdownError then, once `work` has cleaned up.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_disconnect(receive))
    try:
        with state.track(task) as handle:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                if task.cancelled():
                    raise ClientDisconnectedError
            if task.cancelled() and handle.is_aborted:
                raise ShutdownError
            return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def respond_until_disconnect(
    request: Request, work: Coroutine[Any, Any, Response], state: ServerState
) -> Response:
    """Return the response that `work` makes; an empty 499 when the client left meanwhile."""
    try:
        return await run_until_disconnect(request.receive, work, state)
    except ClientDisconnectedError:
        return Response(status_code=499)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_event(error: Exception) -> bytes:
    status, message, param, _headers = describe(error)
    return b"data: " + error_body(status, message, param) + b"\n\n"
