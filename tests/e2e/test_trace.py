"""Block traces from a real engine, through both processes."""

from typing import Any

import httpx
import pytest

from tests.e2e.process import Server

pytestmark = pytest.mark.e2e


def test_a_streamed_trace_is_the_whole_one(tiny_server: Server) -> None:
    body: dict[str, Any] = {
        "prompt": list(range(3, 130)),
        "max_tokens": 10,
        "temperature": 0,
        "ignore_eos": True,
        "nsa_trace": {"max_tokens": 8},
    }
    url = f"{tiny_server.url}/v1/completions"
    whole = httpx.post(url, json=body, timeout=60).json()["choices"][0]["nsa_trace"]
    assert (whole["position"], whole["layers"], whole["truncated"]) == (126, [0, 1], True)
    # Blocks of 16: 4 of 8, of which the first and the last two are forced.
    for token in whole["tokens"][:2]:
        for blocks in (blocks for heads in token for blocks in heads):
            assert len(blocks) == 4
            assert blocks == sorted(blocks)
            assert {0, 6, 7} <= set(blocks)
    response = httpx.post(url, json={**body, "stream": True}, timeout=60)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    choices = [httpx.Response(200, text=event).json()["choices"][0] for event in events]
    parts = [choice["nsa_trace"] for choice in choices if "nsa_trace" in choice]
    assert [block for part in parts for block in part["tokens"]] == whole["tokens"]
    assert len(whole["tokens"]) == 8


def test_a_layer_that_the_model_lacks_is_refused_before_the_stream(tiny_server: Server) -> None:
    body = {"prompt": "a", "stream": True, "nsa_trace": {"layers": [7]}}
    response = httpx.post(f"{tiny_server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "nsa_trace.layers"
