"""allowed_token_ids, bad_words and min_tokens: which tokens can be sampled, beside all else."""

from typing import Any

import pytest
import torch

from nsa_serve.errors import RequestError
from nsa_serve.messages import EngineInfo
from nsa_serve.request import SamplingParams
from nsa_serve.request_check import check_request
from nsa_serve.sampler import Sampler, SamplingFailure
from tests.engine.test_sampler import make_logits, make_request, sample_one, tokens_of

VOCAB_SIZE = 64
EOS = 3
INFO = EngineInfo(
    family="fake",
    dtype="float32",
    device="cpu",
    num_parameters=1,
    weight_bytes=4,
    max_model_len=100,
    max_num_seqs=32,
    vocab_size=VOCAB_SIZE,
    page_size=16,
    num_pages=10,
    cache=[],
    phase_s={},
    eos_token_ids=(EOS,),
)


def possible(row: torch.Tensor, **params: Any) -> set[int]:
    """The tokens of 300 draws from a flat distribution."""
    sampler = Sampler((EOS,))
    return {sample_one(sampler, row, make_request(seed=seed, **params)) for seed in range(300)}


def flat(size: int = 8) -> torch.Tensor:
    """Tokens 0 to size - 1 are equally likely, the others all but impossible."""
    row = torch.full((VOCAB_SIZE,), -50.0)
    row[:size] = 0.0
    return row


def test_only_allowed_tokens_are_sampled() -> None:
    assert possible(flat(), allowed_token_ids=(5, 1, 40)) == {1, 5}
    assert possible(flat(), allowed_token_ids=(40,)) == {40}
    # A bias moves allowed tokens only.
    assert possible(flat(), allowed_token_ids=(5, 1), logit_bias={2: 100.0, 5: -100.0}) == {1}
    assert possible(flat(), allowed_token_ids=(1, EOS), min_tokens=1) == {1}
    assert possible(flat(), allowed_token_ids=(1, 2), repetition_penalty=2.0, output=[1]) == {1, 2}


@pytest.mark.parametrize(
    ("output", "excluded"),
    [
        ([], {7}),
        ([1], {2, 7}),
        ([5, 1], {2, 7}),
        ([1, 2], {4, 7}),
        ([1, 5], {7}),
        ([2, 1, 2], {4, 7}),
    ],
)
def test_the_last_token_of_a_bad_word_is_excluded_after_the_others(
    output: list[int], excluded: set[int]
) -> None:
    bad_words = ((7,), (1, 2), (1, 2, 4), (6, 6, 6, 6))
    found = possible(flat(), bad_words=bad_words, output=output, prompt=[6, 6, 6])
    assert found == set(range(8)) - excluded


def test_constraints_of_a_row_leave_its_neighbours_alone() -> None:
    logits = make_logits(3, VOCAB_SIZE)
    requests = [
        make_request(request_id="a", temperature=0.0),
        make_request(request_id="b", temperature=0.0, allowed_token_ids=(9, 10)),
        make_request(request_id="c", temperature=0.0, bad_words=((int(logits[2].argmax()),),)),
    ]
    want = [
        int(logits[0].argmax()),
        9 + int(logits[1, 9:11].argmax()),
        int(logits[2].argsort(descending=True)[1]),
    ]
    sampler = Sampler()
    # Steps with other rows, in another order.
    for rows in ([0, 1, 2], [2, 1], [1], [0, 2], [1, 0]):
        results = sampler.sample(logits[rows], [requests[row] for row in rows])
        assert tokens_of(results) == [want[row] for row in rows]


def test_another_request_of_the_same_id_has_its_own_allowed_tokens() -> None:
    sampler = Sampler()
    row = make_logits(1, VOCAB_SIZE)[0]
    for allowed in (4, 9, 4):
        request = make_request(request_id="r", allowed_token_ids=(allowed,))
        assert sample_one(sampler, row, request) == allowed


def test_no_token_left_is_the_requests_own_failure() -> None:
    request = make_request(allowed_token_ids=(5,), bad_words=((5,),), temperature=0.0)
    (result,) = Sampler().sample(make_logits(1, VOCAB_SIZE), [request])
    message = "every token was excluded: loosen allowed_token_ids, bad_words"
    assert result == SamplingFailure(message, is_request_fault=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"bad_words": ((1,), ())}, "bad_words"),
        ({"bad_words": ((1,),) * 257}, "bad_words"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,) * 65}, "allowed_token_ids"),
        ({"bad_words": ((1, VOCAB_SIZE),)}, "bad_words"),
        (
            {"allowed_token_ids": (EOS, 5), "stop_token_ids": (5,), "min_tokens": 1},
            "allowed_token_ids",
        ),
    ],
    ids=str,
)
def test_a_constraint_that_cannot_be_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request([1], SamplingParams(**fields), 1, INFO)
    assert caught.value.param == param


def test_min_tokens_is_allowed_with_another_token() -> None:
    check_request([1], SamplingParams(allowed_token_ids=(EOS, 5), min_tokens=1), 1, INFO)
