"""Every way to choose tokens: the GPU engine, its steps overlapped, gives what the CPU engine does.

Draws are by seed and position on both, so that samples are equal too. A token differs only when a
random number, or the end of a cut by probability, falls within 1e-5 of the edge of a token: once in
some 1e5 tokens, and in none of these.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nsa_serve.engine import Engine
from nsa_serve.model_source import load_tokenizer
from nsa_serve.request import EngineRequest, FinishReason, SamplingParams
from nsa_serve.structured import grammar
from tests.engine.engine_runs import Result, greedy, make_engine, run, step
from tests.engine.test_gpu_engine import TOLERANCE, engine_options, is_on_gpu
from tests.engine.test_invariants import assert_near

# The same proofs as on the CPU, with the `pair` and the `engine` of this module.
from tests.engine.test_overlap import (  # noqa: F401
    CASES,
    LENGTHS,
    MAX_TOKENS,
    SMALL,
    ask,
    sampled,
    test_a_call_returns_the_tokens_of_the_step_before,
    test_a_mixed_batch_is_the_same_overlapped,
    test_a_row_that_fails_in_flight_fails_alone,
    test_a_step_that_breaks_is_taken_back_and_can_be_run_again,
    test_a_stop_token_is_seen_one_step_late_and_nothing_follows_it,
    test_an_abort_in_flight_frees_at_once_and_the_step_still_ends,
    test_close_in_flight,
    test_every_kind_of_request_is_the_same_overlapped,
    test_nothing_is_read_of_a_step_before_the_next_is_launched,
    test_stop_strings_and_samples_are_the_same_overlapped,
    test_the_same_id_may_come_back_while_its_old_row_is_in_flight,
)
from tests.engine.test_structured import CHOICES, EOS, PERSON, check_person
from tests.util import VOCAB_SIZE

pytestmark = pytest.mark.gpu

CHOICE = grammar.choice(CHOICES, param="choice")
MORE_CASES: dict[str, SamplingParams] = {
    "temperature": sampled(temperature=1.3, logprobs=5),
    "cold": sampled(temperature=0.01, logprobs=1),
    "one of one": sampled(top_k=1, logprobs=1),
    "top k": sampled(top_k=7, logprobs=1),
    "top k of all": sampled(top_k=VOCAB_SIZE + 5),
    "top p": sampled(top_p=0.5, temperature=1.5),
    "tiny top p": sampled(top_p=1e-6, logprobs=1),
    "min p": sampled(min_p=0.2, temperature=2.0),
    "only the likeliest": sampled(min_p=1.0),
    "other seed": sampled(seed=-(2**63)),
    "bias": sampled(logit_bias={5: 4.0, 77: -100.0, 299: 3.5}, logprobs=20),
    "greedy bias": greedy(MAX_TOKENS, logit_bias={5: 6.0, 7: 6.0}, logprobs=2),
    "allowed": sampled(allowed_token_ids=(9, 3, 299, 41), logprobs=4),
    "greedy allowed": greedy(MAX_TOKENS, allowed_token_ids=tuple(range(10, 60)), logprobs=1),
    "bad words": sampled(bad_words=((5,), (9, 41), (100, 7, 3)), temperature=1.5),
    "stop tokens": sampled(stop_token_ids=tuple(range(0, 300, 9)), temperature=1.5),
    "repetition": greedy(MAX_TOKENS, repetition_penalty=1.7, logprobs=1),
    "presence": greedy(MAX_TOKENS, presence_penalty=-1.5, logprobs=1),
    "everything": sampled(
        temperature=1.2,
        top_k=90,
        top_p=0.97,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={11: 2.0, 12: -2.0},
        bad_words=((3,), (11, 12)),
        min_tokens=5,
        stop_token_ids=(50, 60, 70),
        ignore_eos=False,
        logprobs=3,
        prompt_logprobs=3,
    ),
    "schema": SamplingParams(structured=PERSON, max_tokens=200, seed=4),
    "greedy schema": SamplingParams(structured=PERSON, max_tokens=200, temperature=0.0),
    "choice": SamplingParams(structured=CHOICE, max_tokens=60, seed=4, logprobs=2),
    "schema with penalties": SamplingParams(
        structured=PERSON, max_tokens=200, seed=6, frequency_penalty=0.4, logprobs=1
    ),
}


@pytest.fixture(scope="module")
def folder(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def pair(folder: Path, engine_device: str) -> Iterator[tuple[Engine, Engine]]:
    """The CPU engine, and the GPU's, which preempts since its pages are few."""
    options = {"page_memory": SMALL, "max_num_seqs": 6, "max_num_batched_tokens": 70}
    engines = (
        make_engine(folder, async_scheduling=False, **options),
        make_engine(folder, **engine_options(engine_device, **options)),
    )
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def roomy_pair(folder: Path, engine_device: str) -> Iterator[tuple[Engine, Engine]]:
    """The same with seats and pages for all: log-probabilities beside many other rows."""
    engines = (
        make_engine(folder, max_num_seqs=32, page_memory="8MiB"),
        make_engine(folder, **engine_options(engine_device, max_num_seqs=32, page_memory="8MiB")),
    )
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(folder: Path, engine_device: str) -> Iterator[Engine]:
    options = {"page_memory": SMALL, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    engine = make_engine(folder, **engine_options(engine_device, **options))
    yield engine
    engine.close()


def assert_equal(got: Mapping[str, Result], want: Mapping[str, Result]) -> None:
    assert {name: r.token_ids for name, r in got.items()} == {
        name: r.token_ids for name, r in want.items()
    }
    for name, result in got.items():
        assert result.finish_reason is want[name].finish_reason
        assert_near(result.logprobs, want[name].logprobs, TOLERANCE)
        assert (result.prompt_logprobs is None) == (want[name].prompt_logprobs is None)
        assert_near(result.prompt_logprobs or [], want[name].prompt_logprobs or [], TOLERANCE)


@pytest.mark.parametrize("case", MORE_CASES)
def test_every_option_chooses_the_same_tokens(pair: tuple[Engine, Engine], case: str) -> None:
    requests = [ask(str(length), length, MORE_CASES[case]) for length in LENGTHS]
    want, got = (run(engine, requests) for engine in pair)
    assert_equal(got, want)


def test_the_pair_preempts_and_shares_pages(pair: tuple[Engine, Engine]) -> None:
    """Or the tests above would prove little. By itself, since tests may run in any process."""
    requests = [ask(str(length), length, CASES["seeded"]) for length in LENGTHS]
    for engine in pair:
        for _ in range(2):
            run(engine, requests)
        assert engine.scheduler.num_preemptions_total > 0
        assert engine.scheduler.prefix_cache_hits_total > 0


def test_all_options_at_once_beside_each_other(roomy_pair: tuple[Engine, Engine]) -> None:
    """A row is chosen by its own options, whatever its neighbours ask for."""
    requests = [
        ask(f"{name} {length}", length, params)
        for name, params in {**CASES, **MORE_CASES}.items()
        for length in (5, 33)
    ]
    want, got = (run(engine, requests) for engine in roomy_pair)
    assert_equal(got, want)
    random.Random(1).shuffle(requests)
    assert_equal(run(roomy_pair[1], requests), want)


def test_structured_outputs_match_what_was_asked_for(pair: tuple[Engine, Engine]) -> None:
    tokenizer = load_tokenizer(pair[1].config)
    checks: dict[str, Callable[[str], object]] = {
        "schema": check_person,
        "greedy schema": check_person,
        "schema with penalties": check_person,
        "choice": lambda text: CHOICES.index(text),
    }
    requests = [
        ask(f"{case}/{length}", length, MORE_CASES[case])
        for case, length in itertools.product(checks, LENGTHS)
    ]
    num_ended = 0
    for name, result in run(pair[1], requests).items():
        if result.finish_reason is FinishReason.STOP:
            assert result.token_ids[-1] == EOS
            checks[name.partition("/")[0]](
                tokenizer.decode(result.token_ids[:-1], skip_special_tokens=False)
            )
            num_ended += 1
    assert num_ended > len(requests) // 2


def test_samples_without_a_seed_differ(engine: Engine) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, ignore_eos=True)
    results = run(engine, [ask(str(number), 33, params) for number in range(6)])
    assert len({tuple(result.token_ids) for result in results.values()}) == 6


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of kernels that Triton compiles, or loads from its cache."""
    from triton import knobs

    names: list[str] = []

    def note(*arguments: Any, **options: Any) -> None:
        function = options.get("fn", arguments[-1] if arguments else None)
        names.append(f"{getattr(function, 'name', function)}: {options.get('repr', '')}")

    previous = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = previous


@pytest.mark.parametrize("name", ["llama", "llama-nsa", "llama-mlp"])
def test_a_random_load_compiles_nothing_and_leaks_nothing(
    checkpoints: Mapping[str, Path], engine_device: str, name: str
) -> None:
    """Prompts of any length arrive, beside decode rows or not, with all options; some are aborted.

    Engines with other limits than those of the tests above: nothing was compiled before its start.
    """
    rng = random.Random(17)
    # Some 60 pages of 16 tokens: requests are preempted.
    options = {"page_memory": 900_000, "max_num_seqs": 19, "scheduling_policy": "priority"}
    engine = make_engine(checkpoints[name], **engine_options(engine_device, **options))
    params = [*CASES.values(), *MORE_CASES.values()]
    longest = engine.scheduler.max_request_tokens - 210
    results: dict[str, Result] = {}
    requests: dict[str, EngineRequest] = {}
    aborted: set[str] = set()
    with compilations() as compiled:
        for number in range(900):
            # Bursts, and times with a few rows only.
            if len(requests) < 150 and rng.random() < (0.5 if number % 300 < 100 else 0.03):
                request = ask(
                    str(number),
                    rng.randint(1, longest if rng.random() < 0.3 else 100),
                    rng.choice(params),
                    priority=rng.randint(-1, 1),
                )
                requests[request.request_id] = request
                results[request.request_id] = Result()
                engine.add(request)
            if rng.random() < 0.05 and requests:
                victim = rng.choice(list(requests))
                if results[victim].finish_reason is None:
                    aborted.add(victim)
                    engine.abort([victim])
            step(engine, results)
        while engine.has_unfinished:
            step(engine, results)
    assert compiled == []
    assert engine.pool.num_free_pages == engine.pool.num_pages
    assert engine.scheduler.num_preemptions_total > 0
    assert engine.scheduler.prefix_cache_hits_total > 0
    assert len(aborted) > 3
    assert not is_on_gpu(engine) or (engine.stats.num_graph_replays_total or 0) > 100
    engine.close()
    reference = make_engine(checkpoints[name], max_num_seqs=64)
    want = run(reference, list(requests.values()))
    for request_id, result in results.items():
        wanted = want[request_id]
        if request_id in aborted:
            assert result.token_ids == wanted.token_ids[: len(result.token_ids)]
        else:
            assert result.token_ids == wanted.token_ids
            assert result.finish_reason is wanted.finish_reason
    reference.close()


def test_text_is_valid_json_at_the_end_of_a_schema(pair: tuple[Engine, Engine]) -> None:
    """Rows that wait for their grammar share a step with rows that do not."""
    tokenizer = load_tokenizer(pair[1].config)
    requests = [
        ask("person", 33, SamplingParams(structured=PERSON, max_tokens=200, temperature=0.0)),
        *(ask(str(length), length, greedy(40)) for length in (5, 64)),
    ]
    got, want = run(pair[1], requests), run(pair[0], requests)
    assert_equal(got, want)
    assert json.loads(tokenizer.decode(got["person"].token_ids, skip_special_tokens=True))
