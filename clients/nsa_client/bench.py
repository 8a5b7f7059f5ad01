"""Load generator: many streamed requests, at a concurrency or at a rate; latencies and throughput.

result = await run_bench(BenchConfig(num_prompts=64, max_concurrency=16, vocab_size=49152))
print(result.table())
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from nsa_client.async_client import AsyncClient
from nsa_client.bench_stats import BenchResult, RequestRecord
from nsa_client.core import DEFAULT_BASE_URL, first_model
from nsa_client.errors import MAX_ECHOED_CHARS, APIError, StreamError, error_fields
from nsa_client.raw_stream import RawStream, post_stream
from nsa_client.sse import SSEDecoder

BenchPrompt = str | Sequence[int]
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to send, and how fast.

    prompts: texts or token ids, used in turn; None makes random ones of `random_input_len` token
    ids below `vocab_size`. output_len: tokens asked for; with ignore_eos exactly so many come.
    max_concurrency: requests in flight at most; None is no limit. request_rate: requests per second
    at random (Poisson) times; inf sends as fast as the concurrency allows. num_warmups: requests
    before the clock starts, one after the other. extra_body: more fields of the request.
    """

    base_url: str = DEFAULT_BASE_URL
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    num_prompts: int = 100
    max_concurrency: int | None = None
    request_rate: float = math.inf
    prompts: tuple[BenchPrompt, ...] | None = None
    random_input_len: int = 128
    vocab_size: int | None = None
    output_len: int = 128
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    num_warmups: int = 0
    timeout_s: float = 600.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_concurrency", "random_input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_warmups < 0:
            raise ValueError(f"num_warmups must be at least 0, got {self.num_warmups}")
        for name in ("request_rate", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.endpoint not in _PATHS:
            raise ValueError(f"endpoint must be one of {', '.join(_PATHS)}, got {self.endpoint!r}")
        self._check_prompts()

    def _check_prompts(self) -> None:
        if self.prompts is None:
            if self.vocab_size is None or self.vocab_size < 1:
                raise ValueError(
                    "random prompts need vocab_size, the number of token ids of the model "
                    f"(got {self.vocab_size}); or give prompts"
                )
        elif not self.prompts:
            raise ValueError("prompts is empty")
        if self.endpoint == "chat" and not all(isinstance(p, str) for p in self.prompts or ((),)):
            raise ValueError("the chat endpoint takes text prompts, not token ids; give prompts")


async def run_bench(config: BenchConfig) -> BenchResult:
    """Send the requests and measure. A failed request is counted, it does not end the run.

    Raises APIError when no model is named and the server cannot be asked for one, or when a
    warm-up request fails.
    """
    async with AsyncClient(config.base_url, config.api_key) as client:
        url = client.base_url + _PATHS[config.endpoint]
        model = config.model or first_model(await client.models(), client.base_url)
    bodies = [_body(config, model, prompt) for prompt in _prompts(config)]
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
            return await send(body)

    arrivals = zip(bodies[config.num_warmups :], _arrival_delays_s(config), strict=True)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(arrive(body, delay_s)) for body, delay_s in arrivals]
    records = tuple(task.result() for task in tasks)
    end_s = max(record.start_s + record.e2el_s for record in records)
    return BenchResult(
        records=records,
        duration_s=end_s - min(record.start_s for record in records),
        client_cpu_s=time.process_time() - cpu_start_s,
    )


def _prompts(config: BenchConfig) -> list[BenchPrompt]:
    """Return the warm-up prompts, then the measured ones."""
    count = config.num_warmups + config.num_prompts
    if config.prompts is not None:
        return [config.prompts[i % len(config.prompts)] for i in range(count)]
    assert config.vocab_size is not None
    rng = random.Random(config.seed)
    ids = range(config.vocab_size)
    return [rng.choices(ids, k=config.random_input_len) for _ in range(count)]


def _arrival_delays_s(config: BenchConfig) -> list[float]:
    if math.isinf(config.request_rate):
        return [0.0] * config.num_prompts
    rng = random.Random(config.seed + 1)
    delays_s = [0.0]
    while len(delays_s) < config.num_prompts:
        delays_s.append(delays_s[-1] + rng.expovariate(config.request_rate))
    return delays_s


def _body(config: BenchConfig, model: str, prompt: BenchPrompt) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": config.output_len,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if config.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": config.output_len}
    return json.dumps(body | dict(config.extra_body), allow_nan=False).encode()


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
