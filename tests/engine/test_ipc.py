"""Frames and channels: every message survives, in any pieces; what is no message is refused."""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from nsa_serve.ipc import (
    MAX_FRAME_BYTES,
    Channel,
    ChannelProtocol,
    FrameBuffer,
    FrameError,
    make_frame,
)
from nsa_serve.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineStats,
    FromEngine,
    LoadProgress,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)

TO_ENGINE: list[ToEngine] = [
    AddRequest(
        EngineRequest(
            request_id="a",
            prompt_token_ids=list(range(5000)),
            params=SamplingParams(stop=("x", "\u00e9"), logit_bias={3: 1.5}, seed=-(2**63)),
            cache_salt="salt",
        )
    ),
    AbortRequests(["a", "b"]),
    Shutdown(),
]
FROM_ENGINE: list[FromEngine] = [
    LoadProgress("weights", 3, 9),
    EngineFailed("no memory", "CapacityError"),
    StepOutputs([], EngineStats(num_steps_total=7)),
    StepOutputs(
        [
            TokenOutput("a", [1, 2], [TokenLogprobs(1, -0.5, 1, [(1, -0.5), (7, -2.0)])]),
            TokenOutput("b", [], finish_reason=FinishReason.ERROR, error="why"),
        ],
        EngineStats(num_running=2),
    ),
]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("piece_len", [1, 2, 3, 4, 5, 7, 1000])
def test_frames_survive_any_pieces(piece_len: int) -> None:
    payloads = [b"", b"a", b"bc" * 3, b"", b"x" * 300]
    stream = b"".join(make_frame(payload) for payload in payloads)
    buffer = FrameBuffer()
    received = []
    for start in range(0, len(stream), piece_len):
        received += buffer.feed(stream[start : start + piece_len])
    assert received == payloads


def test_a_frame_that_is_too_long_is_refused_on_both_sides() -> None:
    header = struct.pack("<I", MAX_FRAME_BYTES + 1)
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES + 1)):
        FrameBuffer().feed(header)
    with pytest.raises(FrameError, match="at most"):
        make_frame(bytearray(MAX_FRAME_BYTES + 1))  # type: ignore[arg-type]


def test_the_blocking_end_reads_what_was_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = Channel(theirs)
    stream = b"".join(make_frame(msgspec.msgpack.encode(message)) for message in TO_ENGINE)
    sender = threading.Thread(target=ours.sendall, args=(stream,))
    sender.start()
    assert [channel.receive() for _ in TO_ENGINE] == TO_ENGINE
    sender.join()
    ours.close()
    assert channel.receive() is None


@pytest.mark.parametrize("stream", [b"\x01\x00", struct.pack("<I", 9) + b"short"])
def test_a_stream_cut_inside_a_frame_is_its_end(
    pair: tuple[socket.socket, socket.socket], stream: bytes
) -> None:
    ours, theirs = pair
    ours.sendall(stream)
    ours.close()
    assert Channel(theirs).receive() is None


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x81\xa4type\xa3Bad", msgspec.msgpack.encode({"type": "AddRequest"})],
)
def test_what_is_no_message_is_a_frame_error(
    pair: tuple[socket.socket, socket.socket], payload: bytes
) -> None:
    ours, theirs = pair
    ours.sendall(make_frame(payload))
    with pytest.raises(FrameError, match="no valid message"):
        Channel(theirs).receive()


class _Peer:
    """The asyncio end, recording what it is told."""

    def __init__(self) -> None:
        self.messages: list[FromEngine] = []
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    async def connect(self, sock: socket.socket) -> ChannelProtocol:
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_unix_connection(
            lambda: ChannelProtocol(self.messages.append, self.end.set_result), sock=sock
        )
        return protocol


async def test_both_ends_talk(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel, peer = Channel(theirs), _Peer()
    protocol = await peer.connect(ours)
    for message in TO_ENGINE:
        protocol.send(message)
    assert [await asyncio.to_thread(channel.receive) for _ in TO_ENGINE] == TO_ENGINE
    for answer in FROM_ENGINE:
        await asyncio.to_thread(channel.send, answer)
    theirs.close()
    assert await peer.end is None
    assert peer.messages == FROM_ENGINE
    protocol.send(Shutdown())  # to nobody: no error, the end was told


async def test_a_broken_stream_ends_with_its_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    peer = _Peer()
    await peer.connect(ours)
    theirs.sendall(make_frame(b"\xc1"))
    assert isinstance(await peer.end, FrameError)
    assert peer.messages == []


async def test_abort_ends_the_other_side(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    peer = _Peer()
    protocol = await peer.connect(ours)
    protocol.abort()
    assert await peer.end is None
    assert await asyncio.to_thread(Channel(theirs).receive) is None
