"""One streamed POST with the arrival time of every piece, at a small CPU cost for each.

httpx costs about three times as much CPU for a token, and a load generator shares its cores with
the server it measures. This speaks just enough HTTP/1.1 for that: one request a connection,
chunked or delimited bodies, no redirects, no proxies, no compression.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from nsa_client.errors import APIConnectionError, APITimeoutError, InvalidResponseError

CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class RawStream:
    """An answer as it came. Times are `time.perf_counter()` seconds.

    start_s: when the request was sent, on a connection already open. arrivals: (time, body bytes).
    """

    start_s: float = 0.0
    end_s: float = 0.0
    status: int = 0
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)


async def post_stream(
    url: str, body: bytes, headers: dict[str, str], *, timeout_s: float
) -> RawStream:
    """Send a JSON body and record the answer. Raises APIConnectionError or APITimeoutError.

    The connection is closed on return and on cancellation.
    """
    parts = urlsplit(url)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    if parts.hostname is None:
        raise ValueError(f"no host in {url!r}")
    port = parts.port or (80 if context is None else 443)
    loop = asyncio.get_running_loop()
    request = _request_head(parts.netloc, parts.path, len(body), headers) + body
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(min(timeout_s, CONNECT_TIMEOUT_S)):
            transport, protocol = await loop.create_connection(
                _Protocol, parts.hostname, port, ssl=context
            )
        async with asyncio.timeout(timeout_s):
            return await protocol.exchange(request)
    except TimeoutError as error:
        raise APITimeoutError(f"no complete answer from {url} in {timeout_s:g} s") from error
    except OSError as error:
        raise APIConnectionError(f"the connection to {url} failed ({error})") from error
    finally:
        if transport is not None:
            cast(asyncio.Transport, transport).abort()


def _request_head(host: str, path: str, num_bytes: int, headers: dict[str, str]) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        "Accept-Encoding: identity",
        "Connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Protocol(asyncio.Protocol):
    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._stream = RawStream()
        self._head = b""
        self._body: _ChunkedBody | _PlainBody | None = None
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def exchange(self, request: bytes) -> RawStream:
        """Send the request and return the whole answer."""
        self._stream.start_s = time.perf_counter()
        self._transport.write(request)
        await self._done
        return self._stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        try:
            if self._body is None:
                data = self._read_head(data)
            if self._body is None:
                return
            payload = self._body.feed(data)
        except ValueError as error:
            self._finish(now_s, InvalidResponseError(f"not an HTTP/1.1 answer: {error}"))
            return
        if payload:
            self._stream.arrivals.append((now_s, payload))
        if self._body.is_done:
            self._finish(now_s, None)

    def connection_lost(self, exc: Exception | None) -> None:
        is_whole = isinstance(self._body, _PlainBody) and self._body.ends_with_connection
        cause = exc or "closed by the server"
        error = None if is_whole else APIConnectionError(f"the connection was lost ({cause})")
        self._finish(time.perf_counter(), error)

    def _read_head(self, data: bytes) -> bytes:
        """Collect the status line and headers; return the body bytes that came with their end."""
        self._head += data
        head, separator, rest = self._head.partition(b"\r\n\r\n")
        if not separator:
            return b""
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = status_line.split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"status line {status_line!r}")
        self._stream.status = int(status)
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._body = _ChunkedBody()
        else:
            length = headers.get("content-length")
            self._body = _PlainBody(None if length is None else int(length))
        return rest

    def _finish(self, now_s: float, error: Exception | None) -> None:
        if self._done.done():  # the end of a connection follows the end of its answer
            return
        self._stream.end_s = now_s
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class _PlainBody:
    """A body of a given length, or one that lasts as long as the connection."""

    def __init__(self, num_bytes: int | None) -> None:
        self._num_bytes_left = num_bytes
        self.ends_with_connection = num_bytes is None
        self.is_done = num_bytes == 0

    def feed(self, data: bytes) -> bytes:
        if self._num_bytes_left is not None:
            data = data[: self._num_bytes_left]
            self._num_bytes_left -= len(data)
            self.is_done = self._num_bytes_left == 0
        return data


class _ChunkedBody:
    """Chunked transfer coding (RFC 9112, section 7.1), cut anywhere. Trailers are not read."""

    def __init__(self) -> None:
        self._buffer = b""  # an incomplete size line or line end, never payload
        self._num_bytes_left = 0  # of the current chunk, with the CRLF that ends it
        self.is_done = False

    def feed(self, data: bytes) -> bytes:
        buffer = self._buffer + data
        pieces = []
        start = 0
        while not self.is_done:
            if self._num_bytes_left > 2:
                piece = buffer[start : start + self._num_bytes_left - 2]
                pieces.append(piece)
                start += len(piece)
                self._num_bytes_left -= len(piece)
            if len(buffer) - start < self._num_bytes_left:
                break
            start += self._num_bytes_left
            self._num_bytes_left = 0
            end = buffer.find(b"\r\n", start)
            if end < 0:
                break
            num_bytes = int(buffer[start:end].partition(b";")[0], 16)
            start = end + 2
            self.is_done = num_bytes == 0
            self._num_bytes_left = num_bytes + 2
        self._buffer = buffer[start:]
        return b"".join(pieces)
