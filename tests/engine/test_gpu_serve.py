"""`nsa-serve serve --device cuda`: the whole way, with an engine process on the GPU.

Plain HTTP, so that it runs where no SDK is installed.
"""

import json
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.llm import LLM
from nsa_serve.model_source import load_tokenizer
from tests.e2e.process import Server, wait_until
from tests.engine.engine_runs import greedy, make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.e2e]

FLAGS = ("--dtype", "float32", "--num-threads", "1", "--page-memory", "8MiB", "--max-num-seqs", "4")
PROMPT = "The capital of France is"
NUM_TOKENS = 24
BODY = {"model": "llama", "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(checkpoints: Mapping[str, Path], engine_device: str) -> Iterator[Server]:
    flags = (*FLAGS, "--device", engine_device, "--async-scheduling")
    server = Server(str(checkpoints["llama"]), *flags)
    try:
        # Its first kernels are compiled meanwhile.
        wait_until(
            lambda: "ready on" in server.log or server.popen.poll() is not None, timeout_s=240
        )
        yield server.wait_ready()
    finally:
        server.kill()


def post(server: Server, body: object) -> list[str]:
    """Return the lines of an answer."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
        return [line for line in response.read().decode().split("\n") if line]


def stream(server: Server) -> tuple[str, list[str | None]]:
    """Return the text of a streamed completion, and the finish reasons of its chunks."""
    lines = post(server, {**BODY, "prompt": PROMPT, "stream": True})
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    choices = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
    return "".join(item["text"] for item in choices), [item["finish_reason"] for item in choices]


@pytest.mark.timeout(400)
def test_a_stream_is_what_the_cpu_engine_says(
    server: Server, checkpoints: Mapping[str, Path]
) -> None:
    text, reasons = stream(server)
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len(reasons) > 2
    engine = make_engine(checkpoints["llama"])
    config = make_config(EngineConfig, {"model": str(checkpoints["llama"])})
    llm = LLM.from_engine(engine, load_tokenizer(config))
    (want,) = llm.generate([PROMPT], greedy(NUM_TOKENS), use_tqdm=False)
    assert text == want.text
    whole = json.loads("".join(post(server, {**BODY, "prompt": PROMPT})))
    assert whole["choices"][0]["text"] == want.text
    assert whole["usage"]["completion_tokens"] == NUM_TOKENS


@pytest.mark.timeout(400)
def test_the_metrics_say_that_graphs_ran_and_pages_are_free(
    server: Server, engine_device: str
) -> None:
    stream(server)
    wait_until(lambda: server.metrics()["num_requests_running"] == 0)
    metrics = server.metrics()
    assert metrics["kv_cache_usage_perc"] == 0
    assert metrics["generation_tokens_total"] >= NUM_TOKENS
    if engine_device == "cuda":
        assert metrics["graph_replays_total"] > 0
