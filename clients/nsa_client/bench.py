"""Load generator: many streamed requests, at a concurrency or at a rate; latencies and throughput.

result = await run_bench(BenchConfig(num_prompts=64, max_concurrency=16))
print(result.table())
"""

import asyncio
import json
import string
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nsa_client.async_client import AsyncClient
from nsa_client.bench_config import (
    PATHS,
    BenchConfig,
    BenchPrompt,
    arrival_delays_s,
    random_prompts,
    request_json,
)
from nsa_client.bench_stats import BenchResult, RequestRecord
from nsa_client.core import first_model
from nsa_client.errors import MAX_ECHOED_CHARS, APIError, StreamError, error_fields
from nsa_client.raw_stream import RawStream, post_stream
from nsa_client.sse import SSEDecoder

__all__ = ["BenchConfig", "BenchPrompt", "BenchResult", "RequestRecord", "read_record", "run_bench"]


async def run_bench(
    config: BenchConfig, *, on_record: Callable[[RequestRecord], None] | None = None
) -> BenchResult:
    """Send the requests and measure. A failed request is counted, it does not end the run.

    on_record: called with each measured request as it ends. Raises APIError when the server cannot
    be asked for what the settings leave open, or when a warm-up request fails.
    """
    async with AsyncClient(config.base_url, config.api_key, model=config.model) as client:
        url = client.base_url + PATHS[config.endpoint]
        model = config.model or first_model(await client.models(), client.base_url)
        prompts = await _prompts(config, client)
    bodies = [request_json(config, model, prompt) for prompt in prompts]
    headers = {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}

    async def send(body: bytes) -> RequestRecord:
        return await _measure(url, body, headers, timeout_s=config.timeout_s)

    for body in bodies[: config.num_warmups]:
        record = await send(body)
        if record.error is not None:
            raise APIError(f"a warm-up request failed: {record.error}")

    cpu_start_s = time.process_time()
    start_s = time.perf_counter()
    slots = asyncio.Semaphore(config.max_concurrency or config.num_prompts)

    async def arrive(body: bytes, delay_s: float) -> RequestRecord:
        await asyncio.sleep(start_s + delay_s - time.perf_counter())
        async with slots:
            record = await send(body)
        if on_record is not None:
            on_record(record)
        return record

    arrivals = zip(bodies[config.num_warmups :], arrival_delays_s(config), strict=True)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(arrive(body, delay_s)) for body, delay_s in arrivals]
    records = tuple(task.result() for task in tasks)
    end_s = max(record.start_s + record.e2el_s for record in records)
    return BenchResult(
        records=records,
        duration_s=end_s - min(record.start_s for record in records),
        client_cpu_s=time.process_time() - cpu_start_s,
        model=model,
        goodput=config.goodput,
    )


async def _prompts(config: BenchConfig, client: AsyncClient) -> Sequence[BenchPrompt]:
    """Return the warm-up prompts, then the measured ones."""
    if config.prompts is not None:
        count = config.num_warmups + config.num_prompts
        return [config.prompts[i % len(config.prompts)] for i in range(count)]
    if config.vocab_size is None:
        ids: Sequence[int] = await _letter_token_ids(client)
    else:
        ids = range(config.vocab_size)
    prompts = random_prompts(config, ids)
    if config.endpoint == "completions":
        return prompts
    return [await client.detokenize(prompt) for prompt in prompts]


async def _letter_token_ids(client: AsyncClient) -> list[int]:
    """Return the ids that the server's tokenizer gives to all pairs of letters."""
    letters = string.ascii_lowercase
    text = " ".join(first + second for first in letters for second in letters)
    try:
        result = await client.tokenize(text, add_special_tokens=False)
    except APIError as error:
        raise APIError(
            f"random prompts need token ids, and the server's /tokenize failed ({error.message}); "
            "name the size of the vocabulary (vocab_size), or give prompts"
        ) from error
    return sorted(set(result.token_ids))


async def _measure(
    url: str, body: bytes, headers: dict[str, str], *, timeout_s: float
) -> RequestRecord:
    start_s = time.perf_counter()
    try:
        stream = await post_stream(url, body, headers, timeout_s=timeout_s)
        return read_record(stream)
    except APIError as error:
        e2el_s = time.perf_counter() - start_s
        return RequestRecord(start_s, e2el_s, error=f"{type(error).__name__}: {error.message}")


def read_record(stream: RawStream) -> RequestRecord:
    """Turn a recorded answer into numbers. Raises StreamError when it is not a whole one."""
    if stream.status != 200:
        raise _status_error(stream)
    decoder = SSEDecoder()
    choice_times_s = []
    text_times_s = []
    usage = None
    is_done = False
    for time_s, data in stream.arrivals:
        for event in decoder.feed(data):
            if event.data == "[DONE]":
                is_done = True
                continue
            try:
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise StreamError(**error_fields(chunk))
                usage = chunk.get("usage") or usage
                if chunk["choices"]:
                    choice_times_s.append(time_s)
                if any(_has_text(choice) for choice in chunk["choices"]):
                    text_times_s.append(time_s)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise StreamError(f"unexpected event {event.data[:MAX_ECHOED_CHARS]}") from error
    if not is_done:
        raise StreamError("the stream ended before [DONE]")
    if usage is None or not choice_times_s:
        raise StreamError(f"the stream had no {'usage' if usage is None else 'choices'}")
    # An answer of special tokens alone has no text: then every event with a choice counts.
    times_s = text_times_s or choice_times_s
    return RequestRecord(
        stream.start_s,
        stream.end_s - stream.start_s,
        ttft_s=times_s[0] - stream.start_s,
        itls_s=tuple(later_s - earlier_s for earlier_s, later_s in pairwise(times_s)),
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage["completion_tokens"],
    )


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Tell whether a choice brings text; the role that opens a chat and the last event do not."""
    return bool(choice["text"] if "text" in choice else choice["delta"].get("content"))


def _status_error(stream: RawStream) -> StreamError:
    text = b"".join(data for _, data in stream.arrivals).decode("utf-8", "replace")
    try:
        message = error_fields(json.loads(text))["message"]
    except ValueError:
        message = text[:MAX_ECHOED_CHARS]
    return StreamError(f"HTTP {stream.status}: {message}", status=stream.status)
