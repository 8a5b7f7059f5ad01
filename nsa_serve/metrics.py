"""Prometheus metrics of one served model: vLLM's names, labels and buckets under `nsa_serve:`.

How the engine side uses it:

    timer = metrics.start_request(num_prompt_tokens, max_tokens=params.max_tokens)   # one a sample
    timer.on_tokens(len(output.token_ids), queued_s=output.queued_s)                 # each output
    timer.finish(output.finish_reason)           # or timer.finish(FinishReason.ABORT) on a close
    metrics.on_stats(step_outputs.stats)         # each StepOutputs, after its outputs

iteration_tokens_total counts as vLLM does: prompt tokens run and tokens generated, per step. A
decode row runs one token and generates one, so a step counts the tokens that it ran and one more
for each first token that it generated; a request that was preempted runs its tokens again.

After R serial requests of P prompt and T output tokens: time_to_first_token count = R,
inter_token_latency count = R * (T - 1), prompt_tokens_total = R * P,
generation_tokens_total = R * T, iteration_tokens_total count = R * T (unchunked prompts) and
sum = R * (P + T) (less the prefix hits, which are not run).
"""

import time
from collections.abc import Callable
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nsa_serve.messages import EngineInfo, EngineStats
from nsa_serve.request import FinishReason

RejectReason = Literal["queue_full", "shutting_down", "engine_dead"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
# vLLM starts at 10 ms, which is too coarse for small models: four bounds below it are ours.
TOKEN_LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.004, 0.006),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_LATENCY_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
TOKEN_COUNT_BUCKETS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_LABELS = ("model_name", "engine")


class Metrics:
    """All counters, gauges and histograms of one model, on a registry of their own.

    model_name: value of the label; one name, whatever alias a request used, so that clients cannot
    create series. registry: where to register; default: a new one with the process metrics.
    """

    def __init__(self, model_name: str, *, registry: CollectorRegistry | None = None) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        self.registry = registry
        self._label_values = (model_name, "0")
        self._last_stats = EngineStats()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_first_tokens = 0  # since the last on_stats
        self._create_gauges_and_counters()
        self._create_histograms()

    def _create_gauges_and_counters(self) -> None:
        self.num_running = self._gauge("num_requests_running", "Requests in the running batch.")
        self.num_waiting = self._gauge("num_requests_waiting", "Requests that wait to run.")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Used share of the pages, 0 to 1.")
        self.prefix_cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_cache_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self.num_preemptions = self._counter("num_preemptions", "Requests preempted.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._request_success = self._family(
            "request_success", "Requests ended, by reason.", "finished_reason"
        )
        self._rejections = self._family(
            "admission_rejections", "Requests refused before they were queued.", "reason"
        )
        # Create every series now, so that rates work from the first request on.
        for finish_reason in FinishReason:
            self._request_success.labels(*self._label_values, finish_reason.value)
        for reason in ("queue_full", "shutting_down", "engine_dead"):
            self._rejections.labels(*self._label_values, reason)

    def _create_histograms(self) -> None:
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S
        )
        self.inter_token_latency_s = self._histogram(
            "inter_token_latency_seconds", "Time between tokens.", TOKEN_LATENCY_BUCKETS_S
        )
        self.time_per_output_token_s = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between tokens of a request.",
            TOKEN_LATENCY_BUCKETS_S,
        )
        self.e2e_latency_s = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", REQUEST_LATENCY_BUCKETS_S
        )
        self._create_phase_histograms()
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated by a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total",
            "Prompt tokens run and tokens generated by one engine step.",
            STEP_TOKEN_BUCKETS,
        )

    def _create_phase_histograms(self) -> None:
        buckets = REQUEST_LATENCY_BUCKETS_S
        self.queue_time_s = self._histogram(
            "request_queue_time_seconds", "Arrival in the engine to the first row.", buckets
        )
        self.prefill_time_s = self._histogram(
            "request_prefill_time_seconds", "End of the queue time to first token.", buckets
        )
        self.decode_time_s = self._histogram(
            "request_decode_time_seconds", "First to last token.", buckets
        )
        self.inference_time_s = self._histogram(
            "request_inference_time_seconds", "End of the queue time to last token.", buckets
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        family = Gauge(f"nsa_serve:{name}", text, _LABELS, registry=self.registry)
        return family.labels(*self._label_values)

    def _counter(self, name: str, text: str) -> Counter:
        return self._family(name, text).labels(*self._label_values)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"nsa_serve:{name}", text, _LABELS, registry=self.registry, buckets=buckets
        )
        return family.labels(*self._label_values)

    def _family(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nsa_serve:{name}", text, (*_LABELS, *labels), registry=self.registry)

    def on_engine_ready(self, info: EngineInfo) -> None:
        """Publish the cache's geometry as `cache_config_info` (1, with the facts as labels)."""
        labels = {
            "block_size": str(info.page_size),
            "num_gpu_blocks": str(info.num_pages),
            "page_size": str(info.page_size),
            "num_pages": str(info.num_pages),
            "max_model_len": str(info.max_model_len),
            "dtype": info.dtype,
        }
        Gauge(
            "nsa_serve:cache_config_info",
            "Geometry of the KV cache; block_size and num_gpu_blocks repeat vLLM's label names.",
            (*_LABELS, *labels),
            registry=self.registry,
        ).labels(*self._label_values, *labels.values()).set(1)

    def on_stats(self, stats: EngineStats) -> None:
        """Take over the engine's counters and gauges, once a step's tokens are counted."""
        last = self._last_stats
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        if stats.num_pages:
            self.kv_cache_usage.set(1.0 - stats.num_free_pages / stats.num_pages)
        if stats.num_preemptions_total > last.num_preemptions_total:
            self.num_preemptions.inc(stats.num_preemptions_total - last.num_preemptions_total)
        if stats.prefix_cache_queries_total > last.prefix_cache_queries_total:
            self.prefix_cache_queries.inc(
                stats.prefix_cache_queries_total - last.prefix_cache_queries_total
            )
        if stats.prefix_cache_hits_total > last.prefix_cache_hits_total:
            self.prefix_cache_hits.inc(stats.prefix_cache_hits_total - last.prefix_cache_hits_total)
        # A heartbeat repeats the counters of the last step, which was observed already.
        if stats.num_steps_total > last.num_steps_total and stats.num_step_tokens:
            self.iteration_tokens.observe(stats.num_step_tokens + self._num_first_tokens)
        self._num_first_tokens = 0
        self._last_stats = stats

    def start_request(
        self, num_prompt_tokens: int, *, max_tokens: int | None = None
    ) -> "RequestTimer":
        """Return the timer of one sample that arrives now; `n` samples are `n` timers."""
        return RequestTimer(self, num_prompt_tokens, max_tokens)

    def on_finish(self, reason: FinishReason) -> None:
        """Count a request that ended (RequestTimer.finish calls this)."""
        self._request_success.labels(*self._label_values, reason.value).inc()

    def on_rejected(self, reason: RejectReason) -> None:
        """Count a request that was refused before it was queued."""
        self._rejections.labels(*self._label_values, reason).inc()

    def token_totals(self) -> tuple[int, int]:
        """Return (prompt tokens, generated tokens) so far."""
        return self._num_prompt_tokens, self._num_generation_tokens

    def on_first_token(self, num_prompt_tokens: int) -> None:
        """Count a prompt that was processed, and with it a first token."""
        self._num_first_tokens += 1
        self._num_prompt_tokens += num_prompt_tokens
        self.prompt_tokens.inc(num_prompt_tokens)

    def add_generation_tokens(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        self._num_generation_tokens += num_tokens
        self.generation_tokens.inc(num_tokens)

    def render(self) -> bytes:
        """Return the text exposition (content type: CONTENT_TYPE)."""
        return generate_latest(self.registry)


class RequestTimer:
    """Times one sample from arrival to its end. `clock` returns seconds and never goes back."""

    __slots__ = (
        "_arrival_s",
        "_clock",
        "_first_token_s",
        "_last_token_s",
        "_max_tokens",
        "_metrics",
        "_num_output_tokens",
        "_num_prompt_tokens",
        "_queued_s",
        "is_finished",
    )

    def __init__(
        self,
        metrics: Metrics,
        num_prompt_tokens: int,
        max_tokens: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._clock = clock
        self._arrival_s = clock()
        self._first_token_s = 0.0
        self._last_token_s = 0.0
        self._num_output_tokens = 0
        self._queued_s = 0.0
        self.is_finished = False

    def on_tokens(self, num_tokens: int, *, queued_s: float = 0.0) -> None:
        """Observe `num_tokens` new tokens that arrive now; queued_s comes with the first.

        Tokens that arrive together share the time since the last one equally; those that come
        with the first token were 0 s apart. So the count of intervals is always T - 1.
        """
        self._queued_s = max(self._queued_s, queued_s)
        if num_tokens == 0:
            return
        now = self._clock()
        metrics = self._metrics
        num_gaps, gap_s = num_tokens, 0.0
        if self._num_output_tokens == 0:
            self._first_token_s = now
            metrics.ttft_s.observe(now - self._arrival_s)
            metrics.on_first_token(self._num_prompt_tokens)
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
        if self._max_tokens is not None:
            metrics.request_max_tokens.observe(self._max_tokens)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return
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
