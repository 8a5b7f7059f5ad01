"""What a serving benchmark sends and what it makes of the answers. No I/O."""

import math
import random
from collections.abc import Sequence
from typing import Any

from gpu_common import make_prompt, percentile

from nsa_client.bench_stats import BenchResult, RequestRecord


def log_uniform_lengths(count: int, low: int, high: int, *, seed: str) -> list[int]:
    """Return prompt lengths of low to high tokens: each octave is as likely as any other."""
    rng = random.Random(seed)
    span = math.log(high / low)
    return [min(high, max(low, round(low * math.exp(rng.random() * span)))) for _ in range(count)]


def make_prompts(
    count: int, low: int, high: int, *, vocab_size: int, seed: str
) -> tuple[list[int], ...]:
    """Return random prompts of log-uniform lengths that share no prefix."""
    lengths = log_uniform_lengths(count, low, high, seed=seed)
    return tuple(
        make_prompt(row, length, vocab_size, seed=seed) for row, length in enumerate(lengths)
    )


def is_good(record: RequestRecord, *, ttft_s: float, itl_s: float) -> bool:
    """Tell whether a request had its first token, and on average each later one, in time."""
    if record.error is not None or record.ttft_s > ttft_s:
        return False
    return (record.tpot_s or 0.0) <= itl_s


def summarize(result: BenchResult, *, ttft_s: float, itl_s: float) -> dict[str, Any]:
    """Return the figures of one run; latencies in milliseconds, None where there are none."""
    num_good = sum(is_good(record, ttft_s=ttft_s, itl_s=itl_s) for record in result.records)
    figures: dict[str, Any] = {
        "num_requests": len(result.records),
        "num_failed": result.num_failed,
        "duration_s": result.duration_s,
        "requests_per_s": len(result.completed) / result.duration_s,
        "good_requests_per_s": num_good / result.duration_s,
        "good_share": num_good / len(result.records),
        "output_tokens_per_s": result.num_output_tokens / result.duration_s,
        "total_tokens_per_s": (result.num_output_tokens + result.num_prompt_tokens)
        / result.duration_s,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_output_tokens": result.num_output_tokens,
        "client_cpu_share": result.client_cpu_s / result.duration_s,
        "errors": sorted({record.error for record in result.records if record.error is not None}),
    }
    for metric in ("ttft", "itl", "tpot", "e2el"):
        samples = [sample * 1e3 for sample in result.samples_s(metric)]
        for q in (50, 90, 99):
            figures[f"{metric}_p{q}_ms"] = percentile(samples, q)
    return figures


def common_prefix_len(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def compare_outputs(
    together: Sequence[Sequence[int]], alone: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare token ids request by request.

    equal_requests: share of requests that are equal to their end; equal_tokens: share of the tokens
    that stand before their request's first difference; num_distinct: different tokens in all, for a
    model that repeats a few is easily equal.
    """
    pairs = list(zip(together, alone, strict=True))
    num_tokens = sum(max(len(a), len(b)) for a, b in pairs)
    num_equal = sum(list(a) == list(b) for a, b in pairs)
    before = sum(common_prefix_len(a, b) for a, b in pairs)
    return {
        "num_requests": len(pairs),
        "num_tokens": num_tokens,
        "num_distinct": len({token for row in alone for token in row}),
        "equal_requests": num_equal / len(pairs) if pairs else 1.0,
        "equal_tokens": before / num_tokens if num_tokens else 1.0,
    }
