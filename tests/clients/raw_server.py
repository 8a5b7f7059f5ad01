"""An HTTP server made of bytes: a test says exactly what goes over the wire, and when."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: req-7\r\n"
CHUNKED_HEAD = HEAD + b"transfer-encoding: chunked\r\n\r\n"
PLAIN_HEAD = HEAD + b"connection: close\r\n\r\n"
CHUNKED_END = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """Frame one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: Any) -> bytes:
    """Encode one server-sent event of a completion stream."""
    envelope = {"id": "cmpl-1", "model": "tiny", "created": 1}
    return b"data: " + json.dumps(envelope | fields).encode() + b"\n\n"


def text_event(text: str, *, index: int = 0, finish_reason: str | None = None) -> bytes:
    """Encode the event of one piece of text."""
    return event(choices=[{"index": index, "text": text, "finish_reason": finish_reason}])


def usage_event(num_prompt_tokens: int, num_output_tokens: int) -> bytes:
    """Encode the last event of a stream, which carries the usage."""
    usage = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
    }
    return event(choices=[], usage=usage)


DONE = b"data: [DONE]\n\n"


class Exchange:
    """One request as it came, and the way to answer it."""

    def __init__(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self._writer = writer

    @property
    def json(self) -> Any:
        """The request's body."""
        return json.loads(self.body)

    async def send(self, *pieces: bytes) -> None:
        """Write the pieces, each in a packet of its own as far as TCP allows."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0)


class RawServer:
    """Serve `respond` on a free port of 127.0.0.1; one request a connection."""

    def __init__(self, respond: Callable[[Exchange], Awaitable[None]]) -> None:
        self._respond = respond
        self.exchanges: list[Exchange] = []
        self.num_open = 0
        self.max_open = 0
        self.client_left = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lengths = [
                int(line.split(":")[1])
                for line in head.lower().splitlines()
                if line.startswith("content-length:")
            ]
            body = await reader.readexactly(lengths[0]) if lengths else b""
            exchange = Exchange(head, body, writer)
            self.exchanges.append(exchange)
            await self._race(self._respond(exchange), reader)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.client_left.set()
        finally:
            self.num_open -= 1
            writer.close()

    async def _race(self, response: Awaitable[None], reader: asyncio.StreamReader) -> None:
        """Answer, but stop when the client closes first."""
        answering = asyncio.ensure_future(response)
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.client_left.set()
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            raise error
