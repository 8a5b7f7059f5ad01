"""Times one sample of a request for the metrics."""

import time
from collections.abc import Callable
from typing import Protocol

from prometheus_client import Histogram

from nsa_serve.request import FinishReason


class RequestMetrics(Protocol):
    """What a timer writes to (`nsa_serve.metrics.Metrics`)."""

    ttft_s: Histogram
    inter_token_latency_s: Histogram
    time_per_output_token_s: Histogram
    e2e_latency_s: Histogram
    queue_time_s: Histogram
    prefill_time_s: Histogram
    decode_time_s: Histogram
    inference_time_s: Histogram
    request_prompt_tokens: Histogram
    request_generation_tokens: Histogram
    request_max_tokens: Histogram
    request_computed_tokens: Histogram
    request_preemptions: Histogram
    request_n: Histogram
    request_max_generation_tokens: Histogram

    def on_first_token(self, num_prompt_tokens: int, num_cached_tokens: int) -> None: ...

    def add_generation_tokens(self, num_tokens: int) -> None: ...

    def on_finish(self, reason: FinishReason) -> None: ...


class SampleGroup:
    """The `n` samples of one prompt, of which vLLM observes some facts together."""

    __slots__ = ("_metrics", "_most_tokens", "_n", "_num_open")

    def __init__(self, metrics: RequestMetrics, n: int) -> None:
        self._metrics = metrics
        self._n = n
        self._num_open = n
        self._most_tokens = 0

    def on_finish(self, num_output_tokens: int) -> None:
        """Take note of a sample's end; the last one observes."""
        self._num_open -= 1
        self._most_tokens = max(self._most_tokens, num_output_tokens)
        if self._num_open == 0:
            self._metrics.request_n.observe(self._n)
            self._metrics.request_max_generation_tokens.observe(self._most_tokens)


class RequestTimer:
    """Times one sample from arrival to its end. `clock` returns seconds and never goes back."""

    __slots__ = (
        "_arrival_s",
        "_clock",
        "_first_token_s",
        "_group",
        "_last_token_s",
        "_max_tokens",
        "_metrics",
        "_num_cached_tokens",
        "_num_output_tokens",
        "_num_preemptions",
        "_num_prompt_tokens",
        "_queued_s",
        "is_finished",
    )

    def __init__(
        self,
        metrics: RequestMetrics,
        num_prompt_tokens: int,
        max_tokens: int | None,
        *,
        group: SampleGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._group = group or SampleGroup(metrics, 1)
        self._clock = clock
        self._arrival_s = clock()
        self._first_token_s = 0.0
        self._last_token_s = 0.0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._num_preemptions = 0
        self._queued_s = 0.0
        self.is_finished = False

    def on_tokens(
        self,
        num_tokens: int,
        *,
        queued_s: float = 0.0,
        num_cached_tokens: int = 0,
        num_preemptions: int = 0,
    ) -> None:
        """Observe `num_tokens` new tokens that arrive now; queued_s comes with the first.

        num_cached_tokens: prompt tokens that the prefix cache had. num_preemptions: so far.
        Tokens that arrive together share the time since the last one equally; those that come
        with the first token were 0 s apart. So the count of intervals is always T - 1.
        """
        self._queued_s = max(self._queued_s, queued_s)
        self._num_preemptions = max(self._num_preemptions, num_preemptions)
        if num_tokens == 0:
            return
        now = self._clock()
        metrics = self._metrics
        num_gaps, gap_s = num_tokens, 0.0
        if self._num_output_tokens == 0:
            self._first_token_s = now
            self._num_cached_tokens = min(num_cached_tokens, self._num_prompt_tokens)
            metrics.ttft_s.observe(now - self._arrival_s)
            metrics.on_first_token(self._num_prompt_tokens, self._num_cached_tokens)
            num_gaps -= 1
        else:
            gap_s = (now - self._last_token_s) / num_tokens
        for _ in range(num_gaps):
            metrics.inter_token_latency_s.observe(gap_s)
        metrics.add_generation_tokens(num_tokens)
        self._num_output_tokens += num_tokens
        self._last_token_s = now

    def finish(self, reason: FinishReason) -> None:
        """Observe the end. A second call is ignored: a close after the last output is no abort."""
        if self.is_finished:
            return
        self.is_finished = True
        metrics = self._metrics
        metrics.on_finish(reason)
        metrics.request_prompt_tokens.observe(self._num_prompt_tokens)
        metrics.request_generation_tokens.observe(self._num_output_tokens)
        metrics.request_preemptions.observe(self._num_preemptions)
        self._group.on_finish(self._num_output_tokens)
        if self._max_tokens is not None:
            metrics.request_max_tokens.observe(self._max_tokens)
        if reason not in (FinishReason.ABORT, FinishReason.ERROR):
            self._observe_times()

    def _observe_times(self) -> None:
        metrics = self._metrics
        metrics.request_computed_tokens.observe(self._num_prompt_tokens - self._num_cached_tokens)
        e2e_s = self._clock() - self._arrival_s
        metrics.e2e_latency_s.observe(e2e_s)
        metrics.queue_time_s.observe(self._queued_s)
        if self._num_output_tokens == 0:
            metrics.prefill_time_s.observe(max(0.0, e2e_s - self._queued_s))
            metrics.inference_time_s.observe(max(0.0, e2e_s - self._queued_s))
            return
        ttft_s = self._first_token_s - self._arrival_s
        decode_s = self._last_token_s - self._first_token_s
        prefill_s = max(0.0, ttft_s - self._queued_s)
        metrics.prefill_time_s.observe(prefill_s)
        metrics.decode_time_s.observe(decode_s)
        metrics.inference_time_s.observe(prefill_s + decode_s)
        if self._num_output_tokens > 1:
            metrics.time_per_output_token_s.observe(decode_s / (self._num_output_tokens - 1))
