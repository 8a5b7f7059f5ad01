"""The API of a real server process, through the `openai` SDK."""

import json
import urllib.request
from typing import Any

import openai
import pytest

from tests.e2e.conftest import connect
from tests.e2e.process import Server, tcp_listeners, wait_until

pytestmark = pytest.mark.e2e

PROMPT = "The capital of France is"
MESSAGES: list[Any] = [{"role": "user", "content": "Name a colour."}]
ALL_TOKENS = {"ignore_eos": True}


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def complete(client: openai.OpenAI, **options: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **options}
    return client.completions.create(model=model_of(client), **options)


def post(server: Server, path: str, body: object) -> Any:
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def tokens_of(server: Server, prompt: str) -> list[int]:
    tokens: list[int] = post(server, "/tokenize", {"prompt": prompt})["tokens"]
    return tokens


def test_models(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id in ("llama", "smollm2-135m-nsa")
    assert client.models.retrieve(model.id).id == model.id
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] in (1024, 2048)
    with pytest.raises(openai.NotFoundError, match="nonsense"):
        client.models.retrieve("nonsense")


def test_a_stream_is_the_whole_in_pieces(server: Server, client: openai.OpenAI) -> None:
    whole = complete(client, extra_body=ALL_TOKENS)
    chunks = list(
        complete(client, stream=True, stream_options={"include_usage": True}, extra_body=ALL_TOKENS)
    )
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len(texts) > 1
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    for usage in (whole.usage, chunks[-1].usage):
        assert usage.prompt_tokens == len(tokens_of(server, PROMPT))
        assert usage.completion_tokens == 8
        assert usage.total_tokens == usage.prompt_tokens + 8


def test_chat_streams_and_does_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": model_of(client),
        "messages": MESSAGES,
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert whole.choices[0].message.role == deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert whole.usage.completion_tokens > 0


def test_chat_logprobs_spell_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=model_of(client),
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body=ALL_TOKENS,
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        assert entry.logprob == max(item.logprob for item in entry.top_logprobs) <= 0
        assert len(entry.top_logprobs) == 2


def test_completion_logprobs_and_echo(server: Server, client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=4, logprobs=2, echo=True, extra_body=ALL_TOKENS)
    choice = answer.choices[0]
    num_prompt_tokens = len(tokens_of(server, PROMPT))
    assert choice.text.startswith(PROMPT)
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == num_prompt_tokens + 4
    assert scores.token_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    prompt_only = complete(client, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert prompt_only.text == PROMPT
    assert prompt_only.logprobs.token_logprobs == pytest.approx(
        scores.token_logprobs[:num_prompt_tokens], abs=1e-5
    )


def test_n_gives_n_different_samples_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1, "extra_body": ALL_TOKENS}
    first, second = (complete(client, **options) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len({choice.text for choice in first.choices}) == 3
    assert first.usage.completion_tokens == 24
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert complete(client, **{**options, "seed": 6}).choices[0].text != first.choices[0].text


def test_prompts_as_a_batch_and_as_token_ids(server: Server, client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Once upon a time"]
    ids = [tokens_of(server, prompt) for prompt in prompts]
    apart = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    batch = complete(client, prompt=prompts)
    by_ids = complete(client, prompt=ids)
    assert [choice.text for choice in batch.choices] == apart
    assert [choice.text for choice in by_ids.choices] == apart
    assert complete(client, prompt=ids[0]).choices[0].text == apart[0]
    assert batch.usage.prompt_tokens == sum(map(len, ids))


def test_tokenize_and_detokenize_are_inverse(server: Server) -> None:
    text = "Grüße, 世界! 🙂\n\tend"
    answer = post(server, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert post(server, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a" * 40_000}, "max_model_len is"),
        ({"temperature": 3.0}, "temperature"),
        ({"prompt": [10**7]}, "outside the vocabulary"),
        ({"prompt": []}, "prompt"),
        ({"n": 0}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
    ids=["too-long", "range", "vocabulary", "empty", "n", "suffix", "guided"],
)
def test_bad_requests_say_what_is_wrong(
    client: openai.OpenAI, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, **options)
    assert caught.value.status_code == 400


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="x")


def test_metrics_of_serial_requests_are_exact(server: Server, client: openai.OpenAI) -> None:
    num_requests, num_prompt_tokens, num_tokens = 3, 70, 5
    before = server.metrics()
    for number in range(num_requests):
        prompt = [number + 5, *range(100, 100 + num_prompt_tokens - 1)]
        complete(client, prompt=prompt, max_tokens=num_tokens, extra_body=ALL_TOKENS)
    wait_until(lambda: server.metrics()["num_requests_running"] == 0)
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["prompt_tokens_total"] == num_requests * num_prompt_tokens
    assert grown["generation_tokens_total"] == num_requests * num_tokens
    assert grown['request_success_total{finished_reason="length"}'] == num_requests
    assert grown["time_to_first_token_seconds_count"] == num_requests
    assert grown["inter_token_latency_seconds_count"] == num_requests * (num_tokens - 1)
    assert grown["e2e_request_latency_seconds_count"] == num_requests
    assert grown["request_prompt_tokens_sum"] == num_requests * num_prompt_tokens
    assert grown["request_generation_tokens_sum"] == num_requests * num_tokens
    assert grown["prefix_cache_queries_total"] == num_requests * num_prompt_tokens
    assert grown["prefix_cache_hits_total"] == 0
    assert grown["iteration_tokens_total_count"] == num_requests * num_tokens
    assert grown["iteration_tokens_total_sum"] == num_requests * (num_prompt_tokens + num_tokens)
    assert grown["request_params_n_sum"] == num_requests
    assert grown["request_max_num_generation_tokens_sum"] == num_requests * num_tokens
    assert grown["request_prefill_kv_computed_tokens_sum"] == num_requests * num_prompt_tokens
    assert grown["request_num_preemptions_sum"] == 0
    assert after["num_requests_waiting"] == 0
    check_cache_reads(server, grown, num_requests, num_prompt_tokens, num_tokens)


def check_cache_reads(
    server: Server, grown: dict[str, float], num_requests: int, num_prompt: int, num_tokens: int
) -> None:
    """Where every block is selected, what is selected is what dense attention would read."""
    with urllib.request.urlopen(f"{server.url}/server_info", timeout=10) as response:
        cache = json.load(response)["cache"]
    page_size = cache["page_size"]
    token_bytes = cache["components"]["raw"] / (cache["num_pages"] * page_size)
    lengths = {
        "prefill": range(1, num_prompt + 1),
        "decode": range(num_prompt + 1, num_prompt + num_tokens),
    }
    for phase, seen in lengths.items():
        expected = num_requests * sum(seen) * token_bytes
        assert grown[f'nsa_dense_cache_read_bytes_total{{phase="{phase}"}}'] == expected
        num_blocks = num_requests * sum(-(-length // page_size) for length in seen)
        assert grown[f'nsa_visible_blocks_total{{phase="{phase}"}}'] == num_blocks
        num_selected = grown[f'nsa_selected_blocks_total{{phase="{phase}"}}']
        slc_bytes = grown[f'nsa_cache_read_bytes_total{{branch="slc",phase="{phase}"}}']
        assert 0 < num_selected <= num_blocks
        assert (slc_bytes == expected) == (num_selected == num_blocks)
        assert 0 < slc_bytes <= expected


def test_a_repeated_prompt_is_served_from_the_cache(client: openai.OpenAI) -> None:
    prompt = [7, *range(150, 280)]
    first, second = (complete(client, prompt=prompt, extra_body=ALL_TOKENS) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 128
    assert first.choices[0].text == second.choices[0].text


async def test_many_clients_at_once_get_what_each_gets_alone(server: Server) -> None:
    prompts = [[number, *range(60, 60 + 9 * number)] for number in range(3, 15)]
    with connect(server) as client:
        model = model_of(client)
        alone = [
            complete(client, prompt=prompt, max_tokens=6, extra_body=ALL_TOKENS).usage
            for prompt in prompts
        ]
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        streams = [
            await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=6,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=ALL_TOKENS,
            )
            for prompt in prompts
        ]
        for stream, usage in zip(streams, alone, strict=True):
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.completion_tokens == usage.completion_tokens == 6
            assert chunks[-1].usage.prompt_tokens == usage.prompt_tokens


async def test_a_client_that_leaves_frees_its_pages(server: Server) -> None:
    before = server.metrics()
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.completions.create(
            model=(await client.models.list()).data[0].id,
            prompt=list(range(40, 140)),
            max_tokens=900,
            stream=True,
            extra_body=ALL_TOKENS,
        )
        await anext(aiter(stream))
        assert server.metrics()["kv_cache_usage_perc"] > 0
        await stream.close()
    wait_until(lambda: server.metrics()["num_requests_running"] == 0)
    after = server.metrics()
    name = 'request_success_total{finished_reason="abort"}'
    assert after[name] == before[name] + 1
    assert after["generation_tokens_total"] < before["generation_tokens_total"] + 900
    assert after["kv_cache_usage_perc"] == 0


def test_one_tcp_listener(server: Server) -> None:
    addresses = tcp_listeners(server.popen.pid, server.engine_pid())
    port = int(server.url.rpartition(":")[2])
    assert addresses == [f"0100007F:{port:04X}"]


def test_the_default_model_speaks_english(default_server: Server) -> None:
    with connect(default_server) as client:
        assert complete(client, max_tokens=3).choices[0].text.startswith(" Paris")
        answer = client.chat.completions.create(
            model=model_of(client),
            messages=[{"role": "user", "content": "What is the capital of France? One word."}],
            max_tokens=20,
            temperature=0,
        )
    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_stop_string_ends_the_text_before_it(default_server: Server) -> None:
    with connect(default_server) as client:
        whole = complete(client, prompt="1, 2, 3, 4,", max_tokens=24).choices[0].text
        assert " 7, 8" in whole
        stopped = complete(client, prompt="1, 2, 3, 4,", max_tokens=24, stop=[" 7, 8", "never"])
        chunks = complete(client, prompt="1, 2, 3, 4,", max_tokens=24, stop=" 7, 8", stream=True)
        streamed = "".join(chunk.choices[0].text for chunk in chunks)
    want = whole[: whole.index(" 7, 8")]
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (want, "stop")
    assert streamed == want
