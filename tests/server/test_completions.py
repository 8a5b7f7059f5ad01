"""POST /v1/completions: bodies, streams, batches, logprobs, echo."""

import json
import re
from typing import Any

import httpx
import pytest

from nsa_serve.errors import EngineDeadError, QueueFullError, RequestError
from tests.server.fake_engine import REPLY, FakeEngine

URL = "/v1/completions"


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"prompt": "hi", **body})
    assert response.status_code == 200, response.text
    content = response.json()
    assert isinstance(content, dict)
    return content


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream; checks its frame."""
    response = await client.post(URL, json={"prompt": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_a_stream_is_these_bytes(client: httpx.AsyncClient) -> None:
    response = await client.post(
        URL,
        json={
            "prompt": "hi",
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "request_id": "golden",
        },
    )
    text = re.sub(r'"created":\d+', '"created":0', response.text)
    text = re.sub(r"fp_[0-9a-f]{10}", "fp_x", text)
    head = (
        'data: {"id":"cmpl-golden","object":"text_completion","created":0,"model":"tiny",'
        '"system_fingerprint":"fp_x","choices":['
    )
    assert text == (
        head + '{"index":0,"text":"H","logprobs":null,"finish_reason":null,"stop_reason":null}]'
        ',"usage":null}\n\n'
        + head
        + '{"index":0,"text":"e","logprobs":null,"finish_reason":"length","stop_reason":null}]'
        ',"usage":null}\n\n' + head + '],"usage":{"prompt_tokens":2,"completion_tokens":2,'
        '"total_tokens":4,"prompt_tokens_details":{"cached_tokens":3}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_the_whole_answer_is_the_folded_stream(client: httpx.AsyncClient) -> None:
    options = {"n": 3, "logprobs": 2, "echo": True, "return_token_ids": True}
    whole = await complete(client, prompt=["ab", "xyz"], **options)
    chunks = await stream(client, prompt=["ab", "xyz"], **options)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        for key, values in choice["logprobs"].items():
            assert [item for part in parts for item in part["logprobs"][key]] == values
        reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert reasons == [choice["finish_reason"]]
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    assert [choice["text"] for choice in whole["choices"]] == ["ab" + REPLY] * 3 + [
        "xyz" + REPLY
    ] * 3


async def test_defaults_are_those_of_openai(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "x" * 40
    content = await complete(client)
    _, params, facts = engine.calls[0]
    assert (params.max_tokens, params.temperature, facts["n"]) == (16, 1.0, 1)
    assert content["choices"][0]["finish_reason"] == "length"
    assert content["object"] == "text_completion"
    assert content["id"].startswith("cmpl-")
    assert content["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 16,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_null_is_the_default_of_every_optional_field(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    from nsa_http.protocol import CompletionBody

    names = [name for name in CompletionBody.model_fields if name != "prompt"]
    await complete(client)
    await complete(client, **dict.fromkeys([*names, "suffix", "tools", "user", "grammar"], None))
    assert engine.calls[0][:2] == engine.calls[1][:2]


async def test_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(
        client,
        max_tokens=5,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"3": -100},
        seed=-5,
        stop=["a", "b"],
        stop_token_ids=[4],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        prompt_logprobs=1,
        cache_salt="pepper",
    )
    _, params, facts = engine.calls[0]
    assert (params.max_tokens, params.min_tokens) == (5, 2)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.5, 7, 0.25)
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, -1.0)
    assert (params.frequency_penalty, params.logit_bias) == (0.5, {3: -100.0})
    assert (params.seed, params.stop, params.stop_token_ids) == (-5, ("a", "b"), (4,))
    assert params.include_stop_str_in_output and params.ignore_eos
    assert not params.skip_special_tokens
    assert params.prompt_logprobs == 1
    assert facts["cache_salt"] == "pepper"


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [("abc", [3]), (["a", "bcd"], [1, 3]), ([5, 6, 7, 8], [4]), ([[5], [6, 7]], [1, 2])],
)
async def test_every_kind_of_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, lengths: list[int]
) -> None:
    content = await complete(client, prompt=prompt)
    assert [len(ids) for ids, _, _ in engine.calls] == lengths
    assert len(content["choices"]) == len(lengths)
    assert content["usage"]["prompt_tokens"] == sum(lengths)


async def test_logprobs_in_the_legacy_format(client: httpx.AsyncClient) -> None:
    content = await complete(client, prompt="h\u00e9", echo=True, logprobs=1, max_tokens=1)
    logprobs = content["choices"][0]["logprobs"]
    assert content["choices"][0]["text"] == "h\u00e9H"
    # The two bytes of the accented letter start where it starts.
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"] == [None, -1.25, -1.25, -1.25]
    assert logprobs["top_logprobs"][-1] == {"!": -0.5, "H": -1.25}


async def test_an_impossible_logprob_is_openais_minimum(client: httpx.AsyncClient) -> None:
    content = await complete(client, logprobs=3, max_tokens=1)
    assert content["choices"][0]["logprobs"]["top_logprobs"][0]['"'] == -9999.0


async def test_echo_without_tokens_scores_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    content = await complete(client, prompt="abc", echo=True, max_tokens=0, logprobs=0)
    choice = content["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert content["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_in_vllms_format(client: httpx.AsyncClient) -> None:
    content = await complete(client, prompt="ab", prompt_logprobs=0)
    first, second = content["choices"][0]["prompt_logprobs"]
    assert first is None
    (facts,) = second.values()
    assert facts == {"logprob": -1.25, "rank": 2, "decoded_token": "b"}


async def test_truncation_keeps_the_end(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    content = await complete(client, prompt="abcdef", truncate_prompt_tokens=2, echo=True)
    assert content["choices"][0]["text"] == "ef" + REPLY
    await complete(client, prompt="y" * 500, truncate_prompt_tokens=-1)
    assert len(engine.calls[1][0]) == engine.info.max_model_len - 1


async def test_continuous_usage_grows_to_the_total(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, n=2, max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 2, 3, 4, 5, 6, 6]
    assert chunks[-1]["choices"] == []


async def test_a_full_queue_is_503_with_retry_after(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = QueueFullError("full", retry_after_s=7)
    for is_stream in (False, True):
        response = await client.post(URL, json={"prompt": "hi", "stream": is_stream})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "7"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"


async def test_a_batch_refused_in_part_leaves_nothing_running(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal, engine.refuse_after = QueueFullError("full"), 2
    response = await client.post(URL, json={"prompt": ["a", "b", "c"], "request_id": "r"})
    assert response.status_code == 503
    assert engine.aborted == ["cmpl-r-0", "cmpl-r-1"]


async def test_a_dead_engine_is_500(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = EngineDeadError("gone at /secret/path")
    response = await client.post(URL, json={"prompt": "hi"})
    assert response.status_code == 500
    assert "/secret" not in response.text


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]], ids=["single", "merged"])
async def test_a_refusal_by_the_engine_itself_is_a_400(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: str | list[str]
) -> None:
    engine.stream_error = RequestError("too long for the cache", param="prompt")
    response = await client.post(URL, json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long for the cache"
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("attribute", ["die_after", "fail_after"])
async def test_a_failure_inside_a_stream_is_an_event_before_done(
    client: httpx.AsyncClient, engine: FakeEngine, attribute: str
) -> None:
    setattr(engine, attribute, 2)
    chunks = await stream(client)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["H", "e"]
    assert chunks[-1]["error"]["code"] == 500
    assert "/secret" not in json.dumps(chunks)


@pytest.mark.parametrize("attribute", ["die_after", "fail_after"])
async def test_a_failure_of_a_whole_answer_is_500(
    client: httpx.AsyncClient, engine: FakeEngine, attribute: str
) -> None:
    setattr(engine, attribute, 2)
    response = await client.post(URL, json={"prompt": ["a", "b"]})
    assert response.status_code == 500
    assert set(response.json()) == {"error"}
    assert "/secret" not in response.text
