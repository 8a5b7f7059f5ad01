"""Prometheus metrics of one served model: vLLM's names, labels and buckets under `nsa_serve:`.

What vLLM has too is also rendered under `vllm:`. How the engine side uses it:

    group = metrics.start_group(n)                                                # the n samples
    timer = metrics.start_request(num_prompt_tokens, max_tokens=..., group=group)  # one a sample
    timer.on_tokens(len(output.token_ids), queued_s=output.queued_s)              # each output
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

from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nsa_serve.messages import EngineInfo, EngineStats
from nsa_serve.metric_families import (
    PREEMPTION_COUNT_BUCKETS,
    REQUEST_LATENCY_BUCKETS_S,
    SAMPLE_COUNT_BUCKETS,
    STEP_TOKEN_BUCKETS,
    TOKEN_COUNT_BUCKETS,
    TOKEN_LATENCY_BUCKETS_S,
    TTFT_BUCKETS_S,
    Families,
)
from nsa_serve.read_metrics import ReadMetrics
from nsa_serve.request import FinishReason
from nsa_serve.request_timer import RequestTimer, SampleGroup

RejectReason = Literal["queue_full", "shutting_down", "engine_dead"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All counters, gauges and histograms of one model, on a registry of their own.

    model_name: value of the label; one name, whatever alias a request used, so that clients cannot
    create series. registry: where to register; default: a new one with the process metrics.
    has_vllm_names: render what vLLM has too also under `vllm:`.
    """

    def __init__(
        self,
        model_name: str,
        *,
        registry: CollectorRegistry | None = None,
        has_vllm_names: bool = True,
    ) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        self.registry = registry
        self._families = Families(registry, model_name, has_vllm_names=has_vllm_names)
        self._last_stats = EngineStats()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_first_tokens = 0  # since the last on_stats
        self._graph_replays: Counter | None = None
        self._create_gauges()
        self._create_counters()
        self._create_latencies()
        self._create_sizes()
        self._reads = ReadMetrics(self._families)

    def _create_gauges(self) -> None:
        new = self._families
        self.num_running = new.gauge(
            "num_requests_running", "Requests in the running batch.", is_vllm=True
        )
        self.num_waiting = new.gauge(
            "num_requests_waiting", "Requests that wait to run.", is_vllm=True
        )
        # vLLM's other reason, deferred, does not exist here: nothing else holds a request back.
        self._waiting_for_capacity = new.gauge_family(
            "num_requests_waiting_by_reason",
            "Requests that wait to run, by what they wait for.",
            "reason",
            is_vllm=True,
        ).labels(*new.label_values, "capacity")
        self.kv_cache_usage = new.gauge(
            "kv_cache_usage_perc", "Used share of the pages, 0 to 1.", is_vllm=True
        )
        self._swa_cache_usage: Gauge | None = None
        self.ready = new.gauge("ready", "1 when new requests are taken, else 0.")

    def _create_counters(self) -> None:
        new = self._families
        self.prefix_cache_queries = new.counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", is_vllm=True
        )
        self.prefix_cache_hits = new.counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", is_vllm=True
        )
        self.num_preemptions = new.counter("num_preemptions", "Requests preempted.", is_vllm=True)
        self.prompt_tokens = new.counter("prompt_tokens", "Prompt tokens processed.", is_vllm=True)
        self.prompt_tokens_cached = new.counter(
            "prompt_tokens_cached", "Prompt tokens taken from the prefix cache.", is_vllm=True
        )
        by_source = new.counter_family(
            "prompt_tokens_by_source", "Prompt tokens, by where from.", "source", is_vllm=True
        )
        self._computed_tokens = by_source.labels(*new.label_values, "local_compute")
        self._hit_tokens = by_source.labels(*new.label_values, "local_cache_hit")
        self.generation_tokens = new.counter("generation_tokens", "Tokens generated.", is_vllm=True)
        self._request_success = new.counter_family(
            "request_success", "Requests ended, by reason.", "finished_reason", is_vllm=True
        )
        self._rejections = new.counter_family(
            "admission_rejections",
            "Requests refused before they were queued.",
            "reason",
            is_vllm=True,
        )
        # Create every series now, so that rates work from the first request on.
        for finish_reason in FinishReason:
            self._request_success.labels(*new.label_values, finish_reason.value)
        for reason in ("queue_full", "shutting_down", "engine_dead"):
            self._rejections.labels(*new.label_values, reason)

    def _create_latencies(self) -> None:
        new = self._families.histogram
        buckets = REQUEST_LATENCY_BUCKETS_S
        self.ttft_s = new("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S)
        self.inter_token_latency_s = new(
            "inter_token_latency_seconds", "Time between tokens.", TOKEN_LATENCY_BUCKETS_S
        )
        self.time_per_output_token_s = new(
            "request_time_per_output_token_seconds",
            "Mean time between tokens of a request.",
            TOKEN_LATENCY_BUCKETS_S,
        )
        self.e2e_latency_s = new("e2e_request_latency_seconds", "Arrival to last token.", buckets)
        self.queue_time_s = new(
            "request_queue_time_seconds", "Arrival in the engine to the first row.", buckets
        )
        self.prefill_time_s = new(
            "request_prefill_time_seconds", "End of the queue time to first token.", buckets
        )
        self.decode_time_s = new("request_decode_time_seconds", "First to last token.", buckets)
        self.inference_time_s = new(
            "request_inference_time_seconds", "End of the queue time to last token.", buckets
        )

    def _create_sizes(self) -> None:
        new = self._families.histogram
        self.request_prompt_tokens = new(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_generation_tokens = new(
            "request_generation_tokens", "Tokens generated by a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_max_generation_tokens = new(
            "request_max_num_generation_tokens",
            "Tokens of the longest of the n samples of a request.",
            TOKEN_COUNT_BUCKETS,
        )
        self.request_max_tokens = new(
            "request_params_max_tokens", "max_tokens of a request.", TOKEN_COUNT_BUCKETS
        )
        self.request_n = new("request_params_n", "n of a request.", SAMPLE_COUNT_BUCKETS)
        self.request_computed_tokens = new(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens of a request that the prefix cache did not have.",
            TOKEN_COUNT_BUCKETS,
        )
        self.request_preemptions = new(
            "request_num_preemptions",
            "How often a request was preempted.",
            PREEMPTION_COUNT_BUCKETS,
        )
        self.iteration_tokens = new(
            "iteration_tokens_total",
            "Prompt tokens run and tokens generated by one engine step.",
            STEP_TOKEN_BUCKETS,
        )

    def on_engine_ready(self, info: EngineInfo) -> None:
        """Publish what was loaded: the cache's geometry and bytes, the start-up phases."""
        new = self._families
        num_tokens = info.num_pages * info.page_size
        labels = {
            "block_size": str(info.page_size),
            "num_gpu_blocks": str(info.num_pages),
            "page_size": str(info.page_size),
            "num_pages": str(info.num_pages),
            "max_model_len": str(info.max_model_len),
            "dtype": info.dtype,
            "kv_cache_size_tokens": str(num_tokens),
            "kv_cache_max_concurrency": f"{num_tokens / info.max_model_len:.2f}",
        }
        new.gauge_family(
            "cache_config_info",
            "Geometry of the KV cache; block_size and num_gpu_blocks repeat vLLM's label names.",
            *labels,
            is_vllm=True,
        ).labels(*new.label_values, *labels.values()).set(1)
        cache_bytes = new.gauge_family("cache_bytes", "Bytes of the KV cache.", "component")
        for part in info.cache:
            cache_bytes.labels(*new.label_values, part.name).set(part.total_bytes)
        if info.memory is not None:
            memory = new.gauge_family("gpu_memory_bytes", "Where a GPU's memory goes.", "part")
            for name, size in info.memory.parts():
                memory.labels(*new.label_values, name).set(size)
        phase_s = new.gauge_family("startup_phase_seconds", "Start-up of the engine.", "phase")
        for name, seconds in info.phase_s.items():
            phase_s.labels(*new.label_values, name).set(seconds)

    def on_stats(self, stats: EngineStats) -> None:
        """Take over the engine's counters and gauges, once a step's tokens are counted."""
        last = self._last_stats
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self._waiting_for_capacity.set(stats.num_waiting)
        if stats.num_pages:
            self.kv_cache_usage.set(1.0 - stats.num_free_pages / stats.num_pages)
        if stats.num_swa_pages:
            self._set_swa_cache_usage(1.0 - stats.num_free_swa_pages / stats.num_swa_pages)
        for counter, now, before in (
            (self.num_preemptions, stats.num_preemptions_total, last.num_preemptions_total),
            (
                self.prefix_cache_queries,
                stats.prefix_cache_queries_total,
                last.prefix_cache_queries_total,
            ),
            (self.prefix_cache_hits, stats.prefix_cache_hits_total, last.prefix_cache_hits_total),
        ):
            if now > before:
                counter.inc(now - before)
        if stats.num_graph_replays_total is not None:
            self._count_graph_replays(
                stats.num_graph_replays_total - (last.num_graph_replays_total or 0)
            )
        # A heartbeat repeats the counters of the last step, which was observed already.
        if stats.num_steps_total > last.num_steps_total and stats.num_step_tokens:
            self.iteration_tokens.observe(stats.num_step_tokens + self._num_first_tokens)
            self._reads.on_step(decode=stats.decode_reads, prefill=stats.prefill_reads)
        self._num_first_tokens = 0
        self._last_stats = stats

    def _set_swa_cache_usage(self, share: float) -> None:
        # Created when a model has window pages: elsewhere there is nothing to use.
        if self._swa_cache_usage is None:
            self._swa_cache_usage = self._families.gauge(
                "swa_cache_usage_perc", "Used share of the window pages, 0 to 1."
            )
        self._swa_cache_usage.set(share)

    def _count_graph_replays(self, num_replays: int) -> None:
        # Created when an engine has graphs: a constant 0 elsewhere would look like a fault.
        if self._graph_replays is None:
            self._graph_replays = self._families.counter(
                "graph_replays", "Engine steps that were replayed from a graph."
            )
        self._graph_replays.inc(num_replays)

    def start_group(self, n: int) -> SampleGroup:
        """Return the group of the `n` samples of one prompt."""
        return SampleGroup(self, n)

    def start_request(
        self,
        num_prompt_tokens: int,
        *,
        max_tokens: int | None = None,
        group: SampleGroup | None = None,
    ) -> RequestTimer:
        """Return the timer of one sample that arrives now; without a group it is the only one."""
        return RequestTimer(self, num_prompt_tokens, max_tokens, group=group)

    def on_finish(self, reason: FinishReason) -> None:
        """Count a request that ended (RequestTimer.finish calls this)."""
        self._request_success.labels(*self._families.label_values, reason.value).inc()

    def on_rejected(self, reason: RejectReason) -> None:
        """Count a request that was refused before it was queued."""
        self._rejections.labels(*self._families.label_values, reason).inc()

    def token_totals(self) -> tuple[int, int]:
        """Return (prompt tokens, generated tokens) so far."""
        return self._num_prompt_tokens, self._num_generation_tokens

    def on_first_token(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """Count a prompt that was processed, and with it a first token."""
        self._num_first_tokens += 1
        self._num_prompt_tokens += num_prompt_tokens
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_tokens_cached.inc(num_cached_tokens)
        self._hit_tokens.inc(num_cached_tokens)
        self._computed_tokens.inc(num_prompt_tokens - num_cached_tokens)

    def add_generation_tokens(self, num_tokens: int) -> None:
        """Count tokens that were generated."""
        self._num_generation_tokens += num_tokens
        self.generation_tokens.inc(num_tokens)

    def render(self) -> bytes:
        """Return the text exposition (content type: CONTENT_TYPE)."""
        return generate_latest(self.registry)
