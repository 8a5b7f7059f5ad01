"""DeviceSampler gives what Sampler gives: in Triton's interpreter, or on a GPU if there is one."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa_serve.device_sampler import DeviceSampler, PromptScores
from nsa_serve.logprobs import token_logprobs
from nsa_serve.request import Request, TokenLogprobs
from nsa_serve.sampler import Sampler, SamplingFailure
from nsa_serve.scheduler_output import SampledToken
from nsa_serve.structured.masks import MaskFailure, StepMasks
from tests.engine.test_sampler import make_logits, make_request
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401
from tests.kernels.gpu_util import DEVICE

VOCAB_SIZE = 1111
EOS = (3, 4)
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.2,
}
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.0, **PENALTIES},
    {"top_p": 0.9, "presence_penalty": 1.0, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": {5: 9.0, 1100: 8.0, 0: -100.0}, "logprobs": 20},
    {"bad_words": ((7,), (1, 2), (9, 9, 9)), "top_k": 50},
    {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (8,), "logit_bias": {3: 50.0, 8: 60.0}},
    {"allowed_token_ids": (1, 40, 1110), "logprobs": 0},
    {
        "allowed_token_ids": tuple(range(0, 1111, 3)),
        "logit_bias": {6: 40.0, 7: 50.0},
        "temperature": 0.0,
        **PENALTIES,
    },
    {"repetition_penalty": 0.7, "min_p": 0.02, "temperature": 1.5},
]


def make_sampler(max_num_rows: int = 16) -> DeviceSampler:
    return DeviceSampler(EOS, vocab_size=VOCAB_SIZE, max_num_rows=max_num_rows, device=DEVICE)


def make_batch() -> list[Request]:
    return [
        make_request(request_id=str(i), seed=i, prompt=[i, 2, 3, 3, 500 + i], **options)
        for i, options in enumerate(OPTIONS)
    ]


def run(
    sampler: DeviceSampler,
    logits: Tensor,
    requests: list[Request],
    masks: StepMasks | None = None,
) -> list[SampledToken | SamplingFailure]:
    positions = [item.num_output_tokens for item in requests]
    return sampler.launch(logits.to(DEVICE, copy=True), requests, positions, masks).result()


def assert_same(
    actual: list[SampledToken | SamplingFailure], expected: list[SampledToken | SamplingFailure]
) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, SamplingFailure):
            assert one == other
            continue
        assert isinstance(one, SampledToken)
        assert one.token_id == other.token_id
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert_near(one.logprobs, other.logprobs)


def assert_near(one: TokenLogprobs, other: TokenLogprobs) -> None:
    assert (one.token_id, one.rank) == (other.token_id, other.rank)
    assert [item[0] for item in one.top] == [item[0] for item in other.top]
    values = [one.logprob, *(item[1] for item in one.top)]
    # fp32 sums of a thousand exponentials, in another order.
    assert values == pytest.approx([other.logprob, *(item[1] for item in other.top)], abs=1e-5)


def make_masks(rows: list[int], *, seed: int) -> StepMasks:
    generator = np.random.default_rng(seed)
    num_bytes = -(-VOCAB_SIZE // 32) * 4
    return StepMasks(rows, generator.integers(0, 256, (len(rows), num_bytes), np.uint8), {})


def test_steps_in_flight_keep_their_tokens_and_give_back_their_memory() -> None:
    """Three steps are queued before the first is read, as often as one likes."""
    sampler, cpu, requests = make_sampler(3), Sampler(EOS), make_batch()[:3:2]
    addresses = set()
    for turn in range(3):
        logits = [make_logits(2, VOCAB_SIZE, seed=3 * turn + number) for number in range(3)]
        handles = [sampler.launch(item.to(DEVICE, copy=True), requests, [0, 0]) for item in logits]
        addresses |= {handle.copy.data_ptr() for handle in handles}
        for handle, item in zip(handles, logits, strict=True):
            assert_same(handle.result(), cpu.sample(item.clone(), requests))
    assert len(addresses) == 3


def test_what_a_batch_asks_for_is_not_that_of_the_batch_before() -> None:
    """Requests change places and leave; ids come again with other parameters."""
    sampler, cpu = make_sampler(), Sampler(EOS)
    plain, edited = make_request(temperature=0.0), make_request(**OPTIONS[6])
    reporting = make_request(temperature=0.0, logprobs=3)
    for seed, batch in enumerate(
        ([plain], [edited], [plain], [reporting, plain], [plain, reporting], [plain, edited])
    ):
        logits = make_logits(len(batch), VOCAB_SIZE, seed=seed)
        assert_same(run(sampler, logits, batch), cpu.sample(logits.clone(), batch))
        assert sampler.needs_history(batch) == (edited in batch)


def test_steps_of_a_mixed_batch_equal_those_of_the_cpu_sampler() -> None:
    requests, device, cpu = make_batch(), make_sampler(), Sampler(EOS)
    # Few tokens are likely, so that they come again and penalties count.
    for step in range(8):
        # Rows leave, come back and change places.
        rows = [row for row in range(len(requests)) if (row + step) % 5 or step < 3]
        if step % 2:
            rows.reverse()
        batch = [requests[row] for row in rows]
        logits = make_logits(len(rows), VOCAB_SIZE, seed=step // 3, scale=4.0)
        masks = make_masks([1, 3, len(rows) - 1], seed=step) if step % 3 == 1 else None
        expected = cpu.sample(logits.clone(), batch, masks)
        assert_same(run(device, logits, batch, masks), expected)
        for request, token in zip(batch, expected, strict=True):
            assert isinstance(token, SampledToken)
            request.append_token(token.token_id)


def test_edited_logits_are_those_of_the_cpu_sampler() -> None:
    requests = make_batch()
    for i, request in enumerate(requests):
        for token_id in (7, 1, 1, 6, 7, 9, 9)[: i + 1]:
            request.append_token(token_id)
    masks = make_masks([0, 2, 8, 9], seed=3)
    logits = make_logits(len(requests), VOCAB_SIZE)
    edited = logits.to(DEVICE, copy=True)
    make_sampler().edit(edited, requests, [item.num_output_tokens for item in requests], masks)
    # Greedy draws leave the logits as they were edited.
    greedy = [
        make_request(
            request_id=item.request_id,
            prompt=item.prompt_token_ids,
            output=item.output_token_ids,
            **{**options, "temperature": 0.0},
        )
        for item, options in zip(requests, OPTIONS, strict=True)
    ]
    Sampler(EOS).sample(logits, greedy, masks)
    torch.testing.assert_close(edited.cpu(), logits, rtol=1e-6, atol=1e-6)
    assert logits.isinf().any(-1).sum() > 4, "the case must exclude something"


def test_long_prompts_and_more_tokens_than_the_table_had_room_for() -> None:
    prompt = [i * 7 % VOCAB_SIZE for i in range(900)]
    request = make_request(prompt=prompt, temperature=0.0, **PENALTIES)
    other = make_request(request_id="b", prompt=[1], temperature=0.0, **PENALTIES)
    device, cpu = make_sampler(), Sampler()
    for step in range(3):
        logits = make_logits(2, VOCAB_SIZE, seed=step)
        expected = cpu.sample(logits.clone(), [request, other])
        assert_same(run(device, logits, [request, other]), expected)
        for token_id in (step, *range(800, VOCAB_SIZE)):
            request.append_token(token_id)
        other.append_token(step)


def test_a_preempted_request_finds_its_penalties_again() -> None:
    request = make_request(temperature=0.0, output=[5, 5, 6], **PENALTIES)
    device = make_sampler(max_num_rows=2)
    logits = make_logits(1, VOCAB_SIZE, scale=0.2)
    expected = Sampler().sample(logits.clone(), [request])
    assert_same(run(device, logits, [request]), expected)
    for i in range(5):  # others take its place, and its slot
        others = [make_request(request_id=f"o{i}{j}", output=[j], **PENALTIES) for j in range(2)]
        run(device, make_logits(2, VOCAB_SIZE), others)
    assert_same(run(device, logits, [request]), expected)


def test_failures_are_those_of_the_cpu_sampler() -> None:
    logits = make_logits(5, VOCAB_SIZE)
    logits[1, 40] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    options: list[dict[str, Any]] = [{}, {}, {}, {}, {"allowed_token_ids": EOS, "min_tokens": 2}]
    requests = [make_request(request_id=str(i), **item) for i, item in enumerate(options)]
    masks = make_masks([0], seed=1)
    masks.failures[0] = MaskFailure("the grammar failed", is_request_fault=True)
    expected = Sampler(EOS).sample(logits.clone(), requests, masks)
    assert [isinstance(item, SamplingFailure) for item in expected] == [True] * 5
    actual = run(make_sampler(), logits, requests, masks)
    assert [str(item) for item in actual] == [str(item) for item in expected]


def test_tokens_stay_on_the_device_for_the_next_step() -> None:
    requests = make_batch()
    sampler = make_sampler()
    tokens = run(sampler, make_logits(len(requests), VOCAB_SIZE), requests)
    ids = [item.token_id for item in tokens if isinstance(item, SampledToken)]
    assert sampler.token_ids[: len(requests)].tolist() == ids


def test_the_position_decides_the_draw_also_when_tokens_are_not_known_yet() -> None:
    known = make_request(output=[1, 2, 3, 4])
    unknown = make_request(output=[1, 2, 3])
    logits = make_logits(1, VOCAB_SIZE, scale=0.1)
    expected = run(make_sampler(), logits, [known])
    late = make_sampler().launch(logits.to(DEVICE, copy=True), [unknown], [4])
    assert late.result() == expected
    assert make_sampler().launch(logits.to(DEVICE), [unknown], [3]).result() != expected


def test_padded_rows_and_greedy_steps_forget_the_parameters_of_drawn_ones() -> None:
    sampler = make_sampler()
    logits = make_logits(4, VOCAB_SIZE, scale=0.1).to(DEVICE)
    best = logits.argmax(-1).tolist()
    drawn = [make_request(request_id=str(i), seed=i) for i in range(4)]
    sampler.launch(logits.clone(), drawn, [0] * 4)
    assert sampler.token_ids[:4].tolist() != best
    sampler.prepare(drawn[:1], [0])
    sampler.run_kernels(logits, 4)
    assert sampler.token_ids[1:4].tolist() == best[1:]
    sampler.prepare([make_request(temperature=0.0)], [0])
    sampler.run_kernels(logits, 4)
    assert sampler.token_ids[:4].tolist() == best


def test_handles_are_read_in_any_order() -> None:
    sampler = make_sampler()
    rows = [make_logits(1, VOCAB_SIZE, seed=seed) for seed in range(6)]
    request = make_request(temperature=0.9)
    handles = [
        sampler.launch(row.to(DEVICE, copy=True), [request], [position])
        for position, row in enumerate(rows)
    ]
    for position in (5, 0, 3):
        alone = make_sampler().launch(rows[position].to(DEVICE, copy=True), [request], [position])
        assert handles[position].result() == alone.result()


def test_prompt_scores_are_token_logprobs() -> None:
    logits = make_logits(70, VOCAB_SIZE)
    targets = [i * 13 % VOCAB_SIZE for i in range(70)]
    scores = PromptScores(logits.to(DEVICE), targets, 3).result()
    for one, other in zip(scores, token_logprobs(logits, targets, 3), strict=True):
        assert_near(one, other)


def test_history_is_needed_by_what_depends_on_the_output() -> None:
    sampler = make_sampler()
    plain = make_request(logit_bias={1: 1.0}, allowed_token_ids=(1, 2), top_p=0.5, logprobs=1)
    assert not sampler.needs_history([plain])
    for options in (PENALTIES, {"bad_words": ((1, 2),)}):
        assert sampler.needs_history([plain, make_request(**options)])


def test_too_many_rows_are_refused() -> None:
    requests = [make_request(request_id=str(i)) for i in range(3)]
    with pytest.raises(ValueError, match="at most 2 rows can be sampled, got 3"):
        make_sampler(2).prepare(requests, [0] * 3)
