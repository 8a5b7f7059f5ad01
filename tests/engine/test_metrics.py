"""Metrics: exact counts after serial requests, counters by difference, closed label sets."""

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from nsa_serve.cache_reads import CacheReads
from nsa_serve.messages import CacheComponent, DeviceMemory, EngineInfo, EngineStats
from nsa_serve.metrics import Metrics
from nsa_serve.request import FinishReason
from nsa_serve.request_timer import RequestTimer

INFO = EngineInfo(
    family="native",
    dtype="float32",
    device="cpu",
    num_parameters=1,
    weight_bytes=4,
    max_model_len=111,
    max_num_seqs=32,
    vocab_size=300,
    page_size=64,
    num_pages=37,
    cache=[CacheComponent("raw", 8.0, 1024)],
    phase_s={"weights": 1.5},
)
# What gateways and dashboards made for vLLM query.
VLLM_SAMPLES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_inference_time_seconds_count",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_bucket",
    "iteration_tokens_total_count",
}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", registry=CollectorRegistry())


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """Value of one series; fails when it does not exist."""
    value = metrics.registry.get_sample_value(
        f"nsa_serve:{name}", {"model_name": "tiny", "engine": "0", **labels}
    )
    assert value is not None, f"no series {name} {labels}"
    return value


def test_serial_requests_are_counted_exactly(metrics: Metrics) -> None:
    num_requests, num_prompt, num_output = 7, 13, 5
    num_steps = 0
    for _ in range(num_requests):
        timer = metrics.start_request(num_prompt, max_tokens=num_output)
        for i in range(num_output):
            timer.on_tokens(1)
            num_steps += 1
            # The first step runs the prompt; each later one runs the token before.
            num_step_tokens = num_prompt if i == 0 else 1
            stats = EngineStats(num_steps_total=num_steps, num_step_tokens=num_step_tokens)
            metrics.on_stats(stats)
        timer.finish(FinishReason.LENGTH)
    assert sample(metrics, "time_to_first_token_seconds_count") == num_requests
    assert sample(metrics, "inter_token_latency_seconds_count") == num_requests * (num_output - 1)
    assert sample(metrics, "prompt_tokens_total") == num_requests * num_prompt
    assert sample(metrics, "generation_tokens_total") == num_requests * num_output
    assert sample(metrics, "iteration_tokens_total_count") == num_requests * num_output
    expected = num_requests * (num_prompt + num_output)
    assert sample(metrics, "iteration_tokens_total_sum") == expected
    for phase in ("queue", "prefill", "decode", "inference"):
        assert sample(metrics, f"request_{phase}_time_seconds_count") == num_requests
    assert sample(metrics, "request_params_max_tokens_sum") == num_requests * num_output
    assert sample(metrics, "request_prompt_tokens_sum") == num_requests * num_prompt
    assert sample(metrics, "request_generation_tokens_sum") == num_requests * num_output
    assert sample(metrics, "e2e_request_latency_seconds_count") == num_requests
    assert sample(metrics, "request_time_per_output_token_seconds_count") == num_requests
    assert sample(metrics, "request_success_total", finished_reason="length") == num_requests
    assert sample(metrics, "request_success_total", finished_reason="abort") == 0
    assert sample(metrics, "request_params_n_count") == num_requests
    assert sample(metrics, "request_params_n_sum") == num_requests
    assert sample(metrics, "request_max_num_generation_tokens_sum") == num_requests * num_output
    assert sample(metrics, "request_prefill_kv_computed_tokens_sum") == num_requests * num_prompt
    assert sample(metrics, "request_num_preemptions_count") == num_requests
    assert sample(metrics, "request_num_preemptions_sum") == 0
    assert sample(metrics, "prompt_tokens_cached_total") == 0


def test_cached_prompt_tokens_are_told_apart(metrics: Metrics) -> None:
    timer = metrics.start_request(100)
    timer.on_tokens(1, num_cached_tokens=64, num_preemptions=1)
    timer.on_tokens(1, num_cached_tokens=64, num_preemptions=3)
    timer.finish(FinishReason.STOP)
    assert sample(metrics, "prompt_tokens_total") == 100
    assert sample(metrics, "prompt_tokens_cached_total") == 64
    assert sample(metrics, "prompt_tokens_by_source_total", source="local_cache_hit") == 64
    assert sample(metrics, "prompt_tokens_by_source_total", source="local_compute") == 36
    assert sample(metrics, "request_prefill_kv_computed_tokens_sum") == 36
    assert sample(metrics, "request_num_preemptions_sum") == 3


def test_the_samples_of_one_prompt_are_observed_together(metrics: Metrics) -> None:
    group = metrics.start_group(3)
    timers = [metrics.start_request(5, group=group) for _ in range(3)]
    for num_tokens, timer in zip((2, 7, 4), timers, strict=True):
        timer.on_tokens(num_tokens)
    for timer in timers[:2]:
        timer.finish(FinishReason.STOP)
    assert sample(metrics, "request_params_n_count") == 0
    timers[2].finish(FinishReason.ABORT)
    assert sample(metrics, "request_params_n_count") == 1
    assert sample(metrics, "request_params_n_sum") == 3
    assert sample(metrics, "request_max_num_generation_tokens_sum") == 7
    assert sample(metrics, "request_generation_tokens_sum") == 13


def test_cache_reads_are_counted_once_a_step(metrics: Metrics) -> None:
    decode = CacheReads(1, 2, 3, 40, 5, 6)
    prefill = CacheReads(10, 20, 30, 400, 50, 60)
    stats = EngineStats(
        num_steps_total=1, num_step_tokens=9, decode_reads=decode, prefill_reads=prefill
    )
    metrics.on_stats(stats)
    metrics.on_stats(stats)
    metrics.on_stats(EngineStats(num_steps_total=2, num_step_tokens=1, decode_reads=decode))
    for branch, in_decode, in_prefill in (("cmp", 2, 10), ("slc", 4, 20), ("swa", 6, 30)):
        for phase, expected in (("decode", in_decode), ("prefill", in_prefill)):
            name = "nsa_cache_read_bytes_total"
            assert sample(metrics, name, branch=branch, phase=phase) == expected
    assert sample(metrics, "nsa_dense_cache_read_bytes_total", phase="decode") == 80
    assert sample(metrics, "nsa_dense_cache_read_bytes_total", phase="prefill") == 400
    assert sample(metrics, "nsa_selected_blocks_total", phase="decode") == 10
    assert sample(metrics, "nsa_visible_blocks_total", phase="prefill") == 60
    assert sample(metrics, "nsa_step_selected_blocks_count") == 2
    assert sample(metrics, "nsa_step_selected_blocks_sum") == 60


def test_the_memory_of_a_gpu_is_there_where_there_is_one() -> None:
    memory = DeviceMemory(
        name="a GPU",
        total_bytes=100,
        other_bytes=1,
        weight_bytes=20,
        activation_bytes=3,
        graph_bytes=4,
        num_graphs=5,
        capture_s=0.5,
    )
    for info in (INFO, msgspec.structs.replace(INFO, memory=memory)):
        metrics = Metrics("tiny")
        metrics.on_engine_ready(info)
        text = metrics.render().decode()
        assert ("gpu_memory_bytes" in text) == (info.memory is not None)
    for name, size in memory.parts():
        labels = f'engine="0",model_name="tiny",part="{name}"'
        assert f"nsa_serve:gpu_memory_bytes{{{labels}}} {size:.1f}" in text


def test_graph_replays_exist_where_graphs_do(metrics: Metrics) -> None:
    metrics.on_stats(EngineStats(num_steps_total=1))
    assert "graph_replays" not in metrics.render().decode()
    metrics.on_stats(EngineStats(num_steps_total=2, num_graph_replays_total=2))
    metrics.on_stats(EngineStats(num_steps_total=3, num_graph_replays_total=3))
    assert sample(metrics, "graph_replays_total") == 3


def test_vllm_names_render_the_same_objects(metrics: Metrics) -> None:
    timer = metrics.start_request(13, max_tokens=2)
    timer.on_tokens(2)
    timer.finish(FinishReason.LENGTH)
    metrics.on_stats(EngineStats(num_steps_total=1, num_waiting=4, num_step_tokens=13))
    metrics.on_engine_ready(INFO)
    lines = metrics.render().decode().splitlines()
    ours = {line for line in lines if line.startswith("nsa_serve:")}
    theirs = {line.replace("vllm:", "nsa_serve:", 1) for line in lines if line.startswith("vllm:")}
    assert theirs <= ours
    names = {line.partition("{")[0].removeprefix("nsa_serve:") for line in theirs}
    assert names >= VLLM_SAMPLES
    assert not any("nsa_" in name for name in names)
    assert sum(line.startswith("vllm:prompt_tokens_total{") for line in lines) == 1
    assert sum(line.startswith("# TYPE vllm:prompt_tokens") for line in lines) >= 1


def test_vllm_names_can_be_left_out() -> None:
    metrics = Metrics("tiny", registry=CollectorRegistry(), has_vllm_names=False)
    metrics.on_engine_ready(INFO)
    assert "vllm:" not in metrics.render().decode()


def test_every_family_has_a_help_text_and_ends_as_prometheus_wants(metrics: Metrics) -> None:
    metrics.on_engine_ready(INFO)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert len(families) > 60
    assert all(family.documentation for family in families)


def test_latencies_are_those_of_the_clock(metrics: Metrics) -> None:
    clock = Clock()
    timer = RequestTimer(metrics, 3, None, clock=clock)
    clock.now_s += 2.0
    timer.on_tokens(1, queued_s=0.75)
    clock.now_s += 0.5
    timer.on_tokens(0)
    clock.now_s += 0.5
    timer.on_tokens(4)
    timer.finish(FinishReason.STOP)
    assert sample(metrics, "time_to_first_token_seconds_sum") == pytest.approx(2.0)
    assert sample(metrics, "inter_token_latency_seconds_sum") == pytest.approx(1.0)
    assert sample(metrics, "inter_token_latency_seconds_count") == 4
    assert sample(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(0.25)
    assert sample(metrics, "request_decode_time_seconds_sum") == pytest.approx(1.0)
    assert sample(metrics, "request_queue_time_seconds_sum") == pytest.approx(0.75)
    assert sample(metrics, "request_prefill_time_seconds_sum") == pytest.approx(1.25)
    assert sample(metrics, "request_inference_time_seconds_sum") == pytest.approx(2.25)
    assert sample(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(3.0)


def test_a_prompt_without_output_has_no_decode_time(metrics: Metrics) -> None:
    clock = Clock()
    timer = RequestTimer(metrics, 3, 0, clock=clock)
    clock.now_s += 2.0
    timer.on_tokens(0, queued_s=0.5)
    timer.finish(FinishReason.LENGTH)
    assert sample(metrics, "request_queue_time_seconds_sum") == pytest.approx(0.5)
    assert sample(metrics, "request_prefill_time_seconds_sum") == pytest.approx(1.5)
    assert sample(metrics, "request_inference_time_seconds_sum") == pytest.approx(1.5)
    assert sample(metrics, "request_decode_time_seconds_count") == 0


def test_tokens_that_come_with_the_first_keep_the_interval_count(metrics: Metrics) -> None:
    timer = metrics.start_request(1)
    timer.on_tokens(3)
    assert sample(metrics, "inter_token_latency_seconds_count") == 2
    assert sample(metrics, "inter_token_latency_seconds_sum") == 0


def test_an_abort_is_counted_once_and_has_no_latency(metrics: Metrics) -> None:
    timer = metrics.start_request(2, max_tokens=9)
    timer.on_tokens(1)
    timer.finish(FinishReason.ABORT)
    timer.finish(FinishReason.STOP)
    assert timer.is_finished
    assert sample(metrics, "request_success_total", finished_reason="abort") == 1
    assert sample(metrics, "request_success_total", finished_reason="stop") == 0
    assert sample(metrics, "e2e_request_latency_seconds_count") == 0


def test_stats_set_gauges_and_add_differences(metrics: Metrics) -> None:
    first = EngineStats(
        num_steps_total=1,
        num_running=2,
        num_waiting=3,
        num_free_pages=25,
        num_pages=100,
        num_free_swa_pages=7,
        num_swa_pages=8,
        num_preemptions_total=4,
        prefix_cache_queries_total=50,
        prefix_cache_hits_total=20,
        num_step_tokens=17,
    )
    metrics.on_stats(first)
    metrics.on_stats(first)
    assert sample(metrics, "num_requests_running") == 2
    assert sample(metrics, "num_requests_waiting") == 3
    assert sample(metrics, "kv_cache_usage_perc") == pytest.approx(0.75)
    assert sample(metrics, "swa_cache_usage_perc") == pytest.approx(0.125)
    assert sample(metrics, "num_preemptions_total") == 4
    assert sample(metrics, "iteration_tokens_total_count") == 1
    metrics.on_stats(
        EngineStats(
            num_steps_total=2,
            num_free_pages=100,
            num_pages=100,
            num_preemptions_total=5,
            prefix_cache_queries_total=60,
            prefix_cache_hits_total=21,
            num_step_tokens=2,
        )
    )
    assert sample(metrics, "num_requests_running") == 0
    assert sample(metrics, "kv_cache_usage_perc") == 0
    assert sample(metrics, "num_preemptions_total") == 5
    assert sample(metrics, "prefix_cache_queries_total") == 60
    assert sample(metrics, "prefix_cache_hits_total") == 21
    assert sample(metrics, "iteration_tokens_total_sum") == 19


def test_token_latency_has_vllm_bounds_and_finer_ones(metrics: Metrics) -> None:
    for bound in ("0.001", "0.004", "0.01", "0.075", "80.0"):
        assert sample(metrics, "inter_token_latency_seconds_bucket", le=bound) == 0


def test_cache_config_info_carries_the_geometry(metrics: Metrics) -> None:
    metrics.on_engine_ready(INFO)
    line = next(
        line
        for line in metrics.render().decode().splitlines()
        if line.startswith("nsa_serve:cache_config_info{")
    )
    assert 'num_gpu_blocks="37"' in line
    assert 'block_size="64"' in line
    assert 'kv_cache_size_tokens="2368"' in line
    assert 'kv_cache_max_concurrency="21.33"' in line
    assert line.endswith(" 1.0")
    assert sample(metrics, "cache_bytes", component="raw") == 1024
    assert sample(metrics, "startup_phase_seconds", phase="weights") == 1.5


def test_rejections_are_counted_by_reason(metrics: Metrics) -> None:
    metrics.on_rejected("queue_full")
    assert sample(metrics, "admission_rejections_total", reason="queue_full") == 1
    assert sample(metrics, "admission_rejections_total", reason="shutting_down") == 0


def test_the_default_registry_has_process_metrics_and_is_not_shared() -> None:
    first, second = Metrics("a"), Metrics("b")
    text = first.render().decode()
    assert "process_cpu_seconds_total" in text
    assert 'model_name="b"' not in text
    assert 'model_name="b"' in second.render().decode()
