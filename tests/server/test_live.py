"""A real uvicorn server: disconnects, hostile clients, and a process from start to exit code."""

import asyncio
import contextlib
import json
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest
import uvicorn

from nsa_http.app import create_app
from nsa_http.http_protocol import MAX_HEADER_BYTES, make_protocol
from nsa_http.state import ServerState
from tests.e2e.process import Process, wait_until
from tests.server.fake_engine import FakeEngine, make_state


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen; the test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(state: ServerState) -> AsyncIterator[int]:
    """Serve in this loop, as `nsa_http.server` does, and yield the port."""
    config = uvicorn.Config(
        create_app(state),
        port=0,
        http=make_protocol(state.config.request_read_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def post(
    port: int, path: str, **body: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request over a raw socket."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (path.encode(), len(content), content)
    )
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("moment", ["queued", "decoding"])
async def test_a_client_that_leaves_aborts_its_request(
    engine: FakeEngine, path: str, is_stream: bool, moment: str
) -> None:
    engine.reply, engine.delay_s = "x" * 100, 0.01
    if moment == "queued":
        engine.gate.clear()
    state = make_state(engine)
    async with serving(state) as port:
        messages = [{"role": "user", "content": "hi"}]
        _, writer = await post(
            port,
            path,
            stream=is_stream,
            max_tokens=90,
            request_id="r",
            **({"messages": messages} if "chat" in path else {"prompt": "hi"}),
        )
        await until(lambda: bool(engine.calls))
        if moment == "decoding":
            await asyncio.sleep(0.03)
        assert engine.aborted == []
        writer.close()
        await until(lambda: bool(engine.aborted))
        await until(lambda: state.num_inflight == 0)
    assert engine.aborted == ["chatcmpl-r" if "chat" in path else "cmpl-r"]
    assert state.work == set()


async def test_a_batch_is_aborted_as_a_whole(engine: FakeEngine) -> None:
    engine.gate.clear()
    async with serving(make_state(engine)) as port:
        _, writer = await post(port, "/v1/completions", prompt=["a", "b", "c"], request_id="r")
        await until(lambda: len(engine.calls) == 3)
        writer.close()
        await until(lambda: len(engine.aborted) == 3)
    assert sorted(engine.aborted) == ["cmpl-r-0", "cmpl-r-1", "cmpl-r-2"]


async def test_a_client_that_stops_reading_is_dropped(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(engine.info, max_model_len=10**9)
    # Enough to fill every buffer between here and the client.
    engine.reply = "x" * 200_000
    state = make_state(engine, response_write_timeout=0.2)
    async with serving(state) as port:
        _, writer = await post(
            port, "/v1/completions", prompt="hi", stream=True, max_tokens=200_000
        )
        await until(lambda: bool(engine.aborted))
        await until(lambda: state.num_inflight == 0)
        writer.transport.abort()
    assert len(engine.aborted) == 1


async def test_a_silent_stream_gets_comments(engine: FakeEngine) -> None:
    engine.gate.clear()
    async with serving(make_state(engine, sse_keep_alive_interval=0.02)) as port:
        reader, writer = await post(port, "/v1/completions", prompt="hi", stream=True)
        await reader.readuntil(b": keep-alive\n\n")
        engine.gate.set()
        await reader.readuntil(b"data: [DONE]\n\n")
        writer.close()


async def test_an_abort_by_the_server_ends_a_stream_with_an_error(engine: FakeEngine) -> None:
    state = make_state(engine)
    async with serving(state) as port:
        engine.reply, engine.delay_s = "x" * 100, 0.05
        limits = {"max_tokens": 100}
        reader, writer = await post(port, "/v1/completions", prompt="hi", stream=True, **limits)
        await reader.readuntil(b"data: ")
        whole_reader, whole_writer = await post(port, "/v1/completions", prompt="hi", **limits)
        await until(lambda: len(state.work) == 2)
        assert state.abort_work() == 2
        text = (await reader.readuntil(b"data: [DONE]\n\n")).decode()
        assert '"code":503' in text
        assert (await whole_reader.readline()).startswith(b"HTTP/1.1 503")
        await until(lambda: state.num_inflight == 0)
        writer.close()
        whole_writer.close()
    assert len(engine.aborted) == 2


async def test_an_abort_before_the_first_token_is_a_503(engine: FakeEngine) -> None:
    state = make_state(engine)
    async with serving(state) as port:
        engine.gate.clear()
        reader, writer = await post(port, "/v1/completions", prompt="hi", stream=True)
        await until(lambda: len(state.work) == 1)
        state.abort_work()
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        writer.close()


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nX: y"])
async def test_headers_that_never_end_close_the_connection(
    engine: FakeEngine, start: bytes
) -> None:
    async with serving(make_state(engine, request_read_timeout=0.1)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        assert await reader.read() == b""
        writer.close()


async def test_a_timely_client_is_not_cut_off_while_it_waits(engine: FakeEngine) -> None:
    engine.gate.clear()
    async with serving(make_state(engine, request_read_timeout=0.05)) as port:
        reader, writer = await post(port, "/v1/completions", prompt="hi")
        await asyncio.sleep(0.15)
        engine.gate.set()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize(
    "headers", [b"X: " + b"a" * 200_000, b"\r\n".join(b"X%d: y" % i for i in range(20_000))]
)
async def test_huge_headers_are_refused(engine: FakeEngine, headers: bytes) -> None:
    async with serving(make_state(engine)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def spawn(*flags: str) -> Process:
        command = ("-W", "error", "-m", "tests.server.live", "--port", "0", *flags)
        processes.append(Process(*command))
        return processes[-1]

    yield spawn
    for process in processes:
        process.kill()


def open_stream(url: str, prompt: str = "hi", max_tokens: int = 30) -> "urllib.request._UrlopenRet":
    content = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": True}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", content, headers)
    return urllib.request.urlopen(request, timeout=20)


def test_sigterm_drains_and_exits_0(spawn: Callable[..., Process]) -> None:
    process = spawn()
    url = process.wait_ready().url
    with open_stream(url) as response:
        assert b"data: " in response.readline()
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining 1 requests" in process.log)
        with pytest.raises(urllib.error.HTTPError) as caught:
            open_stream(url)
        assert caught.value.code == 503
        assert caught.value.headers["retry-after"] == "5"
        caught.value.close()
        text = response.read().decode()
    assert text.count('"text":"x"') == 29
    assert "error" not in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.wait_exit() == 0


@pytest.mark.parametrize("num_signals", [1, 2])
def test_the_timeout_or_a_second_signal_ends_streams(
    spawn: Callable[..., Process], num_signals: int
) -> None:
    process = spawn("--shutdown-timeout", "0.1" if num_signals == 1 else "60")
    with open_stream(process.wait_ready().url, max_tokens=100) as response:
        response.readline()
        for _ in range(num_signals):
            process.popen.send_signal(signal.SIGINT)
            wait_until(lambda: "draining" in process.log)
        text = response.read().decode()
    assert '"code":503' in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.wait_exit() == 0


def test_a_dead_engine_ends_the_server_with_1(spawn: Callable[..., Process]) -> None:
    process = spawn()
    with open_stream(process.wait_ready().url, prompt="die") as response:
        text = response.read().decode()
    assert '"code":500' in text
    assert text.endswith("data: [DONE]\n\n")
    assert process.wait_exit() == 1
    assert "the engine died" in process.log
    assert "Traceback" not in process.log


def test_a_taken_port_and_a_broken_model_fail_in_one_line(spawn: Callable[..., Process]) -> None:
    first = spawn()
    port = first.wait_ready().url.rpartition(":")[2]
    broken = spawn("--revision", "broken")
    taken = spawn("--port", port)
    assert taken.wait_exit() == 1
    assert taken.log.splitlines()[-1].startswith("nsa-serve: error: cannot listen on 127.0.0.1")
    assert broken.wait_exit() == 1
    assert broken.log.splitlines()[-1] == (
        "nsa-serve: error: the checkpoint is broken; fetch it again"
    )
    assert "Traceback" not in taken.log + broken.log
    first.popen.send_signal(signal.SIGTERM)
    assert first.wait_exit() == 0
    assert "1,120 tokens" in first.log
    assert "10 of 111 tokens" in first.log
    assert "curl http://127.0.0.1:" in first.log
