"""What the GPU benchmarks make of times, traces and answers: the functions without I/O."""

import json
import statistics
from pathlib import Path

import pytest
from gpu_common import engine_options, make_prompt, percentile, server_flags
from gpu_decode import parse_cell, step_gaps_s, step_ms
from hypothesis import given
from hypothesis import strategies as st
from serve_stats import (
    common_prefix_len,
    compare_outputs,
    is_good,
    log_uniform_lengths,
    make_prompts,
)
from serve_stats import summarize as summarize_run
from trace_stats import Span, read_trace, short_name, summarize, table, union_length

from nsa_client.bench_stats import BenchResult, RequestRecord

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=12)


@given(INTERVALS)
def test_union_length_counts_each_point_once(pairs: list[list[int]]) -> None:
    covered = {point for start, end in pairs for point in range(start, end)}
    assert union_length([(start, end) for start, end in pairs]) == len(covered)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentile_is_between_the_extremes_and_meets_the_median(samples: list[float]) -> None:
    assert percentile(samples, 0) == min(samples)
    assert percentile(samples, 100) == max(samples)
    assert percentile(samples, 50) == pytest.approx(statistics.median(samples), abs=1e-6)


def test_percentile_of_few_samples() -> None:
    assert percentile([], 50) is None
    assert percentile([7.0], 99) == 7.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)


def test_overlapping_kernels_are_busy_once() -> None:
    # Two steps of 100 us; in each b starts before a ends, and nothing runs for 30 us.
    spans = [
        span
        for start in (0.0, 100.0)
        for span in (Span("a", start, start + 40), Span("b", start + 30, start + 70))
    ]
    stats = summarize(spans, 2, wall_us=105.0)
    assert stats["kernel_sum_us"] == 80
    assert stats["busy_us"] == 70
    assert stats["idle_share"] == pytest.approx(30 / 170)
    assert stats["wall_of_sum"] == pytest.approx(105 / 80)
    assert stats["wall_of_busy"] == pytest.approx(105 / 70)
    assert [(top["name"], top["calls_per_step"]) for top in stats["top"]] == [("a", 1), ("b", 1)]
    (gap,) = stats["gaps"]
    assert gap == {"us": 30, "at_us": 70, "after": "b", "before": "a"}
    assert "wall 105 us" in table(stats) and "nothing for 30 us at 70" in table(stats)


def test_a_step_without_kernels_has_no_shares() -> None:
    stats = summarize([], 3, wall_us=5.0)
    assert stats["idle_share"] is None and stats["wall_of_sum"] is None
    assert "idle -" in table(stats)


def test_a_trace_keeps_what_ran_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 5.5, "dur": 2},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 1, "dur": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9},
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 0},
        {"ph": "M", "name": "process_name"},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    assert read_trace(path) == [Span("copy", 1, 2), Span("k", 5.5, 7.5)]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_decode_slc_kernel", "_decode_slc_kernel"),
        ("void at::native::reduce_kernel<512, 1>(int, float)", "reduce_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "vectorized_elementwise_kernel CUDAFunctor_add",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD "),
        ("void (anonymous namespace)::softmax<float>(int)", "softmax"),
    ],
)
def test_kernels_have_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_lengths_are_log_uniform_within_their_bounds() -> None:
    lengths = log_uniform_lengths(4000, 512, 16384, seed="x")
    assert min(lengths) >= 512 and max(lengths) <= 16384
    assert lengths == log_uniform_lengths(4000, 512, 16384, seed="x")
    # Five octaves, a fifth in each: 0.2 * 4000 = 800, with a standard deviation of 25.
    for octave in range(5):
        low = 512 << octave
        assert 680 < sum(low <= length < 2 * low for length in lengths) < 920


def test_a_short_prompt_is_the_start_of_a_long_one_and_rows_differ() -> None:
    assert make_prompt(3, 1000, 768)[:111] == make_prompt(3, 111, 768)
    rows = [make_prompt(row, 16, 768) for row in range(50)]
    rows += [make_prompt(row, 16, 768, seed="1") for row in range(50)]
    assert len({tuple(row) for row in rows}) == 100
    assert max(map(max, rows)) < 768 - 16
    prompts = make_prompts(5, 8, 64, vocab_size=128256, seed="s")
    assert all(8 <= len(prompt) <= 64 for prompt in prompts)
    assert max(map(max, prompts)) < 128000


def record(
    ttft_s: float, e2el_s: float, num_tokens: int, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        start_s=0.0,
        e2el_s=e2el_s,
        ttft_s=ttft_s,
        itls_s=(0.01,) * (num_tokens - 1),
        num_prompt_tokens=100,
        num_output_tokens=num_tokens,
        error=error,
    )


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (record(0.9, 0.9 + 10 * 0.049, 11), True),
        (record(1.1, 1.1 + 10 * 0.010, 11), False),
        (record(0.9, 0.9 + 10 * 0.051, 11), False),
        (record(0.9, 5.0, 1), True),
        (record(0.1, 0.2, 11, error="lost"), False),
        (RequestRecord(0.0, 1.0, error="never began"), False),
    ],
)
def test_goodput_wants_both_limits(item: RequestRecord, expected: bool) -> None:
    assert is_good(item, ttft_s=1.0, itl_s=0.05) is expected


def test_a_run_is_summed_over_its_duration() -> None:
    records = (record(0.5, 1.0, 11), record(1.5, 2.0, 11), RequestRecord(0.0, 1.0, error="lost"))
    result = BenchResult(records=records, duration_s=4.0, client_cpu_s=1.0)
    figures = summarize_run(result, ttft_s=1.0, itl_s=0.05)
    assert figures["num_failed"] == 1 and figures["errors"] == ["lost"]
    assert figures["requests_per_s"] == 0.5
    assert figures["good_requests_per_s"] == 0.25
    assert figures["output_tokens_per_s"] == 5.5
    assert figures["total_tokens_per_s"] == 55.5
    assert figures["ttft_p50_ms"] == pytest.approx(1000)
    assert figures["itl_p99_ms"] == pytest.approx(10)


def test_a_run_of_failures_has_no_latencies() -> None:
    result = BenchResult(
        records=(RequestRecord(0.0, 1.0, error="lost"),), duration_s=1.0, client_cpu_s=0.0
    )
    assert summarize_run(result, ttft_s=1.0, itl_s=1.0)["ttft_p50_ms"] is None


def test_outputs_are_compared_up_to_their_first_difference() -> None:
    assert common_prefix_len([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_len([1, 2], [1, 2, 3]) == 2
    result = compare_outputs([[1, 2, 3, 4], [5, 6, 7, 8], []], [[1, 2, 3, 4], [5, 9, 7, 8], [1, 2]])
    assert result["equal_requests"] == pytest.approx(1 / 3)
    assert result["equal_tokens"] == pytest.approx((4 + 1 + 0) / 10)
    assert result["num_distinct"] == 8


def test_gaps_are_of_steps_that_decode_every_row() -> None:
    returns = [(0.0, 0), (1.0, 3), (3.0, 3), (4.0, 2), (5.0, 3), (5.5, 3)]
    assert step_gaps_s(returns, 3) == [2.0, 0.5]
    assert step_gaps_s([], 3) == []


def test_cells_and_settings_are_read() -> None:
    assert parse_cell("64kx32") == (65536, 32)
    assert parse_cell("100x1") == (100, 1)
    options = engine_options(["quantization=fp8", "enforce-eager=true", "max_num_seqs=64"])
    assert options == {"quantization": "fp8", "enforce_eager": True, "max_num_seqs": 64}
    flags = server_flags({**options, "async_scheduling": False, "revision": None})
    assert flags == ["--quantization", "fp8", "--enforce-eager", "--max-num-seqs", "64",
                     "--no-async-scheduling"]  # fmt: skip
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        engine_options(["fp8"])


def test_a_decode_figure_is_the_difference_of_medians_and_has_the_spread_of_the_turns() -> None:
    # One turn met a slow host.
    ms, (least, most) = step_ms([0.3, 0.9, 0.3], [0.5, 1.1, 0.48], 100)
    assert ms == pytest.approx(2.0)
    assert (least, most) == (pytest.approx(1.8), pytest.approx(2.0))
