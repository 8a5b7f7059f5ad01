"""Metrics: exact counts after serial requests, counters by difference, closed label sets."""

import pytest
from prometheus_client import CollectorRegistry

from nsa_serve.messages import CacheComponent, EngineInfo, EngineStats
from nsa_serve.metrics import Metrics, RequestTimer
from nsa_serve.request import FinishReason


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
    info = EngineInfo(
        family="native",
        dtype="float32",
        device="cpu",
        num_parameters=1,
        weight_bytes=4,
        max_model_len=111,
        vocab_size=300,
        page_size=64,
        num_pages=37,
        cache=[CacheComponent("raw", 8.0, 1024)],
        phase_s={},
    )
    metrics.on_engine_ready(info)
    line = next(
        line
        for line in metrics.render().decode().splitlines()
        if line.startswith("nsa_serve:cache_config_info{")
    )
    assert 'num_gpu_blocks="37"' in line
    assert 'block_size="64"' in line
    assert line.endswith(" 1.0")


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
