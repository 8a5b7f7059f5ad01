"""The GPU engine gives the CPU engine's tokens, whatever it does to give them fast.

In fp32. The plain run that everything is compared with is the CPU's: a request alone, its prompt in
one piece, nothing cached, no step in flight. Tokens are equal: the two likeliest tokens of these
checkpoints are never nearer than 1e-3. Log-probabilities differ by the order of sums and by
products of three tf32 pieces, which keep 22 bits: the orders of the CPU alone make up to 2e-5
(fp32 against fp64), and the tolerance is five times that.

    pytest tests/engine/test_gpu_engine.py                        # on a GPU
    pytest tests/engine/test_gpu_engine.py --engine-device cpu    # tries the tests out without one
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_serve.engine import Engine
from nsa_serve.request import EngineRequest, FinishReason, SamplingParams
from tests.engine.engine_runs import (
    Result,
    greedy,
    make_engine,
    make_prompt,
    run,
    run_alone,
    step,
)

# The same proofs as on the CPU, with the `plain` of this module.
from tests.engine.test_invariants import (  # noqa: F401
    CHECKPOINTS,
    LENGTHS,
    MAX_TOKENS,
    Plain,
    assert_same,
    make_requests,
    test_a_prefix_hit_changes_nothing,
    test_a_prefix_hit_on_generated_tokens_changes_nothing,
    test_a_repeated_prompt_hits_all_but_its_last_page,
    test_batched_equals_alone,
    test_chunked_equals_whole,
    test_n_samples_are_those_of_consecutive_seeds,
    test_preempted_equals_undisturbed,
    test_requests_that_arrive_together_share_a_prefix,
    test_salts_keep_prefixes_apart,
    test_seeded_samples_are_the_same_alone_and_batched,
)
from tests.util import write_checkpoint

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4
# Rows that have a graph: 1, 2, 4, 8, 16, 24, 32 and 33.
MAX_NUM_SEQS = 33
BATCH_SIZES = (1, 2, 3, 8, 9, 17, 33, 40)
# Pages of 16 tokens, contexts with graphs of their own: 4608 and 9216 tokens, and the model's own.
LONG_MODEL_LEN = 10_000
CONTEXTS = (4600, 4607, 4608, 4609, 9210, 9985)


def engine_options(device: str, **options: Any) -> dict[str, Any]:
    """Options of an engine under test; without a GPU, it is the CPU's with overlapped steps."""
    if device == "cpu":
        cpu = {"device": "cpu", "async_scheduling": True}
        return {**cpu, **{k: v for k, v in options.items() if k != "enforce_eager"}}
    # Tests run side by side on one GPU: none of them may take what is free.
    # Few seats, since an engine records a graph for every batch size.
    return {"device": "cuda", "page_memory": "64MiB", "max_num_seqs": 4, **options}


def make_plain(
    folder: Path, device: str, lengths: Sequence[int], *, max_tokens: int = MAX_TOKENS
) -> Plain:
    engine = make_engine(folder, enable_prefix_caching=False)
    requests = make_requests(greedy(max_tokens, logprobs=3, prompt_logprobs=2), lengths)
    results = run_alone(engine, requests)
    options = engine_options(device)
    return Plain(folder, torch.float32, engine, lengths, results, options, TOLERANCE)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def plain(
    request: pytest.FixtureRequest, checkpoints: Mapping[str, Path], engine_device: str
) -> Plain:
    return make_plain(checkpoints[request.param], engine_device, LENGTHS)


@pytest.fixture(scope="module")
def engine(plain: Plain) -> Iterator[Engine]:
    """One engine for the tests that need no other; whoever looks at prefix hits resets them."""
    engine = plain.make_engine(max_num_seqs=MAX_NUM_SEQS)
    yield engine
    engine.close()


def num_graph_replays(engine: Engine) -> int:
    """Steps that ran as a graph; 0 where there are none, as without a GPU."""
    return engine.stats.num_graph_replays_total or 0


def is_on_gpu(engine: Engine) -> bool:
    return engine.info.device.startswith("cuda")


def ask(name: str, length: int, params: SamplingParams, *, seed: int = 0) -> EngineRequest:
    prompt = make_prompt(length, seed=seed)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params)


@pytest.mark.parametrize(
    ("enforce_eager", "async_scheduling"), [*itertools.product((False, True), (False, True))]
)
def test_graphs_and_steps_in_flight_change_nothing(
    plain: Plain, enforce_eager: bool, async_scheduling: bool
) -> None:
    engine = plain.make_engine(
        enforce_eager=enforce_eager if plain.options["device"] == "cuda" else False,
        async_scheduling=async_scheduling,
        enable_prefix_caching=False,
        max_num_seqs=9,
    )
    params = greedy(MAX_TOKENS, logprobs=3, prompt_logprobs=2)
    before = num_graph_replays(engine)
    assert_same(plain, run(engine, plain.requests(params)), plain.results)
    is_replayed = is_on_gpu(engine) and not enforce_eager
    assert (num_graph_replays(engine) > before) == is_replayed
    engine.close()


@pytest.fixture(scope="module")
def crowd(plain: Plain) -> tuple[list[EngineRequest], dict[str, Result]]:
    """More requests than run at once, which end one after the other; and what each gives alone."""
    requests = [
        ask(f"{number}", 1 + number * 7 % 60, greedy(3 + number % 11, logprobs=1), seed=number)
        for number in range(max(BATCH_SIZES))
    ]
    return requests, run_alone(plain.engine, requests)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_every_batch_size_gives_each_request_its_own_tokens(
    plain: Plain,
    engine: Engine,
    crowd: tuple[list[EngineRequest], dict[str, Result]],
    batch_size: int,
) -> None:
    """Around the sizes that have a graph; padding rows and rows that end disturb nobody."""
    requests, want = crowd
    before = num_graph_replays(engine)
    for chosen in (requests[:batch_size], requests[-batch_size:][::-1]):
        assert_same(plain, run(engine, chosen), want)
    assert not is_on_gpu(engine) or num_graph_replays(engine) > before


def test_requests_that_join_and_leave_keep_their_rows(plain: Plain, engine: Engine) -> None:
    """One arrives every other step, so that prompts run beside decode rows all the time."""
    requests = plain.requests(greedy(MAX_TOKENS, logprobs=3))
    arrivals = [*requests]
    random.Random(3).shuffle(arrivals)
    results: dict[str, Result] = {}
    engine.pool.reset_prefix_cache()
    for number in itertools.count():
        if number % 2 == 0 and arrivals:
            request = arrivals.pop()
            results[request.request_id] = Result()
            engine.add(request)
        if not engine.has_unfinished:
            break
        step(engine, results)
    assert_same(plain, results, plain.results)
    assert engine.pool.num_free_pages == engine.pool.num_pages


def test_the_edges_of_max_tokens_and_of_the_context(plain: Plain, engine: Engine) -> None:
    context = engine.info.max_model_len
    assert context == 1024
    endless = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True, logprobs=1)
    requests = [
        ask("nothing", context, greedy(0, prompt_logprobs=1)),
        ask("one", context - 1, endless),
        ask("some", context - 20, endless),
        ask("short one", 1, greedy(1, logprobs=1)),
        ask("short none", 1, greedy(0)),
        ask("short two", 2, greedy(2, logprobs=1)),
    ]
    got = run(engine, requests)
    assert {name: len(result.token_ids) for name, result in got.items()} == {
        "nothing": 0,
        "one": 1,
        "some": 20,
        "short one": 1,
        "short none": 0,
        "short two": 2,
    }
    assert {result.finish_reason for result in got.values()} == {FinishReason.LENGTH}
    assert_same(plain, got, run_alone(plain.engine, requests))


def spoil(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every logit of a request NaN, as weights that overflow do, in its second step."""
    sample = engine.runner.sample
    num_steps = itertools.count()

    def spoil_and_sample(step: Any) -> None:
        batch = getattr(step, "batch", None)
        requests = step.requests if batch is None else batch.sampling_requests
        names = [request.request_id for request in requests]
        if name in names and next(num_steps) == 1:
            with torch.inference_mode():
                step.logits[names.index(name)] = torch.nan
        sample(step)

    monkeypatch.setattr(engine.runner, "sample", spoil_and_sample)


def test_a_row_without_numbers_fails_alone(
    plain: Plain, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = plain.requests(greedy(MAX_TOKENS, logprobs=3))
    spoil(engine, "bad", monkeypatch)
    engine.add(ask("bad", 30, greedy(MAX_TOKENS)))
    results = {request.request_id: Result() for request in requests}
    for request in requests:
        engine.add(request)
    errors: list[str] = []
    num_tokens = 0
    while engine.has_unfinished:
        for output in engine.step():
            if output.request_id != "bad":
                results[output.request_id].add(output)
                continue
            num_tokens += len(output.token_ids)
            if output.error is not None:
                assert output.finish_reason is FinishReason.ERROR
                errors.append(output.error)
        engine.scheduler.check()
    assert num_tokens == 1
    assert len(errors) == 1
    assert_same(plain, results, plain.results)
    assert engine.pool.num_free_pages == engine.pool.num_pages
    # Its pages, and the page of its row, do not spoil who comes after.
    monkeypatch.undo()
    engine.pool.reset_prefix_cache()
    assert_same(plain, run(engine, requests), plain.results)


def test_aborts_in_flight_leave_every_page_free(plain: Plain, engine: Engine) -> None:
    """After any number of steps, the rest are not disturbed, and the pages serve again."""
    requests = plain.requests(greedy(MAX_TOKENS, logprobs=3))
    for num_steps in (0, 1, 2, 3, 7):
        engine.pool.reset_prefix_cache()
        results = {request.request_id: Result() for request in requests}
        for request in requests:
            engine.add(request)
        for _ in range(num_steps):
            step(engine, results)
        aborted = [request.request_id for request in requests[::2]]
        engine.abort(aborted)
        while engine.has_unfinished:
            step(engine, results)
        assert engine.pool.num_free_pages == engine.pool.num_pages
        rest = {name: result for name, result in results.items() if name not in aborted}
        assert_same(plain, rest, plain.results)


# Contexts


@pytest.fixture(scope="module")
def long_plain(tmp_path_factory: pytest.TempPathFactory, engine_device: str) -> Plain:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("long"), seed=11, max_position_embeddings=LONG_MODEL_LEN
    )
    engine = make_engine(folder, enable_prefix_caching=False, page_memory="16MiB")
    results = run_alone(engine, make_requests(greedy(15, logprobs=3), CONTEXTS))
    options = engine_options(engine_device, page_memory="64MiB")
    return Plain(folder, torch.float32, engine, CONTEXTS, results, options, TOLERANCE)


@pytest.mark.parametrize("max_num_batched_tokens", [1000, 16_384])
def test_contexts_grow_from_graph_to_graph(long_plain: Plain, max_num_batched_tokens: int) -> None:
    engine = long_plain.make_engine(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=8)
    assert engine.info.max_model_len == LONG_MODEL_LEN
    requests = long_plain.requests(greedy(15, logprobs=3))
    assert_same(long_plain, run(engine, requests), long_plain.results)
    # Alone, the shortest one passes from the first graph to the second.
    for request in requests[:3]:
        assert_same(long_plain, run(engine, [request]), long_plain.results)
    engine.close()
