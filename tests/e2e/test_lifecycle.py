"""How a real server ends: drained, without its engine, or without its parent; never in pieces."""

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import TINY_FLAGS, connect
from tests.e2e.process import Server, is_alive, kill_process, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def start(checkpoints: Mapping[str, Path]) -> Iterator[Callable[[], Server]]:
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(str(checkpoints["llama"]), *TINY_FLAGS))
        return servers[-1].wait_ready()

    yield start
    for server in servers:
        server.kill()


def open_stream(client: openai.OpenAI, max_tokens: int) -> Any:
    """Begin a stream and wait for its first chunk."""
    stream = client.completions.create(
        model="llama",
        prompt=list(range(40, 80)),
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    next(iter(stream))
    return stream


def test_sigterm_drains_and_leaves_nothing(start: Callable[[], Server]) -> None:
    server = start()
    engine_pid = server.engine_pid()
    with connect(server) as client:
        stream = open_stream(client, 600)
        server.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in server.log)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="llama", prompt="x")
        assert caught.value.status_code == 503
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] == "length"
    assert server.wait_exit() == 0
    wait_until(lambda: not is_alive(engine_pid))
    assert "Traceback" not in server.log


def test_a_killed_engine_is_an_error_and_exit_code_1(start: Callable[[], Server]) -> None:
    server = start()
    engine_pid = server.engine_pid()
    with connect(server) as client:
        stream = open_stream(client, 900)
        kill_process(engine_pid)
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)
    assert server.wait_exit() == 1
    assert not is_alive(engine_pid)
    assert "the engine died" in server.log
    assert "Traceback" not in server.log


def test_the_engine_does_not_outlive_a_killed_server(start: Callable[[], Server]) -> None:
    server = start()
    engine_pid = server.engine_pid()
    with connect(server) as client:
        open_stream(client, 900)
        kill_process(server.popen.pid)
    wait_until(lambda: not is_alive(engine_pid), timeout_s=10)
