"""Streams over a real socket: cut anywhere, errors in the middle, lost connections, early close."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

import nsa_client
from nsa_client import AsyncClient, Chunk, Client, Usage
from tests.clients.raw_server import (
    CHUNKED_END,
    CHUNKED_HEAD,
    DONE,
    PLAIN_HEAD,
    Exchange,
    RawServer,
    chunked,
    event,
    text_event,
    usage_event,
)

Read = Callable[[str], Awaitable[list[Chunk]]]


async def read_async(url: str) -> list[Chunk]:
    async with AsyncClient(url, model="tiny", max_retries=0) as client:
        return [chunk async for chunk in client.stream("a")]


async def read_sync(url: str) -> list[Chunk]:
    def read() -> list[Chunk]:
        with Client(url, model="tiny", max_retries=0) as client:
            return list(client.stream("a"))

    return await asyncio.to_thread(read)


@pytest.fixture(params=[read_sync, read_async], ids=["sync", "async"])
def read(request: pytest.FixtureRequest) -> Read:
    function: Read = request.param
    return function


BODY = (
    b": keep-alive\n\n"
    + text_event("Grüße")
    + text_event(", 😀", finish_reason="stop")
    + usage_event(3, 2)
    + DONE
)


@pytest.mark.parametrize("num_bytes", [1, 7, 64, 1000])
async def test_chunks_do_not_depend_on_how_the_bytes_arrive(read: Read, num_bytes: int) -> None:
    pieces = [chunked(BODY[i : i + num_bytes]) for i in range(0, len(BODY), num_bytes)]

    async def respond(exchange: Exchange) -> None:
        await exchange.send(CHUNKED_HEAD, *pieces, CHUNKED_END)

    async with RawServer(respond) as server:
        chunks = await read(server.url)
    assert "".join(chunk.text for chunk in chunks) == "Grüße, 😀"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "stop"]
    assert chunks[-1].usage == Usage(3, 2, 5)
    assert server.exchanges[0].json == {
        "model": "tiny",
        "prompt": "a",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_text_is_that_of_choice_0_and_the_others_are_there(read: Read) -> None:
    async def respond(exchange: Exchange) -> None:
        events = text_event("a"), text_event("x", index=1), text_event("b"), DONE
        await exchange.send(PLAIN_HEAD, *events)

    async with RawServer(respond) as server:
        chunks = await read(server.url)
    assert "".join(chunk.text for chunk in chunks) == "ab"
    assert [chunk.choices[0].index for chunk in chunks] == [0, 1, 0]


async def test_what_follows_done_is_not_read(read: Read) -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.send(PLAIN_HEAD, text_event("a") + DONE + b"data: not json\n\n")

    async with RawServer(respond) as server:
        assert [chunk.text for chunk in await read(server.url)] == ["a"]


async def collect(url: str) -> tuple[str, nsa_client.APIError]:
    """Return the text up to the error, and the error."""
    text = ""
    async with AsyncClient(url, model="tiny", max_retries=0) as client:
        with pytest.raises(nsa_client.APIError) as caught:
            async for chunk in client.stream("a"):
                text += chunk.text
    return text, caught.value


async def test_error_in_the_middle_of_a_stream_is_raised_after_the_text_before_it() -> None:
    error = {"message": "engine died", "type": "server_error", "param": None, "code": 500}

    async def respond(exchange: Exchange) -> None:
        # In one packet: the text must come out although the error is already there.
        await exchange.send(PLAIN_HEAD, text_event("a") + event(error=error) + DONE)

    async with RawServer(respond) as server:
        text, caught = await collect(server.url)
    assert text == "a"
    assert type(caught) is nsa_client.StreamError
    assert (caught.message, caught.type, caught.code) == ("engine died", "server_error", 500)
    assert (caught.status, caught.request_id) == (None, "req-7")


@pytest.mark.parametrize(
    ("pieces", "cls", "message"),
    [
        ([PLAIN_HEAD, text_event("a")], nsa_client.StreamError, r"before \[DONE\]"),
        (
            [CHUNKED_HEAD, chunked(text_event("a"))],
            nsa_client.APIConnectionError,
            "connection to http://127",
        ),
        (
            [PLAIN_HEAD, text_event("a") + b"data: {oops\n\n" + DONE],
            nsa_client.InvalidResponseError,
            "oops",
        ),
        (
            [PLAIN_HEAD, text_event("a") + b'data: {"choices":[{}]}\n\n' + DONE],
            nsa_client.InvalidResponseError,
            "KeyError",
        ),
    ],
    ids=["no DONE", "connection lost", "not JSON", "not a chunk"],
)
async def test_broken_streams_raise_after_the_text_that_came(
    pieces: list[bytes], cls: type[nsa_client.APIError], message: str
) -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.send(*pieces)

    async with RawServer(respond) as server:
        text, caught = await collect(server.url)
    assert text == "a"
    assert type(caught) is cls
    with pytest.raises(cls, match=message):
        raise caught


async def test_refused_stream_raises_the_status_error(read: Read) -> None:
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":"prompt","code":400}}'

    async def respond(exchange: Exchange) -> None:
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n" % len(body)
        await exchange.send(head, body)

    async with RawServer(respond) as server:
        with pytest.raises(nsa_client.BadRequestError, match="too long") as caught:
            await read(server.url)
    assert caught.value.param == "prompt"


async def endless(exchange: Exchange) -> None:
    await exchange.send(CHUNKED_HEAD)
    while True:
        await exchange.send(chunked(text_event("a")))
        await asyncio.sleep(0.001)


async def test_closing_an_async_stream_closes_the_connection() -> None:
    async with RawServer(endless) as server, AsyncClient(server.url, model="tiny") as client:
        async with client.stream("a") as stream:
            async for chunk in stream:
                assert chunk.text == "a"
                break
        await asyncio.wait_for(server.client_left.wait(), 10)


async def test_cancelling_the_reader_closes_the_connection() -> None:
    async with RawServer(endless) as server, AsyncClient(server.url, model="tiny") as client:
        started = asyncio.Event()

        async def read_on() -> None:
            async for _ in client.stream("a"):
                started.set()

        task = asyncio.create_task(read_on())
        await asyncio.wait_for(started.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.client_left.wait(), 10)


async def test_closing_a_sync_stream_closes_the_connection() -> None:
    async with RawServer(endless) as server:
        client = Client(server.url, model="tiny")
        stream = client.stream("a")

        def read_one() -> str:
            with stream:
                return next(stream).text

        assert await asyncio.to_thread(read_one) == "a"
        # Client and stream are still referenced: nothing but `with` can have closed the connection.
        await asyncio.wait_for(server.client_left.wait(), 10)
        client.close()


async def test_a_stream_that_is_never_read_sends_nothing() -> None:
    async with RawServer(endless) as server, AsyncClient(server.url, model="tiny") as client:
        async with client.stream("a"):
            pass
        assert server.exchanges == []


async def test_silence_in_the_middle_of_a_stream_is_a_timeout() -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.send(CHUNKED_HEAD, chunked(text_event("a")))
        await asyncio.sleep(3600)

    async with RawServer(respond) as server:
        timeout = httpx.Timeout(10.0, read=1.0)
        async with AsyncClient(server.url, model="tiny", timeout=timeout) as client:
            stream = client.stream("a")
            assert (await anext(stream)).text == "a"
            with pytest.raises(nsa_client.APITimeoutError, match="raise `timeout`"):
                await anext(stream)
    # Half an answer cannot be taken back: it must not be asked for a second time.
    assert len(server.exchanges) == 1
