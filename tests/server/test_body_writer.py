"""Chunks that go around ASGI's `send`: the framing on the wire, and the connection after it."""

import asyncio
import json

import pytest

from nsa_http.body_writer import find_writer
from tests.server.fake_engine import REPLY, FakeEngine, make_state
from tests.server.test_live import serving

_BODY = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 100}).encode()


def _request(version: bytes) -> bytes:
    return (
        b"POST /v1/completions HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (version, len(_BODY), _BODY)
    )


async def _read_chunks(reader: asyncio.StreamReader) -> list[bytes]:
    """Read a chunked body to its end, strictly."""
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    return chunks


def _text(events: list[bytes]) -> str:
    assert events[-1] == b"data: [DONE]\n\n"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def test_a_connection_is_good_for_the_next_request(engine: FakeEngine) -> None:
    async with serving(make_state(engine)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(_request(b"1.1"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert (
                head.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in head.lower()
            )
            events = await _read_chunks(reader)
            assert _text(events) == REPLY
            assert len(events) == len(REPLY) + 1
        writer.close()


async def test_an_http_1_0_client_gets_the_bare_body(engine: FakeEngine) -> None:
    async with serving(make_state(engine)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_request(b"1.0"))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"transfer-encoding" not in head.lower()
    assert _text([event + b"\n\n" for event in body.split(b"\n\n")[:-1]]) == REPLY


@pytest.mark.parametrize("scope", [{}, {"extensions": {}}])
def test_without_a_connection_there_is_no_writer(scope: dict[str, object]) -> None:
    assert find_writer(scope) is None
