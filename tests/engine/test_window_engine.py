"""A model with keys and values of its own for every branch: the same tokens whatever happens.

As test_invariants.py, for what window pages add. Every run is compared with the request alone, its
prompt in one piece, nothing cached.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_serve.config import EngineConfig, ModelConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.kv_cache import page_cost
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.request import EngineRequest
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run, run_alone, step
from tests.util import random_weights

# Windows of 8 tokens every 4, pages of 16, sliding windows of 24, selections of 64 tokens.
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 24, 25, 33, 47, 64, 65, 111, 129, 200)
MAX_TOKENS = 18
LIMITS = {"max_num_seqs": len(LENGTHS), "max_num_batched_tokens": 90}


@dataclass(frozen=True)
class Plain:
    """A checkpoint and what its requests give when nothing disturbs them."""

    folder: Path
    config: ModelConfig
    engine: Engine
    results: Mapping[str, Result]

    def make_engine(self, **options: Any) -> Engine:
        return engine_of(self.folder, self.config, **options)

    def alone(self, request: EngineRequest) -> list[int]:
        return run_alone(self.engine, [request])[request.request_id].token_ids

    def memory_for(self, num_tokens: int) -> int:
        """Bytes of a cache of so many tokens, the null page and all window pages included."""
        limits = make_config(EngineConfig, {"model": "m", **LIMITS}).limits("cpu", 1024)
        cost = page_cost(self.config, torch.float32, limits, 1024)
        return cost.bytes_of(1 + -(-num_tokens // cost.page_size))


def engine_of(folder: Path, config: ModelConfig, **options: Any) -> Engine:
    with (
        mock.patch("nsa_serve.engine_setup.load_model_config", lambda _: config),
        mock.patch("nsa_serve.engine_setup.load_weights", lambda *_, **__: random_weights(config)),
    ):
        return make_engine(folder, **options)


def requests_of(lengths: Sequence[int] = LENGTHS) -> list[EngineRequest]:
    return [ask(str(length), make_prompt(length)) for length in lengths]


def ask(name: str, prompt: list[int], max_tokens: int = MAX_TOKENS) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=greedy(max_tokens))


@pytest.fixture(scope="module", params=["mean", "mlp"])
def plain(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> Iterator[Plain]:
    folder = checkpoints["llama"]
    base = load_model_config(ModelSource(name="m", folder=folder))
    config = replace(
        base,
        kv_per_branch=True,
        v_head_dim=12,
        nsa=replace(base.nsa, compression=request.param, cmp_hidden_size=20),
    )
    engine = engine_of(folder, config, enable_prefix_caching=False)
    yield Plain(folder, config, engine, run_alone(engine, requests_of()))
    engine.close()


def assert_same(got: Mapping[str, Result], want: Mapping[str, Result]) -> None:
    for name, result in got.items():
        assert result.token_ids == want[name].token_ids, f"prompt of {name} tokens"


def test_batched_equals_alone(plain: Plain) -> None:
    assert_same(run(plain.make_engine(enable_prefix_caching=False), requests_of()), plain.results)


@pytest.mark.parametrize("chunk", [16, 23, 90])
def test_chunked_equals_whole(plain: Plain, chunk: int) -> None:
    engine = plain.make_engine(enable_prefix_caching=False, max_num_batched_tokens=chunk)
    assert_same(run_alone(engine, requests_of()), plain.results)
    assert_same(run(engine, requests_of()), plain.results)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_cached_equals_computed(plain: Plain, async_scheduling: bool) -> None:
    engine = plain.make_engine(async_scheduling=async_scheduling, max_num_batched_tokens=70)
    for _ in range(2):
        for request in requests_of():
            got = run(engine, [request])
            assert_same(got, plain.results)
    assert got["200"].num_prefix_hit_tokens == 192


@pytest.mark.parametrize("num_shared", [15, 16, 37, 64, 111, 112, 199])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_prefix_hit_changes_nothing(
    plain: Plain, num_shared: int, async_scheduling: bool
) -> None:
    engine = plain.make_engine(max_num_batched_tokens=77, async_scheduling=async_scheduling)
    prompt = make_prompt(200)
    assert_same(run(engine, [ask("200", prompt)]), plain.results)
    other = ask("other", prompt[:num_shared] + make_prompt(200 - num_shared, seed=1))
    got = run(engine, [other])["other"]
    assert got.num_prefix_hit_tokens == num_shared // 16 * 16
    assert got.token_ids == plain.alone(other)


def test_a_prefix_without_its_window_is_computed(plain: Plain) -> None:
    engine = plain.make_engine()
    run(engine, requests_of([200]))
    assert engine.swa_pool is not None
    engine.swa_pool.reset_prefix_cache()
    got = run(engine, requests_of([200]))
    assert got["200"].num_prefix_hit_tokens == 0
    assert_same(got, plain.results)


def test_a_second_turn_finds_the_first(plain: Plain) -> None:
    engine = plain.make_engine()
    answer = run(engine, requests_of([111]))["111"].token_ids
    turn = ask("turn", make_prompt(111) + answer + make_prompt(9, seed=2))
    got = run(engine, [turn])["turn"]
    assert got.num_prefix_hit_tokens == (111 + MAX_TOKENS - 1) // 16 * 16
    assert got.token_ids == plain.alone(turn)


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_preempted_equals_undisturbed(
    plain: Plain, enable_prefix_caching: bool, async_scheduling: bool
) -> None:
    engine = plain.make_engine(
        enable_prefix_caching=enable_prefix_caching,
        async_scheduling=async_scheduling,
        page_memory=plain.memory_for(220),
        max_model_len=220,
        **LIMITS,
    )
    assert_same(run(engine, requests_of()), plain.results)
    assert_same(run(engine, requests_of()), plain.results)
    assert engine.scheduler.num_preemptions_total > 0


def test_aborts_leave_nothing_held(plain: Plain) -> None:
    engine = plain.make_engine(async_scheduling=True, max_num_batched_tokens=50)
    results = {str(length): Result() for length in LENGTHS}
    for request in requests_of():
        engine.add(request)
    for name in ("200", "129", "8"):
        step(engine, results)
        step(engine, results)
        engine.abort([name])
        engine.scheduler.check()
        results.pop(name)
    while engine.has_unfinished:
        for output in engine.step():
            if output.request_id in results:
                results[output.request_id].add(output)
        engine.scheduler.check()
    assert_same(results, plain.results)
    for pool in (engine.pool, engine.swa_pool):
        assert pool is not None
        assert pool.num_free_pages == pool.num_pages


def test_window_pages_are_reported(plain: Plain) -> None:
    info, stats = plain.engine.info, plain.engine.stats
    assert [part.name for part in info.cache] == ["raw", "compressed", "window", "tail"]
    assert info.num_swa_pages == stats.num_swa_pages == stats.num_free_swa_pages > 0
    window = info.cache[2]
    assert window.total_bytes == window.bytes_per_token * info.num_swa_pages * info.page_size
