"""Random sequences of add, abort and step on a real engine: no page leaks, no token changes.

With every step finished at once, and with a step in flight.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.engine import Engine
from nsa_serve.request import EngineRequest, FinishReason, SamplingParams
from tests.engine.engine_runs import Result, make_engine, make_prompt, run_alone, step

# Admission leaves room for one output token: only longer answers run requests out of pages.
MAX_TOKENS = 30
LENGTHS = (1, 7, 15, 16, 17, 30, 33, 48, 64)

adds = st.tuples(
    st.just("add"),
    st.sampled_from(LENGTHS),
    st.sampled_from((0, 16, 20)),  # tokens shared with every other prompt
    st.sampled_from((1, 5, MAX_TOKENS)),
    st.integers(-1, 1),  # priority
)
aborts = st.tuples(st.just("abort"), st.integers(0, 30))
steps = st.tuples(st.just("step"), st.integers(1, 12))
operations = st.lists(st.one_of(adds, adds, aborts, steps), min_size=4, max_size=30)


def shared_prompt(length: int, num_shared: int) -> list[int]:
    num_shared = min(length, num_shared)
    return make_prompt(20)[:num_shared] + make_prompt(length - num_shared, seed=3)


class Uncontended:
    """What each prompt gives alone in an engine with room; longer answers begin with shorter."""

    def __init__(self, folder: Path) -> None:
        self._engine = make_engine(folder, enable_prefix_caching=False)
        self._token_ids: dict[tuple[int, ...], list[int]] = {}

    def token_ids(self, prompt: list[int], params: SamplingParams) -> list[int]:
        key = tuple(prompt)
        if key not in self._token_ids:
            full = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
            request = EngineRequest(request_id="r", prompt_token_ids=prompt, params=full)
            self._token_ids[key] = run_alone(self._engine, [request])["r"].token_ids
        return self._token_ids[key][: params.max_tokens]


class Driver:
    """Apply operations to an engine and keep what is expected of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: dict[str, EngineRequest] = {}
        self.results: dict[str, Result] = {}
        self.aborted: set[str] = set()

    def add(self, length: int, num_shared: int, max_tokens: int, priority: int) -> None:
        name = str(len(self.requests))
        request = EngineRequest(
            request_id=name,
            prompt_token_ids=shared_prompt(length, num_shared),
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            priority=priority,
        )
        self.engine.add(request)
        self.requests[name], self.results[name] = request, Result()

    def abort(self, number: int) -> None:
        """Abort one of the requests so far, ended or not, or an id that never was."""
        name = str(number)
        if name in self.results and self.results[name].finish_reason is None:
            self.aborted.add(name)
        self.engine.abort([name])

    def step(self, count: int) -> None:
        for _ in range(count):
            step(self.engine, self.results)


@pytest.fixture(scope="module", params=["nsa", "llama"])
def uncontended(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> Uncontended:
    return Uncontended(checkpoints[request.param])


@pytest.fixture(scope="module", params=[False, True], ids=["finished", "overlapped"])
def engine(uncontended: Uncontended, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Six pages of 16 tokens for requests that want up to six each: contention is the rule."""
    info = uncontended._engine.info
    page_bytes = sum(part.total_bytes for part in info.cache) // info.num_pages
    yield make_engine(
        Path(uncontended._engine.config.model),
        page_memory=7 * page_bytes,
        max_num_seqs=4,
        max_num_batched_tokens=29,
        scheduling_policy="priority",
        async_scheduling=request.param,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(operations)
def test_no_page_leaks_and_no_token_changes(
    engine: Engine, uncontended: Uncontended, operations: list[tuple[object, ...]]
) -> None:
    driver = Driver(engine)
    for name, *arguments in operations:
        getattr(driver, str(name))(*arguments)
        engine.scheduler.check()
    while engine.has_unfinished:
        driver.step(1)
    assert engine.pool.num_free_pages == engine.pool.num_pages == 6
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    for name, result in driver.results.items():
        request = driver.requests[name]
        want = uncontended.token_ids(request.prompt_token_ids, request.params)
        if name in driver.aborted:
            assert result.finish_reason is None
            assert result.token_ids == want[: len(result.token_ids)]
        else:
            assert result.finish_reason is FinishReason.LENGTH
            assert result.token_ids == want


def test_the_random_runs_do_preempt_and_do_share(engine: Engine) -> None:
    """Runs after the test above, on its engine: what it covered must have happened."""
    assert engine.scheduler.num_preemptions_total > 0
    assert engine.scheduler.prefix_cache_hits_total > 0
