"""The engine's own duties: sizing, refusals, one request's failure, statistics, batch layout."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nsa_kernels.spec import NSASpec
from nsa_serve import memory
from nsa_serve.batch import build_batch
from nsa_serve.config import EngineConfig
from nsa_serve.engine import Engine
from nsa_serve.engine_setup import run_dtype, size_cache
from nsa_serve.errors import CapacityError, ConfigError, ModelError, RequestError
from nsa_serve.kv_cache import (
    KVCache,
    bytes_per_page,
    bytes_per_token,
    num_pages_for,
    page_cost,
)
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weights import expected_weights
from nsa_serve.request import EngineRequest, FinishReason, Request, SamplingParams
from nsa_serve.scheduler import ScheduledRow, SchedulerOutput
from tests.engine.engine_runs import greedy, make_engine, make_prompt, run

# "llama": 2 layers, 2 KV heads, 16 + 16 dims, fp32: 512 bytes a token, and a fourth of that for
# one compressed entry per 4 tokens; a page has 16 tokens.
BYTES_PER_TOKEN = {"raw": 512.0, "compressed": 128.0}
PAGE_BYTES = 16 * 640


@pytest.fixture(scope="module")
def folder(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture
def engine(folder: Path) -> Engine:
    return make_engine(folder, page_memory=11 * PAGE_BYTES, max_num_batched_tokens=64)


def ask(name: str, length: int, params: SamplingParams) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=make_prompt(length), params=params)


def test_a_page_costs_what_the_tensors_take(checkpoints: Mapping[str, Path]) -> None:
    for name, folder in checkpoints.items():
        config = load_model_config(ModelSource(name=name, folder=folder))
        for dtype in (torch.float32, torch.bfloat16):
            cache = KVCache(config, 5, dtype=dtype, device=torch.device("cpu"))
            tensors = [t for c in cache.layers for t in (c.k, c.v, c.k_cmp, c.v_cmp)]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            assert num_bytes == 5 * bytes_per_page(config, dtype)
            assert all(tensor[0].eq(0).all() for tensor in tensors)


def test_the_cache_table_has_the_numbers(engine: Engine, folder: Path) -> None:
    config = load_model_config(ModelSource(name="m", folder=folder))
    assert bytes_per_token(config, torch.float32) == BYTES_PER_TOKEN
    info = engine.info
    assert (info.num_pages, info.page_size, info.max_model_len) == (10, 16, 160)
    assert {part.name: part.bytes_per_token for part in info.cache} == BYTES_PER_TOKEN
    assert sum(part.total_bytes for part in info.cache) == 10 * PAGE_BYTES
    assert info.weight_bytes == 4 * info.num_parameters
    assert list(info.phase_s) == ["config", "weights", "layout", "cache", "warm-up"]


@pytest.mark.parametrize("max_model_len", [1, 15, 16, 17, 160])
def test_max_model_len_is_what_was_asked_when_it_fits(folder: Path, max_model_len: int) -> None:
    engine = make_engine(folder, page_memory=11 * PAGE_BYTES, max_model_len=max_model_len)
    assert engine.info.max_model_len == max_model_len


def test_without_page_memory_a_share_of_what_is_free_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_model_config(ModelSource(name="m", folder=folder))
    settings = EngineConfig(model=str(folder), max_num_seqs=2)
    weight_bytes = 4 * sum(math.prod(shape) for shape in expected_weights(config).values())
    free = weight_bytes + 4 * 9 * PAGE_BYTES + 1
    monkeypatch.setattr("nsa_serve.engine_setup.available_bytes", lambda: free)
    assert size_cache(settings, config, torch.float32, 1024) == 9
    monkeypatch.setattr("nsa_serve.engine_setup.available_bytes", lambda: weight_bytes)
    with pytest.raises(CapacityError, match=f"the weights need {weight_bytes} bytes in"):
        size_cache(settings, config, torch.float32, 1024)
    # No more than two requests of 1024 tokens can use, and the null page.
    monkeypatch.setattr("nsa_serve.engine_setup.available_bytes", lambda: 2**40)
    assert size_cache(settings, config, torch.float32, 1024) == 2 * 64 + 1


def test_too_little_memory_is_refused_with_a_remedy_that_works(folder: Path) -> None:
    with pytest.raises(CapacityError, match="at least 2 are needed") as caught:
        make_engine(folder, page_memory=2 * PAGE_BYTES - 1)
    remedy = int(re.search(r"raise --page-memory to (\d+)", str(caught.value))[1])
    assert make_engine(folder, page_memory=remedy).info.num_pages == 1

    with pytest.raises(CapacityError, match=r"161 needs 11 pages .* cache holds 10") as caught:
        make_engine(folder, page_memory=11 * PAGE_BYTES, max_model_len=161)
    fits, needed = map(
        int, re.findall(r"--max-model-len (\d+).*--page-memory (\d+)", str(caught.value))[0]
    )
    assert make_engine(folder, page_memory=11 * PAGE_BYTES, max_model_len=fits).info.num_pages == 10
    assert make_engine(folder, page_memory=needed, max_model_len=161).info.max_model_len == 161
    with pytest.raises(CapacityError):
        make_engine(folder, page_memory=needed - 1, max_model_len=161)


def test_a_length_beyond_the_model_is_refused(folder: Path) -> None:
    assert make_engine(folder, max_model_len=1024).info.max_model_len == 1024
    with pytest.raises(ConfigError, match=r"1025 .*made for 1024 tokens .*--max-model-len"):
        make_engine(folder, max_model_len=1025)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found"):
        make_engine(tmp_path / "none")


def test_one_page_serves_requests_to_its_last_token(folder: Path) -> None:
    engine = make_engine(folder, page_memory=2 * PAGE_BYTES)
    result = run(engine, [ask("r", 15, greedy(9))])["r"]
    assert (len(result.token_ids), result.finish_reason) == (1, FinishReason.LENGTH)
    with pytest.raises(RequestError, match="prompt has 16 tokens but max_model_len is 16"):
        engine.add(ask("r", 16, greedy(1)))
    assert not engine.has_unfinished


def test_a_request_that_cannot_be_sampled_fails_alone(engine: Engine) -> None:
    """min_tokens holds back every token that a request is not biased against."""
    alone = run(engine, [ask("good", 20, greedy(6))])["good"]
    banned = SamplingParams(
        max_tokens=3, min_tokens=1, temperature=0.0, stop_token_ids=tuple(range(300))
    )
    engine.add(ask("bad", 9, banned))
    engine.add(ask("good", 20, greedy(6)))
    tokens, errors = [], []
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
            errors += [(output.request_id, output.finish_reason, output.error)]
        engine.scheduler.check()
    failures = [item for item in errors if item[2] is not None]
    assert failures == [("bad", FinishReason.ERROR, "every token was excluded: loosen min_tokens")]
    assert tokens == alone.token_ids
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_stats_count_what_ran(engine: Engine) -> None:
    assert engine.stats.num_steps_total == 0
    engine.add(ask("a", 100, greedy(3)))
    assert (engine.stats.num_waiting, engine.stats.num_running) == (1, 0)
    engine.step()
    stats = engine.stats
    assert (stats.num_step_tokens, stats.num_running, stats.num_waiting) == (64, 1, 0)
    assert stats.num_pages - stats.num_free_pages == 4
    while engine.has_unfinished:
        engine.step()
    # Chunks of 64 and 36 tokens, then two decode rows: the third token is never run.
    assert engine.stats.num_steps_total == 4
    assert engine.stats.prefix_cache_queries_total == 100
    run(engine, [ask("b", 100, greedy(3))])
    assert engine.stats.prefix_cache_queries_total == 200
    assert engine.stats.prefix_cache_hits_total == 96
    assert engine.step() == []
    assert engine.stats.num_step_tokens == 0


def test_close_aborts_what_is_left(engine: Engine) -> None:
    for name in ("running", "waiting"):
        engine.add(ask(name, 90, greedy(9)))
    engine.step()
    engine.close()
    assert not engine.has_unfinished
    assert engine.pool.num_free_pages == engine.pool.num_pages
    engine.abort(["running", "never was"])


def test_max_tokens_0_scores_the_prompt_and_generates_nothing(engine: Engine) -> None:
    result = run(engine, [ask("r", 100, greedy(0, prompt_logprobs=1))])["r"]
    assert result.token_ids == []
    assert result.finish_reason is FinishReason.LENGTH
    assert len(result.prompt_logprobs or []) == 99


def test_a_batch_lists_rows_samples_and_prompt_spans() -> None:
    spec = NSASpec(cmp_len=8, cmp_stride=4, block_size=16, num_selected_blocks=4)
    params = SamplingParams(prompt_logprobs=1)
    requests = []
    for name, length in (("decode", 17), ("chunk", 40), ("last", 5)):
        options = params if name != "decode" else SamplingParams()
        request = Request(
            EngineRequest(request_id=name, prompt_token_ids=[*range(length)], params=options)
        )
        request.pages = [1 + len(requests) * 3 + page for page in range(3)]
        requests.append(request)
    rows = [
        ScheduledRow(requests[0], 16, 1, samples=True),
        ScheduledRow(requests[1], 16, 16, samples=False),
        ScheduledRow(requests[2], 0, 5, samples=True),
    ]
    batch = build_batch(SchedulerOutput(rows, 22, 1, []), spec)
    assert batch.input_ids.tolist() == [16, *range(16, 32), *range(5)]
    assert batch.attn.positions.tolist() == [16, *range(16, 32), *range(5)]
    assert batch.sampling_rows.tolist() == [0, 21]
    assert [item.request_id for item in batch.sampling_requests] == ["decode", "last"]
    spans = [(span.request.request_id, span.first_row, span.targets) for span in batch.prompt_spans]
    # A prompt's last token has no target: what follows it is sampled.
    assert spans == [("chunk", 1, [*range(17, 33)]), ("last", 17, [1, 2, 3, 4])]


def test_a_cache_smaller_than_two_pages_names_its_remedy(folder: Path) -> None:
    config = load_model_config(ModelSource(name="m", folder=folder))
    limits = EngineConfig(model="m").limits("cpu", 1024)
    cost = page_cost(config, torch.float32, limits, 1024)
    assert num_pages_for(cost, 3 * PAGE_BYTES - 1) == 2
    with pytest.raises(CapacityError, match=f"raise --page-memory to {2 * PAGE_BYTES} or more"):
        num_pages_for(cost, PAGE_BYTES)


@pytest.mark.parametrize(
    ("maximum", "used", "want"),
    [
        ("max", 1, 8192 * 1024),
        ("5000", 1000, 4000),
        ("5000", 6000, 0),
        (str(2**40), 0, 8192 * 1024),
    ],
)
def test_free_memory_is_the_machines_or_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maximum: str, used: int, want: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8192 kB\n")
    (tmp_path / "memory.max").write_text(f"{maximum}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == want


def test_memory_that_the_system_does_not_tell_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(OSError, match="MemAvailable"):
        memory.available_bytes()


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert run_dtype(EngineConfig(dtype="float32"), cpu) is torch.float32
    assert run_dtype(EngineConfig(dtype="bfloat16"), cpu) is torch.bfloat16
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert run_dtype(EngineConfig(), cpu) is (torch.bfloat16 if has_bf16 else torch.float32)
