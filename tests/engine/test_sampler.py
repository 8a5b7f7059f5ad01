"""Sampler: every rule against plain-Python arithmetic, and draws that ignore the batch."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.request import EngineRequest, Request, SamplingParams
from nsa_serve.sampler import Sampler, SamplingFailure, token_logprobs, uniform
from nsa_serve.sampling_cut import cut_weights
from nsa_serve.scheduler import SampledToken

VOCAB_SIZES = (1, 7, 63, 64, 65, 1000, 4099)


def make_request(
    *,
    request_id: str = "r",
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    **params: Any,
) -> Request:
    params.setdefault("seed", 1234)
    params.setdefault("max_tokens", 10_000)
    request = Request(
        EngineRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(**params),
        )
    )
    for token_id in output:
        request.append_token(token_id)
    return request


def make_logits(rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def tokens_of(results: list[SampledToken | SamplingFailure]) -> list[int]:
    for result in results:
        assert isinstance(result, SampledToken), result
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def sample_one(sampler: Sampler, row: Tensor, request: Request) -> int:
    return tokens_of(sampler.sample(row.clone()[None], [request]))[0]


def kept_tokens(row: Tensor, params: SamplingParams) -> dict[int, float]:
    """The filtered distribution, token id -> probability, spelled out in plain Python."""
    logits = row.double().tolist()
    peak = max(logits)
    weights = [math.exp((logit - peak) / params.temperature) for logit in logits]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = [i for i in order if weights[i] > 0.0]
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(weights[i] for i in order)
    kept: dict[int, float] = {}
    mass = 0.0
    for i in order:
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
        kept[i] = weights[i]
        mass += weights[i]
    return {i: weight / mass for i, weight in kept.items()}


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_lowest_index_of_the_maximum(vocab_size: int) -> None:
    logits = make_logits(5, vocab_size).round()  # many ties
    expected = [min(i for i, x in enumerate(row) if x == max(row)) for row in logits.tolist()]
    requests = [make_request(temperature=0.0) for _ in range(5)]
    assert tokens_of(Sampler().sample(logits, requests)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.6, "temperature": 1.7},
        {"top_k": 20, "min_p": 0.05, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options: dict[str, Any]) -> None:
    vocab_size, num_draws = 131, 6000
    row = make_logits(1, vocab_size, seed=3, scale=2.0)[0]
    expected = kept_tokens(row, SamplingParams(**options))
    requests = [make_request(seed=seed, **options) for seed in range(num_draws)]
    counts = Counter(tokens_of(Sampler().sample(row.repeat(num_draws, 1), requests)))
    assert set(counts) <= set(expected)
    for token_id, probability in expected.items():
        # Six standard deviations: fixed seeds, so this holds always or never.
        bound = 6 * math.sqrt(num_draws * probability * (1 - probability)) + 1
        assert abs(counts[token_id] - num_draws * probability) <= bound, token_id


def kept_ids(weights: Sequence[float], params: SamplingParams) -> list[int]:
    """The tokens that top_k and top_p leave of a row of weights, by a full sort."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = math.fsum(weights[i] for i in order)
    kept: list[int] = []
    mass = 0.0
    for i in order:
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    return sorted(kept)


CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 40},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 700},
    {"top_k": 700, "top_p": 0.99},
    {"top_k": 4098},
    {"top_k": 10**9, "top_p": 0.5},
    {"top_p": 1e-300},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.999999},
    {"top_p": 1.0 - 1e-12},
]


# All tokens alike; a flat row; a usual one; one of which most weights underflow to 0.
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 40.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 65, 777, 4099])
@pytest.mark.parametrize("is_rounded", [False, True], ids=["distinct", "ties"])
def test_cuts_keep_the_tokens_of_a_full_sort(
    scale: float, vocab_size: int, is_rounded: bool
) -> None:
    logits = make_logits(len(CUTS), vocab_size, seed=7, scale=scale)
    if is_rounded:
        logits = logits.round()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    params = [SamplingParams(**options) for options in CUTS]
    together = cut_weights(weights.clone(), params)
    for row, item, cut in zip(weights, params, together, strict=True):
        expected = torch.zeros_like(row)
        kept = kept_ids(row.tolist(), item)
        expected[kept] = row[kept]
        assert torch.equal(cut, expected), item
        assert torch.equal(cut_weights(row[None].clone(), [item])[0], expected), item


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_draws_go_through_the_kept_tokens_by_id(options: dict[str, Any], scale: float) -> None:
    row = make_logits(1, 1000, seed=5, scale=scale)[0]
    kept = kept_tokens(row, SamplingParams(**options))
    requests = [make_request(seed=seed, **options) for seed in range(200)]
    drawn = tokens_of(Sampler().sample(row.repeat(200, 1), requests))
    for seed, token_id in enumerate(drawn):
        before = math.fsum(kept[i] for i in kept if i < token_id)
        # Weights are float32, of which 1000 add up to a relative error of at most 1e-6.
        assert before - 1e-6 <= uniform(seed, 0) <= before + kept[token_id] + 1e-6


def test_a_draw_does_not_depend_on_the_batch() -> None:
    vocab_size = 4099
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"temperature": 1.9, "repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.1, "top_p": 0.99},
        {"logprobs": 3},
    ]
    requests = [
        make_request(
            request_id=str(i),
            seed=i,
            prompt=[i, 2, 3],
            output=[i % 5] * (i % 7),
            **options[i % len(options)],
        )
        for i in range(41)
    ]
    logits = make_logits(len(requests), vocab_size, seed=11)
    together = Sampler().sample(logits.clone(), requests)
    for row, request, expected in zip(logits, requests, together, strict=True):
        assert Sampler().sample(row.clone()[None], [request]) == [expected]
    reverse = Sampler().sample(logits.flip(0).clone(), requests[::-1])
    assert reverse[::-1] == together


def test_seed_and_position_decide_the_draw() -> None:
    row = make_logits(1, 500, scale=1.0)[0]
    sampler = Sampler()
    first = [sample_one(sampler, row, make_request(seed=s)) for s in range(30)]
    assert first == [sample_one(sampler, row, make_request(seed=s)) for s in range(30)]
    assert len(set(first)) > 15
    positions = [sample_one(sampler, row, make_request(output=[1] * n)) for n in range(30)]
    assert len(set(positions)) > 15


def test_uniform_is_uniform_and_defined_for_every_seed() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    counts = Counter(int(number * 10) for number in numbers)
    assert all(abs(counts[tenth] - 1000) < 180 for tenth in range(10))
    assert len(set(numbers)) == len(numbers)
    assert uniform(-(2**63), 0) != uniform(2**63 - 1, 0)


def test_penalties_match_their_formulas() -> None:
    row = make_logits(1, 50, seed=5)[0]
    prompt, output = [3, 3, 4, 10], [4, 7, 7, 7]
    options: dict[str, Any] = {
        "repetition_penalty": 1.7,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    }
    expected = row.tolist()
    for token_id in {*prompt, *output}:
        logit = expected[token_id]
        expected[token_id] = logit / 1.7 if logit > 0 else logit * 1.7
    for token_id, count in Counter(output).items():
        expected[token_id] -= 0.4 + 0.3 * count
    logits = row.clone()[None]
    Sampler().sample(
        logits, [make_request(prompt=prompt, output=output, temperature=0.0, **options)]
    )
    torch.testing.assert_close(logits[0], torch.tensor(expected))


def test_presence_and_frequency_ignore_the_prompt() -> None:
    row = make_logits(1, 50)[0]
    logits = row.clone()[None]
    request = make_request(prompt=[1, 2, 3], presence_penalty=2.0, frequency_penalty=2.0)
    request = make_request(
        prompt=[1, 2, 3], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0
    )
    Sampler().sample(logits, [request])
    assert torch.equal(logits[0], row)


def test_penalties_kept_from_step_to_step_equal_those_of_a_fresh_sampler() -> None:
    options: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    request = make_request(prompt=range(70), temperature=0.8, **options)
    kept = Sampler()
    for step in range(200):
        row = make_logits(1, 300, seed=step)
        if step % 17 == 5:
            kept.sample(row.clone(), [make_request(request_id="other")])  # it skips a step
        token_id = sample_one(kept, row[0], request)
        assert token_id == sample_one(Sampler(), row[0], request)
        request.append_token(token_id)
    assert len(set(request.output_token_ids)) > 64, "the table of tokens must have grown"


def test_a_new_request_under_an_old_id_starts_afresh() -> None:
    sampler, row = Sampler(), make_logits(1, 20)[0]
    best = int(row.argmax())
    options: dict[str, Any] = {
        "temperature": 0.0,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
    }
    first = make_request(output=[best] * 9, **options)
    assert sample_one(sampler, row, first) != best
    assert sample_one(sampler, row, make_request(**options)) == best


def test_logit_bias_moves_the_choice() -> None:
    row = torch.zeros(30)
    request = make_request(temperature=0.0, logit_bias={17: 5.0, 3: 4.0, 0: -100.0})
    assert sample_one(Sampler(), row, request) == 17


def test_min_tokens_holds_back_eos_and_stop_tokens() -> None:
    row = torch.tensor([0.0, 9.0, 8.0, 7.0])
    sampler = Sampler(eos_token_ids=[1])
    options: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,)}
    assert sample_one(sampler, row, make_request(**options)) == 3
    assert sample_one(sampler, row, make_request(output=[3], **options)) == 3
    assert sample_one(sampler, row, make_request(output=[3, 3], **options)) == 1


def test_a_bad_row_fails_alone() -> None:
    logits = make_logits(5, 90)
    clean = logits.clone()
    logits[1, 40] = math.nan
    logits[2, 3] = math.inf
    logits[4] = -math.inf
    options: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2}]
    for option in options:
        requests = [make_request(request_id=str(i), seed=i, **option) for i in range(5)]
        expected = Sampler().sample(clean.clone(), requests)
        results = Sampler().sample(logits.clone(), requests)
        assert [isinstance(result, SamplingFailure) for result in results] == [
            False, True, True, False, True,
        ]  # fmt: skip
        assert (results[0], results[3]) == (expected[0], expected[3])
        assert "not finite" in str(results[1]) and "excluded" in str(results[4])


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = make_logits(1, 200)[0]
    request = make_request(temperature=temperature)
    assert sample_one(Sampler(), row, request) == int(row.argmax())


def test_tokens_of_no_weight_are_never_drawn() -> None:
    row = torch.full((200,), -math.inf)
    row[[0, 77, 199]] = torch.tensor([1.0, 2.0, 1.5])
    for option in ({}, {"top_p": 0.999}, {"top_k": 50}, {"top_k": 50, "top_p": 0.999}):
        requests = [make_request(seed=seed, **option) for seed in range(300)]
        drawn = set(tokens_of(Sampler().sample(row.repeat(300, 1), requests)))
        assert drawn == {0, 77, 199}


def test_logprobs_are_those_of_the_model_before_any_change() -> None:
    row = make_logits(1, 60, seed=9)[0]
    expected = row.double().log_softmax(-1)
    request = make_request(
        temperature=2.0, top_k=1, logit_bias={5: 100.0}, presence_penalty=1.0, logprobs=4
    )
    (result,) = Sampler().sample(row.clone()[None], [request])
    assert isinstance(result, SampledToken) and result.logprobs is not None
    assert result.token_id == result.logprobs.token_id == 5
    assert result.logprobs.logprob == pytest.approx(float(expected[5]), abs=1e-5)
    assert result.logprobs.rank == int((row > row[5]).sum()) + 1
    order = row.argsort(descending=True)[:4].tolist()
    assert [token_id for token_id, _ in result.logprobs.top] == order
    assert [value for _, value in result.logprobs.top] == pytest.approx(
        expected[order].tolist(), abs=1e-5
    )


def test_logprobs_are_given_to_those_who_ask() -> None:
    wanted = [None, 0, 3, None, 20]
    requests = [make_request(request_id=str(i), logprobs=n) for i, n in enumerate(wanted)]
    results = Sampler().sample(make_logits(5, 100), requests)
    sizes = [
        None if result.logprobs is None else len(result.logprobs.top)
        for result in results
        if isinstance(result, SampledToken)
    ]
    assert sizes == wanted


@dataclass(frozen=True)
class _LogprobCase:
    num_rows: int
    vocab_size: int
    num_top: int


@pytest.mark.parametrize(
    "case",
    [_LogprobCase(1, 1, 1), _LogprobCase(63, 5, 20), _LogprobCase(130, 700, 3)],
    ids=str,
)
def test_token_logprobs(case: _LogprobCase) -> None:
    logits = make_logits(case.num_rows, case.vocab_size).round()
    token_ids = [i * 7 % case.vocab_size for i in range(case.num_rows)]
    entries = token_logprobs(logits, token_ids, case.num_top)
    assert [entry.token_id for entry in entries] == token_ids
    for row, entry in zip(logits, entries, strict=True):
        logprobs = row.double().log_softmax(-1)
        assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-5)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        best = sorted(range(case.vocab_size), key=lambda i: (-float(row[i]), i))
        assert len(entry.top) == min(case.num_top, case.vocab_size)
        # Which of the ties at the cut is listed is open; their values are not.
        values = [float(logprobs[i]) for i in best[: case.num_top]]
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-5)
        assert len({i for i, _ in entry.top}) == len(entry.top)


def test_token_logprobs_of_nothing_and_of_bfloat16() -> None:
    assert token_logprobs(torch.empty(0, 9), [], 3) == []
    logits = make_logits(2, 9).bfloat16()
    assert token_logprobs(logits, [1, 2], 3) == token_logprobs(logits.float(), [1, 2], 3)


def test_no_rows() -> None:
    assert Sampler().sample(torch.empty(0, 9), []) == []
