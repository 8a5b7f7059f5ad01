"""Steps in flight change nothing: overlapped stepping against finishing each step at once.

Which requests share a step differs between the two, since an end is seen one step later, and with
it the last bits of logits: tokens are equal in fp32, log-probabilities are compared in fp64.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_serve.batch import PromptSpan
from nsa_serve.engine import Engine
from nsa_serve.engine_process import EMPTY_STEP_PAUSE_S, _Loop
from nsa_serve.llm import LLM
from nsa_serve.messages import EngineStats, Shutdown, StepOutputs
from nsa_serve.model_source import load_tokenizer
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    Request,
    RequestStatus,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
    TraceParams,
)
from nsa_serve.scheduler_output import ScheduledRow
from nsa_serve.step_pipeline import StepPipeline
from nsa_serve.structured import grammar
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run, step
from tests.engine.test_engine import PAGE_BYTES
from tests.engine.test_invariants import assert_near

LENGTHS = (1, 5, 15, 16, 17, 33, 64, 111)
MAX_TOKENS = 24
SMALL = 15 * PAGE_BYTES  # too few pages for all requests at once
PERSON = grammar.regex(r"[a-z]{2,6}(, [a-z]{1,4}){1,5}!", param="regex")


def sampled(**options: Any) -> SamplingParams:
    values = {"max_tokens": MAX_TOKENS, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    return SamplingParams(**(values | options))


CASES: dict[str, SamplingParams] = {
    "greedy": greedy(MAX_TOKENS, logprobs=3, prompt_logprobs=1),
    "eos": sampled(ignore_eos=False, temperature=1.5, max_tokens=200, logit_bias={2: 6.0}),
    "seeded": sampled(top_k=40, top_p=0.9, min_p=0.01, logprobs=2),
    "penalties": sampled(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6, logprobs=0
    ),
    "greedy penalties": greedy(MAX_TOKENS, frequency_penalty=1.0),
    "bad words": greedy(MAX_TOKENS, bad_words=tuple((a, b) for a in range(90) for b in (7, 90))),
    "min tokens": sampled(min_tokens=9, ignore_eos=False, logit_bias={2: 5.0}),
    "grammar": SamplingParams(structured=PERSON, max_tokens=60, seed=3),
    "grammar cut": SamplingParams(structured=PERSON, max_tokens=5, seed=3, logprobs=1),
    "one token": greedy(1, logprobs=1),
    "two tokens": greedy(2, logprobs=1),
    "prompt only": greedy(0, prompt_logprobs=2),
}


@pytest.fixture(scope="module")
def folder(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["llama"]


def make_pair(folder: Path, **options: Any) -> tuple[Engine, Engine]:
    """Two engines of one kind: one that finishes every step at once, one that overlaps them."""
    options = {"page_memory": SMALL, "max_num_seqs": 6, "max_num_batched_tokens": 70} | options
    return (
        make_engine(folder, async_scheduling=False, **options),
        make_engine(folder, async_scheduling=True, **options),
    )


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    engines = make_pair(folder)
    yield engines
    for engine in engines:
        engine.close()


def ask(name: str, length: int, params: SamplingParams, **options: Any) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=make_prompt(length), params=params, **options
    )


def assert_equal(got: Mapping[str, Result], want: Mapping[str, Result]) -> None:
    assert {name: r.token_ids for name, r in got.items()} == {
        name: r.token_ids for name, r in want.items()
    }
    for name, result in got.items():
        assert result.finish_reason is want[name].finish_reason
        assert_near(result.logprobs, want[name].logprobs)
        assert (result.prompt_logprobs is None) == (want[name].prompt_logprobs is None)
        assert_near(result.prompt_logprobs or [], want[name].prompt_logprobs or [])


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_request_is_the_same_overlapped(
    pair: tuple[Engine, Engine], case: str
) -> None:
    requests = [ask(str(length), length, CASES[case]) for length in LENGTHS]
    finished, overlapped = (run(engine, requests) for engine in pair)
    assert {name: (r.token_ids, r.finish_reason) for name, r in overlapped.items()} == {
        name: (r.token_ids, r.finish_reason) for name, r in finished.items()
    }


def test_the_cases_are_not_trivial(pair: tuple[Engine, Engine]) -> None:
    """Runs after the test above: requests were preempted and shared pages, and some ended early."""
    for engine in pair:
        assert engine.scheduler.num_preemptions_total > 0
        assert engine.scheduler.prefix_cache_hits_total > 0
    for case in ("eos", "grammar", "min tokens"):
        requests = [ask(str(length), length, CASES[case]) for length in LENGTHS]
        results = run(pair[1], requests).values()
        assert {FinishReason.STOP} <= {result.finish_reason for result in results}
        assert len({len(result.token_ids) for result in results}) > 1


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_log_probabilities_are_the_same_overlapped(
    folder: Path, enable_prefix_caching: bool
) -> None:
    engines = make_pair(
        folder,
        dtype=torch.float64,
        page_memory=2 * SMALL,
        enable_prefix_caching=enable_prefix_caching,
    )
    requests = [
        ask(f"{case} {length}", length, CASES[case])
        for length, case in itertools.product(LENGTHS, ("greedy", "seeded", "penalties"))
    ]
    finished, overlapped = (run(engine, requests) for engine in engines)
    assert_equal(overlapped, finished)
    assert all(engine.scheduler.num_preemptions_total > 0 for engine in engines)


def test_a_mixed_batch_is_the_same_overlapped(pair: tuple[Engine, Engine]) -> None:
    """Rows that need history hold up the sampling of a step, and nothing else."""
    cases = itertools.cycle(CASES.values())
    requests = [
        ask(f"{number}", length, next(cases))
        for number, length in enumerate(LENGTHS + LENGTHS[::-1] + LENGTHS)
    ]
    finished, overlapped = (run(engine, requests) for engine in pair)
    assert {name: r.token_ids for name, r in overlapped.items()} == {
        name: r.token_ids for name, r in finished.items()
    }


def test_a_trace_has_the_blocks_of_its_tokens(pair: tuple[Engine, Engine]) -> None:
    trace = TraceParams(max_tokens=7)
    traces = []
    for engine in pair:
        outputs: list[TokenOutput] = []
        engine.add(ask("r", 111, greedy(10), trace=trace))
        while engine.has_unfinished:
            outputs += engine.step()
        traces.append([output.blocks for output in outputs])
    assert traces[0] == traces[1]
    assert [blocks is not None for blocks in traces[1]] == [True] * 7 + [False] * 3


@pytest.mark.parametrize("position", [0, 1, 2, 7])
def test_a_stop_token_is_seen_one_step_late_and_nothing_follows_it(
    pair: tuple[Engine, Engine], position: int
) -> None:
    free = run(pair[0], [ask("r", 33, greedy(MAX_TOKENS))])["r"].token_ids
    stop = free[position]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=(stop,))
    for engine in pair:
        result = run(engine, [ask("r", 33, params)])["r"]
        assert result.token_ids == free[: free.index(stop) + 1]
        assert result.finish_reason is FinishReason.STOP


def test_stop_strings_and_samples_are_the_same_overlapped(pair: tuple[Engine, Engine]) -> None:
    results = []
    for engine in pair:
        llm = LLM.from_engine(engine, load_tokenizer(engine.config))
        free = llm.generate([make_prompt(33)], sampled(), n=3, use_tqdm=False)
        stop = free[0].text[len(free[0].text) // 2 :][:3]
        stopped = llm.generate([make_prompt(33)], sampled(stop=(stop,)), n=3, use_tqdm=False)
        assert stopped[0].finish_reason is FinishReason.STOP
        results.append([(output.index, output.token_ids, output.text) for output in free + stopped])
    assert results[0] == results[1]


# What a step in flight means to the caller


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = make_engine(
        folder, async_scheduling=True, page_memory=SMALL, max_num_batched_tokens=64
    )
    yield engine
    engine.close()


def test_a_call_returns_the_tokens_of_the_step_before(engine: Engine) -> None:
    assert not engine.has_step_in_flight
    assert engine.stats.num_steps_total == 0
    engine.add(ask("r", 100, greedy(3)))
    steps = []
    while engine.has_unfinished:
        tokens = [output.token_ids for output in engine.step()]
        stats = engine.stats
        steps.append((len(tokens), stats.num_steps_total, stats.num_step_tokens))
    # Chunks of 64 and 36 tokens, then two decode rows: the third token is never run.
    assert steps == [(0, 0, 0), (0, 1, 64), (1, 2, 36), (1, 3, 1), (1, 4, 1)]
    assert not engine.has_step_in_flight
    assert engine.step() == []
    assert engine.stats.num_step_tokens == 0


def test_an_abort_in_flight_frees_at_once_and_the_step_still_ends(engine: Engine) -> None:
    engine.add(ask("r", 30, greedy(9)))
    engine.step()
    engine.step()
    engine.abort(["r"])
    assert engine.pool.num_free_pages == engine.pool.num_pages
    assert engine.has_unfinished
    assert engine.step() == []
    assert not engine.has_unfinished


def test_the_same_id_may_come_back_while_its_old_row_is_in_flight(engine: Engine) -> None:
    want = run(engine, [ask("r", 40, greedy(6))])["r"].token_ids
    engine.add(ask("r", 30, greedy(9)))
    engine.step()
    engine.step()
    engine.abort(["r"])
    assert run(engine, [ask("r", 40, greedy(6))])["r"].token_ids == want


def test_close_in_flight(engine: Engine) -> None:
    engine.add(ask("r", 30, greedy(9)))
    engine.step()
    engine.close()
    assert not engine.has_unfinished
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_a_row_that_fails_in_flight_fails_alone(engine: Engine) -> None:
    """The row behind the one that fails is launched already, and goes nowhere."""
    want = run(engine, [ask("good", 20, greedy(6))])["good"].token_ids
    banned = SamplingParams(
        max_tokens=9, temperature=0.0, min_tokens=3, stop_token_ids=tuple(range(300))
    )
    engine.add(ask("bad", 9, banned))
    engine.add(ask("good", 20, greedy(6)))
    tokens: list[int] = []
    errors: list[str | None] = []
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
            errors += [output.error] if output.error else []
        engine.scheduler.check()
    assert errors == ["every token was excluded: loosen min_tokens"]
    assert tokens == want


@pytest.mark.parametrize("method", ["launch", "sample", "result"])
@pytest.mark.parametrize("params", [greedy(6), greedy(6, frequency_penalty=0.5)])
@pytest.mark.parametrize("number", range(4))
def test_a_step_that_breaks_is_taken_back_and_can_be_run_again(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    params: SamplingParams,
    number: int,
) -> None:
    requests = [ask("a", 20, params), ask("b", 75, params)]
    want = {name: result.token_ids for name, result in run(engine, requests).items()}
    engine.pool.reset_prefix_cache()
    results = {request.request_id: Result() for request in requests}
    for request in requests:
        engine.add(request)
    with monkeypatch.context() as patch:
        original, calls = getattr(engine.runner, method), itertools.count()

        def break_once(*arguments: Any) -> Any:
            if next(calls) == number:
                raise RuntimeError("the device is gone")
            return original(*arguments)

        patch.setattr(engine.runner, method, break_once)
        with pytest.raises(RuntimeError, match="the device is gone"):
            while engine.has_unfinished:
                step(engine, results)
        engine.scheduler.check()
        assert not engine.has_step_in_flight
    while engine.has_unfinished:
        step(engine, results)
    assert {name: result.token_ids for name, result in results.items()} == want
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_random_arrivals_aborts_and_ends_leak_nothing(folder: Path) -> None:
    rng = random.Random(7)
    finished, overlapped = make_pair(folder, scheduling_policy="priority", max_num_seqs=5)
    params = [item for name, item in CASES.items() if name != "bad words"]
    results: dict[str, Result] = {}
    requests: dict[str, EngineRequest] = {}
    aborted = set()
    for number in range(700):
        if rng.random() < 0.22 and len(requests) - len(aborted) < 90:
            name = str(number)
            requests[name] = ask(
                name, rng.choice(LENGTHS), rng.choice(params), priority=rng.randint(-1, 1)
            )
            results[name] = Result()
            overlapped.add(requests[name])
        if results and rng.random() < 0.3:
            name = rng.choice(list(results))
            if results[name].finish_reason is None:
                aborted.add(name)
                overlapped.abort([name])
        step(overlapped, results)
    while overlapped.has_unfinished:
        step(overlapped, results)
    assert overlapped.pool.num_free_pages == overlapped.pool.num_pages
    assert overlapped.scheduler.num_preemptions_total > 0
    assert len(aborted) > 5
    want = run(finished, list(requests.values()))
    for name, result in results.items():
        if name in aborted:
            assert result.token_ids == want[name].token_ids[: len(result.token_ids)]
        else:
            assert result.token_ids == want[name].token_ids
            assert result.finish_reason is want[name].finish_reason


def test_prompt_log_probabilities_of_a_preempted_run_are_dropped() -> None:
    request = Request(ask("r", 9, greedy(1, prompt_logprobs=0)))
    request.status = RequestStatus.RUNNING
    span = PromptSpan(ScheduledRow(request, 0, 9, samples=True), 0, [*range(8)])
    entry = TokenLogprobs(1, -1.0, 1, [])
    span.report([entry])
    assert request.prompt_logprobs == [entry]
    request.num_preemptions += 1
    request.prompt_logprobs = []
    span.report([entry])
    assert request.prompt_logprobs == []


def test_no_mask_is_made_for_a_request_that_ended(engine: Engine) -> None:
    """Its grammar may be at its end, where nothing may follow."""
    request = Request(ask("r", 9, CASES["grammar"]))
    request.matcher = engine.grammars.compile(PERSON).result()
    assert engine.grammars.start([request]) is not None
    request.status = RequestStatus.FINISHED
    assert engine.grammars.start([request]) is None


class ScriptedInbox:
    """Notes how long the loop would have waited for messages, and ends it after some steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.timeouts_s: list[float] = []

    def drain(self, *, timeout_s: float) -> list[Shutdown]:
        self.timeouts_s.append(timeout_s)
        return [Shutdown()] if len(self.timeouts_s) > self.num_steps else []


class NullChannel:
    """Takes what is sent."""

    def send(self, _message: StepOutputs) -> None:
        pass


@pytest.mark.parametrize("has_step_in_flight", [False, True])
def test_the_engine_loop_waits_in_the_step_and_not_before_it(has_step_in_flight: bool) -> None:
    class WaitingEngine:
        has_unfinished = True
        stats = EngineStats()

        def step(self) -> list[TokenOutput]:
            return []

    engine = WaitingEngine()
    engine.has_step_in_flight = has_step_in_flight  # type: ignore[attr-defined]
    inbox = ScriptedInbox(3)
    _Loop(engine, NullChannel(), inbox, heartbeat_s=1.0).run()  # type: ignore[arg-type]
    pause_s = 0.0 if has_step_in_flight else EMPTY_STEP_PAUSE_S
    assert inbox.timeouts_s == [0.0, pause_s, pause_s, pause_s]


def test_nothing_is_read_of_a_step_before_the_next_is_launched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What overlapping is for; sampling that needs history comes last, and only then."""
    calls: list[str] = []
    for name in ("launch", "sample", "result"):
        original = getattr(engine.runner, name)

        def record(*arguments: Any, _name: str = name, _original: Any = original) -> Any:
            calls.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(engine.runner, name, record)
    assert isinstance(engine._pipeline, StepPipeline)
    expected = {
        greedy(4): ["launch", "sample"] + ["launch", "sample", "result"] * 3 + ["result"],
        greedy(4, frequency_penalty=1.0): (
            ["launch", "sample"] + ["launch", "result", "sample"] * 3 + ["result"]
        ),
    }
    for params, order in expected.items():
        calls.clear()
        run(engine, [ask("r", 9, params)])
        assert calls == order
