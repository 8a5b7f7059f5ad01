"""The same tokens whatever else the engine does: batches, chunks, shared pages, preemption.

Every run is compared with a plain one: the request alone, its prompt in one piece, nothing cached.
Tokens are equal, in fp32 and in fp64. Log-probabilities are compared in fp64: what is left there is
the cast of the logits to fp32, whose step is 1e-6 at -12, and anything else would be an error of
ours. In fp32 the same sums, taken in another order when matrices have another shape, make
log-probabilities of these sharp random models differ by up to 1.1e-5.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.llm import LLM
from nsa_serve.model_source import load_tokenizer
from nsa_serve.request import EngineRequest, Request, SamplingParams, TokenLogprobs
from nsa_serve.sampler import Sampler
from nsa_serve.scheduler_output import SampledToken
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run, run_alone

LOGPROB_TOLERANCE = 5e-6
CHECKPOINTS = ("nsa", "llama-nsa", "llama", "llama-mlp")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# Strides 4, windows of 8 tokens, blocks of 8 and 16, sliding windows of 17 and 24, selections of
# n x block = 64 tokens: one token before, at and after each, and 18 tokens of decoding behind it.
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 47, 63, 64, 65, 111, 128, 129, 200)
# Fewer in fp64, which is there for the log-probabilities.
LENGTHS_FP64 = (4, 9, 17, 25, 65, 111, 129, 200)
MAX_TOKENS = 18


def make_requests(params: SamplingParams, lengths: Sequence[int]) -> list[EngineRequest]:
    return [
        EngineRequest(request_id=str(length), prompt_token_ids=make_prompt(length), params=params)
        for length in lengths
    ]


@dataclass(frozen=True)
class Plain:
    """A checkpoint and what its requests give when nothing disturbs them.

    options: of the engines that are compared with the plain one. tolerance: of log-probabilities,
    None to compare tokens only.
    """

    folder: Path
    dtype: torch.dtype
    engine: Engine
    lengths: Sequence[int]
    results: Mapping[str, Result]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None

    def requests(self, params: SamplingParams) -> list[EngineRequest]:
        return make_requests(params, self.lengths)

    def make_engine(self, **options: Any) -> Engine:
        return make_engine(self.folder, dtype=self.dtype, **{**self.options, **options})

    def memory_for(self, num_tokens: int) -> int:
        """Bytes of the null page and the pages of `num_tokens` tokens."""
        info = self.engine.info
        page_bytes = sum(part.total_bytes for part in info.cache) // info.num_pages
        return (1 + -(-num_tokens // info.page_size)) * page_bytes

    def alone(self, request: EngineRequest) -> Result:
        return run_alone(self.engine, [request])[request.request_id]


@pytest.fixture(
    scope="module", params=itertools.product(CHECKPOINTS, DTYPES), ids=lambda pair: "-".join(pair)
)
def plain(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> Plain:
    name, dtype = request.param
    folder = checkpoints[name]
    engine = make_engine(folder, dtype=DTYPES[dtype], enable_prefix_caching=False)
    lengths = LENGTHS if dtype == "fp32" else LENGTHS_FP64
    requests = make_requests(greedy(MAX_TOKENS, logprobs=3, prompt_logprobs=2), lengths)
    tolerance = LOGPROB_TOLERANCE if dtype == "fp64" else None
    results = run_alone(engine, requests)
    return Plain(folder, DTYPES[dtype], engine, lengths, results, tolerance=tolerance)


def assert_near(
    got: Sequence[TokenLogprobs],
    want: Sequence[TokenLogprobs],
    tolerance: float = LOGPROB_TOLERANCE,
) -> None:
    """Compare log-probabilities.

    With more than the usual tolerance, tokens that are within it of each other may change places.
    """
    assert [item.token_id for item in got] == [item.token_id for item in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=tolerance)
        assert [value for _, value in ours.top] == pytest.approx(
            [value for _, value in theirs.top], abs=tolerance
        )
        values = dict(theirs.top)
        for token_id, value in ours.top:
            # One that is not there was as likely as the last that is.
            assert value == pytest.approx(values.get(token_id, theirs.top[-1][1]), abs=tolerance)
        if tolerance > LOGPROB_TOLERANCE:
            assert abs(ours.rank - theirs.rank) <= 1
            continue
        assert ours.rank == theirs.rank
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]


def assert_same(plain: Plain, got: Mapping[str, Result], want: Mapping[str, Result]) -> None:
    for name, result in got.items():
        assert result.token_ids == want[name].token_ids, f"prompt of {name} tokens"
        assert result.finish_reason is want[name].finish_reason
        assert len(result.logprobs) == len(result.token_ids)
        scored, wanted = result.prompt_logprobs, want[name].prompt_logprobs
        if scored is not None:
            assert wanted is not None
            assert len(scored) == len(wanted)
        if plain.tolerance is not None:
            assert_near(result.logprobs, want[name].logprobs, plain.tolerance)
            assert_near(scored or [], wanted or [] if scored else [], plain.tolerance)


def test_outputs_are_not_trivial(plain: Plain) -> None:
    """Equal tokens say something only where prompts decide them."""
    outputs = {tuple(result.token_ids) for result in plain.results.values()}
    assert len(outputs) > len(plain.lengths) // 2
    num_varied = sum(len(set(tokens)) > 5 for tokens in outputs)
    assert num_varied > len(outputs) // 2
    scored = [len(result.prompt_logprobs or []) for result in plain.results.values()]
    assert scored == [length - 1 for length in plain.lengths]


@pytest.mark.parametrize("max_num_batched_tokens", [61, 2048])
def test_batched_equals_alone(plain: Plain, max_num_batched_tokens: int) -> None:
    engine = plain.make_engine(
        enable_prefix_caching=False,
        max_num_seqs=len(plain.lengths),
        max_num_batched_tokens=max_num_batched_tokens,
    )
    assert_same(plain, run(engine, plain.requests(greedy(MAX_TOKENS, logprobs=3))), plain.results)
    assert engine.scheduler.num_preemptions_total == 0


@pytest.mark.parametrize("max_num_batched_tokens", [5, 16, 37, 64, 100])
def test_chunked_equals_whole(plain: Plain, max_num_batched_tokens: int) -> None:
    engine = plain.make_engine(
        enable_prefix_caching=False,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    lengths = [length for length in plain.lengths if length > max_num_batched_tokens]
    params = greedy(6, logprobs=3, prompt_logprobs=2)
    want = {
        name: Result(
            result.token_ids[:6], result.logprobs[:6], result.prompt_logprobs, result.finish_reason
        )
        for name, result in plain.results.items()
    }
    assert_same(plain, run_alone(engine, make_requests(params, lengths)), want)


def test_preempted_equals_undisturbed(plain: Plain) -> None:
    # The longest request alone needs 218 tokens; together they need several times as much.
    for enable_prefix_caching in (False, True):
        engine = plain.make_engine(
            enable_prefix_caching=enable_prefix_caching,
            page_memory=plain.memory_for(220),
            max_num_seqs=len(plain.lengths),
            max_num_batched_tokens=90,
        )
        params = greedy(MAX_TOKENS, logprobs=3, prompt_logprobs=2)
        assert_same(plain, run(engine, plain.requests(params)), plain.results)
        assert_same(
            plain, run(engine, plain.requests(greedy(MAX_TOKENS, logprobs=3))), plain.results
        )
        assert engine.scheduler.num_preemptions_total > 0


@pytest.mark.parametrize("num_shared", [15, 16, 37, 64, 111, 112, 199])
def test_a_prefix_hit_changes_nothing(plain: Plain, num_shared: int) -> None:
    """Prompts that share `num_shared` tokens: less than a page, inside one, up to its end."""
    page_size = plain.engine.info.page_size
    prompt = make_prompt(200)
    other = prompt[:num_shared] + make_prompt(200 - num_shared, seed=1)
    engine = plain.make_engine(max_num_batched_tokens=77)
    params = greedy(MAX_TOKENS, logprobs=3)
    first = EngineRequest(request_id="200", prompt_token_ids=prompt, params=params)
    assert run(engine, [first])["200"].num_prefix_hit_tokens == 0
    second = EngineRequest(request_id="other", prompt_token_ids=other, params=params)
    got = run(engine, [second])["other"]
    assert got.num_prefix_hit_tokens == num_shared // page_size * page_size
    assert_same(plain, {"other": got}, {"other": plain.alone(second)})


def test_a_repeated_prompt_hits_all_but_its_last_page(plain: Plain) -> None:
    page_size = plain.engine.info.page_size
    engine = plain.make_engine()
    for request in plain.requests(greedy(MAX_TOKENS, logprobs=3)):
        engine.pool.reset_prefix_cache()
        run(engine, [request])
        got = run(engine, [request])
        assert_same(plain, got, plain.results)
        num_hits = got[request.request_id].num_prefix_hit_tokens
        assert num_hits == (len(request.prompt_token_ids) - 1) // page_size * page_size


def test_a_prefix_hit_on_generated_tokens_changes_nothing(plain: Plain) -> None:
    """A second turn: its prompt is the first prompt, the answer to it, and more."""
    page_size = plain.engine.info.page_size
    engine = plain.make_engine()
    params = greedy(MAX_TOKENS, logprobs=3)
    (request,) = make_requests(params, [111])
    answer = run(engine, [request])["111"].token_ids
    prompt = make_prompt(111) + answer + make_prompt(9, seed=2)
    turn = EngineRequest(request_id="turn", prompt_token_ids=prompt, params=params)
    got = run(engine, [turn])["turn"]
    # The last token was sampled but never run.
    assert got.num_prefix_hit_tokens == (111 + MAX_TOKENS - 1) // page_size * page_size
    assert_same(plain, {"turn": got}, {"turn": plain.alone(turn)})


def test_salts_keep_prefixes_apart(plain: Plain) -> None:
    engine = plain.make_engine()
    params = greedy(MAX_TOKENS, logprobs=3)
    hits = {}
    for number, salt in enumerate((None, "a", "b", "a", None)):
        request = EngineRequest(
            request_id="111", prompt_token_ids=make_prompt(111), params=params, cache_salt=salt
        )
        got = run(engine, [request])
        assert_same(plain, got, plain.results)
        hits[number] = got["111"].num_prefix_hit_tokens
    full = 110 // plain.engine.info.page_size * plain.engine.info.page_size
    assert list(hits.values()) == [0, 0, 0, full, full]


def test_requests_that_arrive_together_share_a_prefix(plain: Plain) -> None:
    engine = plain.make_engine(max_num_batched_tokens=50)
    shared, params = make_prompt(128), greedy(MAX_TOKENS, logprobs=3)
    requests = [
        EngineRequest(
            request_id=f"{number}", prompt_token_ids=shared + make_prompt(number), params=params
        )
        for number in (1, 7, 30)
    ]
    got = run(engine, requests)
    assert sum(result.num_prefix_hit_tokens for result in got.values()) == 2 * 128
    assert_same(plain, got, run_alone(plain.engine, requests))


def sampled(seed: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=seed,
        ignore_eos=True,
    )


def test_seeded_samples_are_the_same_alone_and_batched(plain: Plain) -> None:
    alone = run_alone(plain.engine, plain.requests(sampled(7)))
    engine = plain.make_engine(
        page_memory=plain.memory_for(300), max_num_seqs=9, max_num_batched_tokens=83
    )
    batched = run(engine, plain.requests(sampled(7)))
    for name, result in batched.items():
        assert result.token_ids == alone[name].token_ids
    other_seed = run_alone(plain.engine, make_requests(sampled(8), plain.lengths[-3:]))
    for name, result in other_seed.items():
        assert result.token_ids != alone[name].token_ids


def test_n_samples_are_those_of_consecutive_seeds(plain: Plain) -> None:
    config = make_config(EngineConfig, {"model": str(plain.folder)})
    engine = plain.make_engine(max_num_batched_tokens=70)
    llm = LLM.from_engine(engine, load_tokenizer(config))
    prompts = [make_prompt(length) for length in (9, 64, 111)]
    together = llm.generate(prompts, sampled(40), n=3, use_tqdm=False)
    apart = [
        output
        for prompt in prompts
        for index in range(3)
        for output in llm.generate([prompt], sampled(40 + index), use_tqdm=False)
    ]
    assert [output.index for output in together] == [0, 1, 2] * 3
    assert [output.token_ids for output in together] == [output.token_ids for output in apart]
    assert len({tuple(output.token_ids) for output in together}) == 9


def test_a_near_tie_that_changes_rank_does_not_change_the_draw() -> None:
    """Batches move logits by rounding; the draw moves with them only at the edges of a token."""
    tokens = []
    for first, second in ((3.0, 3.0 + 1e-6), (3.0 + 1e-6, 3.0)):
        logits = torch.zeros(32, 100)
        logits[:, 5], logits[:, 9] = first, second
        requests = [
            Request(
                EngineRequest(
                    request_id=str(seed),
                    prompt_token_ids=[0],
                    params=SamplingParams(top_k=2, seed=seed),
                )
            )
            for seed in range(32)
        ]
        sampled_tokens = Sampler(()).sample(logits, requests)
        tokens.append([item.token_id for item in sampled_tokens if isinstance(item, SampledToken)])
        assert len(tokens[-1]) == len(requests)
    assert set(tokens[0]) == {5, 9}
    assert tokens[0] == tokens[1]
