"""The channel between the API process and the engine process: msgpack frames on a socket pair.

A frame is the length of its payload, 4 bytes little-endian, and the payload. The engine's side
blocks (`Channel`), the API's side lives in an event loop (`ChannelProtocol`). The first frame,
from the API process, is the `EngineConfig` as JSON; all others are the msgpack structs of
nsa_serve.messages. Nothing here executes what it reads.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

import msgspec

from nsa_serve.errors import NSAServeError
from nsa_serve.messages import FromEngine, ToEngine

MAX_FRAME_BYTES = 256 * 2**20

_HEADER = struct.Struct("<I")
_READ_BYTES = 256 * 2**10


class FrameError(NSAServeError):
    """A frame is too long or is not a message of the protocol: the two sides are out of step."""


def make_frame(payload: bytes) -> bytes:
    """Return `payload` with its header. Raises FrameError above MAX_FRAME_BYTES."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, got {len(payload)}")
    return _HEADER.pack(len(payload)) + payload


class FrameBuffer:
    """Cuts a byte stream into frames; every byte is copied once, whatever the pieces."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._num_needed = _HEADER.size

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream and return the frames that they complete.

        Raises FrameError when a header announces more than MAX_FRAME_BYTES.
        """
        self._data += data
        if len(self._data) < self._num_needed:
            return []
        frames = []
        start = 0
        while True:
            self._num_needed = _HEADER.size
            if len(self._data) - start < _HEADER.size:
                break
            (length,) = _HEADER.unpack_from(self._data, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, got {length}")
            stop = start + _HEADER.size + length
            if len(self._data) < stop:
                self._num_needed = stop - start
                break
            frames.append(bytes(self._data[start + _HEADER.size : stop]))
            start = stop
        del self._data[:start]
        return frames


class Channel:
    """The engine's end: blocking. One thread may receive while another sends."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        """Send one message. Raises OSError when the other end is gone."""
        self._sock.sendall(make_frame(self._encoder.encode(message)))

    def receive(self) -> ToEngine | None:
        """Wait for the next message; None at the end of the stream. Raises FrameError."""
        payload = self.receive_bytes()
        if payload is None:
            return None
        try:
            return self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise FrameError(f"the API process sent no valid message: {error}") from None

    def receive_bytes(self) -> bytes | None:
        """Wait for the next frame and return its payload; None at the end of the stream."""
        header = self._read(_HEADER.size)
        if header is None:
            return None
        (length,) = _HEADER.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame holds at most {MAX_FRAME_BYTES} bytes, got {length}")
        return self._read(length)

    def _read(self, num_bytes: int) -> bytes | None:
        """Read exactly `num_bytes`; None when the stream ends before."""
        data = bytearray()
        while len(data) < num_bytes:
            try:
                piece = self._sock.recv(min(num_bytes - len(data), _READ_BYTES))
            except ConnectionError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)


class ChannelProtocol(asyncio.Protocol):
    """The API's end, in an event loop: calls `on_message` for each message as it arrives.

    on_end is called once, with None when the stream ended or with the FrameError that broke it.
    """

    def __init__(
        self,
        on_message: Callable[[FromEngine], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._frames = FrameBuffer()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an isinstance check: uvloop's transports have other bases.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._on_message(self._decoder.decode(frame))
        except (FrameError, msgspec.MsgspecError) as error:
            self._error = FrameError(f"the engine process sent no valid message: {error}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_end(self._error or exc)

    def send(self, message: ToEngine) -> None:
        """Queue one message. A message to an engine that is gone is lost: `on_end` tells."""
        self.send_bytes(self._encoder.encode(message))

    def send_bytes(self, payload: bytes) -> None:
        """Queue one frame."""
        frame = make_frame(payload)
        if self._transport is not None:
            self._transport.write(frame)

    def abort(self) -> None:
        """Close at once; what is queued is lost."""
        if self._transport is not None:
            self._transport.abort()
