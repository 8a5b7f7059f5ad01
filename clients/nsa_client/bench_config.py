"""What a benchmark sends: settings, prompts, arrival times, request bodies. No I/O."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nsa_client.bench_stats import METRICS
from nsa_client.core import DEFAULT_BASE_URL

BenchPrompt = str | Sequence[int]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

_AT_LEAST_ONE = ("num_prompts", "max_concurrency", "random_input_len", "output_len", "vocab_size")
_AT_LEAST_ZERO = ("num_warmups", "random_prefix_len")
_ABOVE_ZERO = ("request_rate", "burstiness", "timeout_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to send, and how fast.

    prompts: texts or token ids, used in turn; None makes random ones of `random_input_len` token
    ids below `vocab_size`, or, without it, of ids that the server's tokenizer gives to letters;
    before them stand `random_prefix_len` ids that all prompts share. Random chat messages are the
    text of such ids, so their length is approximate.
    output_len: tokens asked for; with ignore_eos exactly so many come. max_concurrency: requests in
    flight at most; None is no limit. request_rate: requests per second at random times; inf sends
    as fast as the concurrency allows. burstiness: shape of the gamma distribution of the gaps; 1 is
    Poisson, less comes in bursts, more is even. num_warmups: requests before the clock starts, one
    after the other. goodput: metric ("ttft", "tpot", "e2el") to the most milliseconds of a good
    request. extra_body: more fields of the request.
    """

    base_url: str = DEFAULT_BASE_URL
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    num_prompts: int = 100
    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    prompts: tuple[BenchPrompt, ...] | None = None
    random_input_len: int = 128
    random_prefix_len: int = 0
    vocab_size: int | None = None
    output_len: int = 128
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    num_warmups: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)
    timeout_s: float = 600.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for names, low in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < low:
                    raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.endpoint not in PATHS:
            raise ValueError(f"endpoint must be one of {', '.join(PATHS)}, got {self.endpoint!r}")
        if self.burstiness != 1.0 and math.isinf(self.request_rate):
            raise ValueError(f"burstiness {self.burstiness} needs a request_rate")
        self._check_prompts()
        self._check_goodput()

    def _check_prompts(self) -> None:
        if self.prompts is None:
            return
        if not self.prompts:
            raise ValueError("prompts is empty")
        if self.endpoint == "chat" and not all(isinstance(p, str) for p in self.prompts):
            raise ValueError("the chat endpoint takes text prompts, not token ids")

    def _check_goodput(self) -> None:
        known = [metric for metric in METRICS if metric != "itl"]
        for metric, limit_ms in self.goodput.items():
            if metric not in known:
                raise ValueError(f"goodput knows {', '.join(known)}, got {metric!r}")
            if not limit_ms > 0:
                raise ValueError(f"goodput {metric} must be above 0 ms, got {limit_ms}")


def random_prompts(config: BenchConfig, ids: Sequence[int]) -> list[list[int]]:
    """Return the warm-up prompts, then the measured ones, of token ids taken from `ids`."""
    rng = random.Random(config.seed)
    prefix = rng.choices(ids, k=config.random_prefix_len)
    count = config.num_warmups + config.num_prompts
    return [prefix + rng.choices(ids, k=config.random_input_len) for _ in range(count)]


def arrival_delays_s(config: BenchConfig) -> list[float]:
    """Return when each request is sent, in seconds from the start."""
    if math.isinf(config.request_rate):
        return [0.0] * config.num_prompts
    rng = random.Random(config.seed + 1)
    scale_s = 1 / (config.request_rate * config.burstiness)
    delays_s = [0.0]
    while len(delays_s) < config.num_prompts:
        delays_s.append(delays_s[-1] + rng.gammavariate(config.burstiness, scale_s))
    return delays_s


def request_json(config: BenchConfig, model: str, prompt: BenchPrompt) -> bytes:
    """Return the body of one request."""
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
