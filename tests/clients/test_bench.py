"""The load generator: what it sends, when, and the arithmetic of its report."""

import asyncio
import json
import math
from itertools import pairwise
from typing import Any

import pytest

from nsa_client.bench import read_record, run_bench
from nsa_client.bench_config import BenchConfig, arrival_delays_s, random_prompts
from nsa_client.bench_stats import BenchResult, LatencyStats, RequestRecord, percentile
from nsa_client.errors import APIConnectionError, APIError, APITimeoutError, StreamError
from nsa_client.raw_stream import RawStream, post_stream
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


async def answer(exchange: Exchange) -> None:
    """Send `max_tokens` tokens, two to an event, and a usage that says so."""
    num_tokens = exchange.json["max_tokens"]
    pieces = [chunked(text_event("ab")) for _ in range(0, num_tokens, 2)]
    usage = usage_event(len(exchange.json["prompt"]), num_tokens)
    await exchange.send(CHUNKED_HEAD, *pieces, chunked(usage), chunked(DONE), CHUNKED_END)


def config(server: RawServer, **settings: Any) -> BenchConfig:
    fixed = {"model": "tiny", "vocab_size": 50, "random_input_len": 7, "output_len": 6}
    return BenchConfig(base_url=server.url, **{**fixed, **settings})


async def test_tokens_are_those_the_server_counts_not_the_events() -> None:
    async with RawServer(answer) as server:
        result = await run_bench(config(server, num_prompts=5, max_concurrency=2, num_warmups=1))
    assert server.max_open <= 2
    # The warm-up has a prompt of its own, or it would fill the prefix cache for the first request.
    assert len({tuple(exchange.json["prompt"]) for exchange in server.exchanges}) == 6
    values = result.to_dict()
    assert (values["completed"], values["failed"]) == (5, 0)
    assert (values["total_input_tokens"], values["total_output_tokens"]) == (35, 30)
    assert all(len(record.itls_s) == 2 for record in result.records)
    assert all(0 < record.ttft_s <= record.e2el_s for record in result.records)
    assert values["output_throughput"] == pytest.approx(30 / values["duration"])
    assert values["total_token_throughput"] == pytest.approx(65 / values["duration"])


async def test_requests_ask_for_an_exact_length_and_differ_by_seed() -> None:
    async def sent(**settings: Any) -> list[Any]:
        async with RawServer(answer) as server:
            await run_bench(config(server, num_prompts=3, max_concurrency=1, **settings))
        return [exchange.json for exchange in server.exchanges]

    bodies = await sent(seed=1, extra_body={"cache_salt": "x"})
    assert bodies[0] == {
        "model": "tiny",
        "prompt": bodies[0]["prompt"],
        "max_tokens": 6,
        "min_tokens": 6,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "x",
    }
    prompts = [tuple(body["prompt"]) for body in bodies]
    assert len(set(prompts)) == 3
    assert all(len(prompt) == 7 and all(0 <= i < 50 for i in prompt) for prompt in prompts)
    assert [body["prompt"] for body in await sent(seed=1)] == [list(p) for p in prompts]
    assert [body["prompt"] for body in await sent(seed=2)] != [list(p) for p in prompts]


async def test_chat_sends_messages_and_ignores_the_role_event() -> None:
    def delta(**fields: str) -> bytes:
        return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}])

    async def respond(exchange: Exchange) -> None:
        assert exchange.json["messages"] == [{"role": "user", "content": "hi"}]
        assert "ignore_eos" not in exchange.json
        await exchange.send(PLAIN_HEAD, delta(role="assistant", content=""), delta(content="a"))
        await exchange.send(delta(content="b"), usage_event(2, 2), DONE)

    async with RawServer(respond) as server:
        settings = {"endpoint": "chat", "prompts": ("hi",), "ignore_eos": False}
        result = await run_bench(config(server, num_prompts=2, **settings))
    assert result.num_failed == 0, result.to_dict()["error_counts"]
    assert [len(record.itls_s) for record in result.records] == [1, 1]


async def test_a_failed_request_is_counted_and_the_others_go_on() -> None:
    error = b'{"error":{"message":"queue full"}}'
    refusal = b"HTTP/1.1 503 Busy\r\ncontent-length: %d\r\n\r\n%b" % (len(error), error)

    async def respond(exchange: Exchange) -> None:
        number = len(server.exchanges)
        if number == 1:
            await exchange.send(refusal)
        elif number == 2:
            await exchange.send(CHUNKED_HEAD, chunked(text_event("a")))
        elif number == 3:
            broken = text_event("a") + event(error={"message": "died"}) + DONE
            await exchange.send(PLAIN_HEAD, broken)
        else:
            await answer(exchange)

    async with RawServer(respond) as server:
        result = await run_bench(config(server, num_prompts=5, max_concurrency=1))
    assert (len(result.completed), result.num_failed) == (2, 3)
    assert result.num_output_tokens == 12
    errors = "\n".join(result.to_dict()["error_counts"])
    for message in ("HTTP 503: queue full", "the connection was lost", "died"):
        assert message in errors
    assert "queue full" in result.table()


async def test_a_failed_warm_up_ends_the_run() -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n")

    async with RawServer(respond) as server:
        with pytest.raises(APIError, match=r"warm-up request failed.*HTTP 401"):
            await run_bench(config(server, num_warmups=1))
        assert len(server.exchanges) == 1


async def test_key_and_default_model_are_used() -> None:
    models = b'{"data":[{"id":"found"}]}'

    async def respond(exchange: Exchange) -> None:
        assert "authorization: bearer sk-1\r\n" in exchange.head.lower()
        if exchange.head.startswith("GET /v1/models "):
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
            await exchange.send(head % len(models), models)
        else:
            assert exchange.json["model"] == "found"
            await answer(exchange)

    async with RawServer(respond) as server:
        result = await run_bench(config(server, num_prompts=1, model=None, api_key="sk-1"))
    assert result.num_failed == 0, result.to_dict()["error_counts"]


def test_poisson_times_are_seeded_ascending_and_of_the_rate() -> None:
    def times(**settings: Any) -> list[float]:
        fixed = {"vocab_size": 1, "num_prompts": 4000, "request_rate": 50.0}
        return arrival_delays_s(BenchConfig(**{**fixed, **settings}))

    delays_s = times()
    assert delays_s == times()
    assert delays_s != times(seed=1)
    gaps_s = [later - earlier for earlier, later in pairwise(delays_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    # The mean of 3999 exponential gaps has a relative deviation of 1.6 %; so has their spread.
    assert mean_s == pytest.approx(1 / 50, rel=0.08)
    spread_s = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s))
    assert spread_s == pytest.approx(1 / 50, rel=0.12)
    assert times(request_rate=math.inf) == [0.0] * 4000


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    config = BenchConfig(num_prompts=4000, request_rate=50.0, burstiness=burstiness)
    gaps_s = [later - earlier for earlier, later in pairwise(arrival_delays_s(config))]
    mean_s = sum(gaps_s) / len(gaps_s)
    spread_s = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s))
    # A gamma distribution's deviation is its mean over the root of its shape. For shape 1/4 that is
    # twice the mean, known from 3999 gaps to 3 %; the deviation itself to 6 %.
    assert mean_s == pytest.approx(1 / 50, rel=0.1)
    assert spread_s == pytest.approx(mean_s / math.sqrt(burstiness), rel=0.2)


def test_a_shared_prefix_stands_before_every_prompt() -> None:
    config = BenchConfig(num_prompts=3, num_warmups=1, random_input_len=5, random_prefix_len=7)
    prompts = random_prompts(config, range(1000))
    assert [len(prompt) for prompt in prompts] == [12] * 4
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1
    assert len({tuple(prompt[7:]) for prompt in prompts}) == 4


def test_goodput_counts_requests_within_every_limit() -> None:
    records = (
        RequestRecord(0.0, 1.0, 0.2, num_output_tokens=5),  # 200 ms per token
        RequestRecord(0.0, 0.6, 0.2, num_output_tokens=5),  # 100 ms per token
        RequestRecord(0.0, 0.9, 0.5, num_output_tokens=5),  # too late
        RequestRecord(0.0, 0.2, 0.2, num_output_tokens=1),  # one token: nothing after the first
        RequestRecord(0.0, 0.1, error="no"),
    )

    def goodput(**limits: float) -> float | None:
        result = BenchResult(records=records, duration_s=2.0, client_cpu_s=0.0, goodput=limits)
        value: float | None = result.to_dict()["request_goodput"]
        return value

    assert goodput() is None
    assert goodput(ttft=200.0) == 1.5
    assert goodput(ttft=200.0, tpot=100.0) == 1.0
    assert goodput(e2el=900.0) == 1.5
    assert goodput(ttft=1.0) == 0.0
    result = BenchResult(records=records, duration_s=2.0, client_cpu_s=0.0, goodput={"ttft": 200.0})
    assert "Good requests/s (ttft 200 ms)" in result.table()


def test_details_are_one_entry_a_request() -> None:
    records = (
        RequestRecord(0.0, 1.0, 0.2, (0.1, 0.3), num_prompt_tokens=4, num_output_tokens=5),
        RequestRecord(0.0, 0.1, error="no"),
    )
    result = BenchResult(records=records, duration_s=2.0, client_cpu_s=0.0)
    assert result.details() == {
        "input_lens": [4, 0],
        "output_lens": [5, 0],
        "ttfts": [0.2, 0.0],
        "itls": [[0.1, 0.3], []],
        "errors": ["", "no"],
    }
    json.dumps(result.to_dict() | result.details(), allow_nan=False)


async def test_a_server_that_cannot_tokenize_needs_a_vocabulary_size() -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n")

    async with RawServer(respond) as server:
        with pytest.raises(APIError, match=r"/tokenize failed.*vocab_size"):
            await run_bench(config(server, vocab_size=None))


def test_statistics_of_a_known_run() -> None:
    records = (
        RequestRecord(10.0, 1.0, 0.2, (0.1, 0.3), num_prompt_tokens=4, num_output_tokens=5),
        RequestRecord(10.5, 2.0, 0.4, (), num_prompt_tokens=6, num_output_tokens=1),
        RequestRecord(10.0, 0.1, error="no"),
    )
    values = BenchResult(records=records, duration_s=2.5, client_cpu_s=0.1).to_dict()
    assert values["completed"] == 2
    assert values["request_throughput"] == pytest.approx(0.8)
    assert values["mean_ttft_ms"] == pytest.approx(300)
    assert values["std_ttft_ms"] == pytest.approx(100)
    assert values["p99_ttft_ms"] == pytest.approx(398)
    # One token has no time per output token after the first: it must not count as zero.
    assert values["mean_tpot_ms"] == pytest.approx(200)
    assert values["median_itl_ms"] == pytest.approx(200)
    assert values["median_e2el_ms"] == pytest.approx(1500)
    assert values["error_counts"] == {"no": 1}


def test_nothing_measured_is_null_not_zero() -> None:
    result = BenchResult(
        records=(RequestRecord(0.0, 1.0, error="no"),), duration_s=1.0, client_cpu_s=0.0
    )
    assert result.to_dict()["mean_ttft_ms"] is None
    assert LatencyStats.from_seconds([]) == LatencyStats(None, None, None, None)
    json.dumps(result.to_dict(), allow_nan=False)
    (row,) = (line for line in result.table().splitlines() if line.startswith("End-to-end"))
    assert row.split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize("q", [0, 1, 50, 75, 99, 100])
def test_percentile_is_numpys(q: float) -> None:
    numpy = pytest.importorskip("numpy")
    samples = [5.0, 1.0, 4.0, 4.0, 9.5, -2.0, 7.0]
    assert percentile(samples, q) == pytest.approx(float(numpy.percentile(samples, q)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (text_event("a") + usage_event(1, 1), r"before \[DONE\]"),
        (text_event("a") + DONE, "no usage"),
        (usage_event(1, 1) + DONE, "no choices"),
        (b"data: {oops\n\n" + DONE, "oops"),
        (b'data: {"choices":[{"index":0}]}\n\n' + DONE, "unexpected event"),
    ],
)
def test_incomplete_answers_are_failures(data: bytes, message: str) -> None:
    stream = RawStream(start_s=1.0, end_s=2.0, status=200, arrivals=[(1.5, data)])
    with pytest.raises(StreamError, match=message):
        read_record(stream)


def test_times_come_from_the_events_with_text() -> None:
    pieces = [text_event(""), text_event("a"), text_event("b"), text_event(""), usage_event(3, 4)]
    arrivals = [(1.0 + i, piece) for i, piece in enumerate([*pieces, DONE])]
    record = read_record(RawStream(0.5, 7.5, 200, arrivals))
    assert (record.ttft_s, record.itls_s, record.e2el_s) == (1.5, (1.0,), 7.0)
    assert record.tpot_s == pytest.approx(5.5 / 3)


def test_an_answer_without_any_text_is_timed_by_its_events() -> None:
    arrivals = [(1.0, text_event("")), (2.0, text_event("")), (3.0, usage_event(3, 2) + DONE)]
    record = read_record(RawStream(0.5, 3.5, 200, arrivals))
    assert (record.ttft_s, record.itls_s) == (0.5, (1.0,))


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 1000])
async def test_raw_stream_reads_any_framing_cut_anywhere(num_bytes: int) -> None:
    body = b"0\r\n\r\ndata: x\n\n" * 3
    by_chunks = CHUNKED_HEAD + b"".join(map(chunked, (body[:1], body[1:19], body[19:])))
    by_chunks = by_chunks.replace(b"12\r\n", b"12;name=value\r\n", 1) + b"0\r\n\r\n"
    by_length = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    for wire in (by_chunks, by_length, PLAIN_HEAD + body):

        async def respond(exchange: Exchange, wire: bytes = wire) -> None:
            await exchange.send(*(wire[i : i + num_bytes] for i in range(0, len(wire), num_bytes)))

        async with RawServer(respond) as server:
            stream = await post_stream(server.url + "/x", b"{}", {"A": "b"}, timeout_s=20)
        assert stream.status == 200
        assert b"".join(data for _, data in stream.arrivals) == body
        times_s = [stream.start_s, *(time_s for time_s, _ in stream.arrivals), stream.end_s]
        assert times_s == sorted(times_s)
        assert server.exchanges[0].head.startswith("POST /x HTTP/1.1\r\n")


async def test_raw_stream_failures_say_what_happened() -> None:
    async def garbage(exchange: Exchange) -> None:
        await exchange.send(b"SSH-2.0-nope\r\n\r\n")

    async def silence(exchange: Exchange) -> None:
        await asyncio.sleep(3600)

    async with RawServer(garbage) as server:
        with pytest.raises(APIError, match=r"not an HTTP/1\.1 answer"):
            await post_stream(server.url + "/x", b"{}", {}, timeout_s=20)
    with pytest.raises(APIConnectionError, match="failed"):
        await post_stream(server.url + "/x", b"{}", {}, timeout_s=20)
    async with RawServer(silence) as server:
        with pytest.raises(APITimeoutError, match=r"0\.1 s"):
            await post_stream(server.url + "/x", b"{}", {}, timeout_s=0.1)
        await asyncio.wait_for(server.client_left.wait(), 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"random_prefix_len": -1}, "random_prefix_len must be at least 0"),
        ({"burstiness": 0.0, "request_rate": 1.0}, "burstiness must be above 0"),
        ({"burstiness": 2.0}, "needs a request_rate"),
        ({"goodput": {"ttft": 0.0}}, "goodput ttft must be above 0"),
        ({"goodput": {"itl": 1.0}}, "goodput knows ttft, tpot, e2el"),
        ({"vocab_size": 9, "num_prompts": 0}, "num_prompts must be at least 1"),
        ({"vocab_size": 9, "max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"vocab_size": 9, "num_warmups": -1}, "num_warmups must be at least 0"),
        ({"vocab_size": 9, "request_rate": 0.0}, "request_rate must be above 0"),
        ({"vocab_size": 9, "request_rate": math.nan}, "request_rate must be above 0"),
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ([1],), "endpoint": "chat"}, "text prompts"),
        ({"vocab_size": 9, "endpoint": "responses"}, "endpoint must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchConfig(**settings)


def test_the_key_is_not_shown() -> None:
    assert "sk-1" not in repr(BenchConfig(vocab_size=9, api_key="sk-1"))
