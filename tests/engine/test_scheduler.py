"""The scheduler, rule by rule, over a model that reads its history back from the pages."""

from collections.abc import Callable
from typing import Any

import pytest

from nsa_serve.errors import ConfigError, RequestError
from nsa_serve.request import (
    FinishReason,
    RequestStatus,
    TokenLogprobs,
    TokenOutput,
)
from nsa_serve.scheduler import SampledToken, SchedulerOutput

from .paged_model import (
    PAGE_SIZE,
    Harness,
    generate_alone,
    next_token,
    rows_of,
)

# Life of a request


def test_a_request_runs_to_max_tokens() -> None:
    harness = Harness()
    request = harness.add("a", 6, max_tokens=3)
    steps = []
    while harness.scheduler.has_unfinished:
        steps.append(harness.step())
    assert [rows_of(step) for step in steps] == [[("a", 0, 6)], [("a", 6, 1)], [("a", 7, 1)]]
    assert [step.num_decode_rows for step in steps] == [0, 1, 1]
    assert [step.num_tokens for step in steps] == [6, 1, 1]
    history = list(request.prompt_token_ids)
    for _ in range(3):
        history.append(next_token(history))
    assert request.token_ids == history
    assert [output.token_ids for output in harness.outputs] == [[t] for t in history[6:]]
    assert harness.finish_reasons() == {"a": FinishReason.LENGTH}
    assert request.status is RequestStatus.FINISHED
    assert harness.pool.num_free_pages == harness.pool.num_pages


def test_empty_schedule_has_no_rows() -> None:
    output = Harness().step()
    assert not output.rows
    assert not output.preempted
    assert output.num_tokens == output.num_decode_rows == 0


@pytest.mark.parametrize(
    ("params", "token_ids", "finish_reason", "stop_reason"),
    [
        ({}, [7, 2], FinishReason.STOP, None),
        ({"ignore_eos": True}, [7, 2, 8, 3, 9], FinishReason.LENGTH, None),
        ({"stop_token_ids": (8,)}, [7, 2], FinishReason.STOP, None),
        ({"stop_token_ids": (7,)}, [7], FinishReason.STOP, 7),
        ({"stop_token_ids": (8,), "ignore_eos": True}, [7, 2, 8], FinishReason.STOP, 8),
        ({"stop_token_ids": (2,), "ignore_eos": True}, [7, 2], FinishReason.STOP, 2),
        ({"min_tokens": 3}, [7, 2, 8, 3], FinishReason.STOP, None),
        ({"min_tokens": 3, "stop_token_ids": (7, 8)}, [7, 2, 8], FinishReason.STOP, 8),
        ({"max_tokens": 2}, [7, 2], FinishReason.STOP, None),
        ({"max_tokens": 1}, [7], FinishReason.LENGTH, None),
    ],
)
def test_stop_rules(
    params: dict[str, Any],
    token_ids: list[int],
    finish_reason: FinishReason,
    stop_reason: int | None,
) -> None:
    harness = Harness(eos_token_ids=(2, 3))
    request = harness.add("a", 5, **({"max_tokens": 5} | params))
    script = [7, 2, 8, 3, 9, 9]
    while harness.scheduler.has_unfinished:
        output = harness.schedule()
        harness.update(output, {"a": SampledToken(script[request.num_output_tokens])})
    assert request.output_token_ids == token_ids
    assert [output.finish_reason for output in harness.outputs[:-1]] == [None] * (
        len(token_ids) - 1
    )
    assert harness.outputs[-1].finish_reason is finish_reason
    assert harness.outputs[-1].stop_reason == stop_reason


def test_max_tokens_0_runs_the_prompt_and_samples_nothing() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add("a", 10, max_tokens=0)
    steps = [harness.step() for _ in range(3)]
    assert [rows_of(step) for step in steps] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)]]
    assert not any(row.samples for step in steps for row in step.rows)
    (output,) = harness.outputs
    assert output.token_ids == []
    assert output.finish_reason is FinishReason.LENGTH
    assert not harness.scheduler.has_unfinished


def test_logprobs_come_with_their_token_and_prompt_logprobs_once() -> None:
    harness = Harness(max_num_batched_tokens=4)
    request = harness.add("a", 7, max_tokens=2, logprobs=0, prompt_logprobs=1)
    logprobs = [TokenLogprobs(i, -float(i), 1, []) for i in range(10)]
    for chunk in (logprobs[:4], logprobs[4:6], []):
        output = harness.schedule()
        request.prompt_logprobs.extend(chunk)
        harness.update(output, {"a": SampledToken(9, logprobs[9])})
    first, second = harness.outputs
    assert first.prompt_logprobs == logprobs[:6]
    assert second.prompt_logprobs is None
    assert first.logprobs == second.logprobs == [logprobs[9]]


def test_preemption_starts_prompt_logprobs_anew_and_never_sends_them_twice() -> None:
    # 4 pages are too few for both: "b" is preempted after its first token came out.
    harness = Harness(num_pages=4)
    harness.add("a", 7, max_tokens=6)
    request = harness.add("b", 4, max_tokens=4, prompt_logprobs=0)
    while harness.scheduler.has_unfinished:
        output = harness.schedule()
        for row in output.rows:
            if row.request is request:
                ends = range(row.start + 1, min(row.start + row.num_tokens + 1, 4))
                request.prompt_logprobs.extend(TokenLogprobs(i, 0.0, 1, []) for i in ends)
        harness.update(output, harness.model.run(output))
    assert request.num_preemptions == 1
    sent = [o.prompt_logprobs for o in harness.outputs if o.request_id == "b"]
    assert [None if x is None else [y.token_id for y in x] for x in sent] == [
        [1, 2, 3],
        None,
        None,
        None,
    ]


def test_queue_time_ends_with_the_first_row_and_is_told_once() -> None:
    now_s = 10.0
    # 4 pages are too few for both: "b" is preempted, and its second wait does not count.
    harness = Harness(num_pages=4, clock=lambda: now_s)
    harness.add("a", 7, max_tokens=6)
    request = harness.add("b", 4, max_tokens=4)
    assert request.queued_s == 0.0
    while harness.scheduler.has_unfinished:
        harness.step()
        now_s += 1.0
    assert request.num_preemptions == 1
    sent = {name: [o.queued_s for o in harness.outputs if o.request_id == name] for name in "ab"}
    # Their arrival is at 0 s.
    assert sent == {"a": [10.0, 0, 0, 0, 0, 0], "b": [10.0, 0, 0, 0]}


# What is refused


@pytest.mark.parametrize(
    ("num_prompt_tokens", "params", "message"),
    [
        (0, {}, "prompt is empty"),
        (20, {}, "20 tokens but max_model_len is 20, which must also hold one output token"),
        (21, {"max_tokens": 0}, "21 tokens but max_model_len is 20;"),
        (12, {}, r"12 tokens but the KV cache holds 12 tokens \(3 pages of 4\), which must"),
        (13, {"max_tokens": 0}, r"13 tokens but the KV cache holds 12 tokens \(3 pages of 4\);"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    num_prompt_tokens: int, params: dict[str, Any], message: str
) -> None:
    num_pages = 3 if num_prompt_tokens < 20 else 30
    harness = Harness(num_pages, max_model_len=20)
    with pytest.raises(RequestError, match=message) as error:
        harness.add("a", num_prompt_tokens, **params)
    assert error.value.param == "prompt"
    assert not harness.scheduler.has_unfinished


def test_request_id_in_use_is_refused_and_free_again_afterwards() -> None:
    harness = Harness()
    harness.add("a", 3)
    with pytest.raises(RequestError, match="'a' is in use"):
        harness.add("a", 3)
    harness.drain()
    harness.add("a", 3)
    harness.drain()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"max_model_len": 0},
        {"policy": "shortest"},
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Harness(**settings)


@pytest.mark.parametrize(
    ("num_pages", "max_model_len", "num_prompt_tokens", "max_tokens", "num_outputs"),
    [
        (50, 20, 19, 9, 1),
        (50, 20, 13, None, 7),
        (50, 20, 20, 0, 0),
        (3, 20, 11, 9, 1),
        (3, 20, 5, None, 7),
        (3, 20, 12, 0, 0),
        (3, 20, 5, 7, 7),
    ],
)
def test_length_ends_at_max_model_len_or_the_whole_pool(
    num_pages: int,
    max_model_len: int,
    num_prompt_tokens: int,
    max_tokens: int | None,
    num_outputs: int,
) -> None:
    harness = Harness(num_pages, max_model_len=max_model_len)
    request = harness.add("a", num_prompt_tokens, max_tokens=max_tokens)
    harness.drain()
    assert request.num_output_tokens == num_outputs
    assert harness.finish_reasons() == {"a": FinishReason.LENGTH}
    assert request.num_preemptions == 0


# The token budget


def test_decode_rows_come_first_and_chunks_take_the_rest() -> None:
    harness = Harness(max_num_batched_tokens=16)
    harness.add("long", 30)
    harness.step()
    harness.add("short", 2)
    assert rows_of(harness.step()) == [("long", 16, 14), ("short", 0, 2)]
    harness.add("next", 40)
    output = harness.step()
    assert rows_of(output) == [("long", 30, 1), ("short", 2, 1), ("next", 0, 12)]
    assert output.num_decode_rows == 2
    assert output.num_tokens == 14
    assert [row.samples for row in output.rows] == [True, True, False]


def test_one_token_left_to_run_is_a_decode_row_wherever_it_comes_from() -> None:
    harness = Harness()
    harness.add("seed", range(8), max_tokens=1)
    harness.drain()
    harness.add("chunk", 5)
    harness.add("one", 1)
    harness.add("hit", [*range(8), 99])
    output = harness.step()
    assert rows_of(output) == [("one", 0, 1), ("hit", 8, 1), ("chunk", 0, 5)]
    assert output.num_decode_rows == 2


def test_chunk_boundaries_fall_on_pages() -> None:
    harness = Harness(max_num_batched_tokens=11)
    harness.add("a", 23)
    steps = [rows_of(harness.step()) for _ in range(4)]
    assert steps == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 7)], [("a", 23, 1)]]


def test_unaligned_chunk_realigns_when_there_is_room() -> None:
    harness = Harness(max_num_batched_tokens=3, page_size=4)
    harness.add("a", 11, max_tokens=1)
    steps = [harness.step() for _ in range(4)]
    rows = [rows_of(step) for step in steps]
    assert rows == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 3)], [("a", 7, 1)]]
    # One token of many left is a chunk, not a decode row.
    assert [step.num_decode_rows for step in steps] == [0, 0, 0, 0]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2, 3, 5])
def test_budget_smaller_than_a_page_still_finishes(max_num_batched_tokens: int) -> None:
    harness = Harness(max_num_batched_tokens=max_num_batched_tokens, page_size=16)
    requests = [harness.add(str(i), 5 + 11 * i) for i in range(4)]
    harness.drain()
    for request in requests:
        assert request.output_token_ids == generate_alone(request)


def test_long_prompt_progresses_beside_decode_rows_that_leave_less_than_a_page() -> None:
    harness = Harness(max_num_batched_tokens=4, page_size=8)
    harness.add("a", 2, max_tokens=100)
    harness.add("b", 2, max_tokens=100)
    harness.step()
    harness.add("long", 20)
    harness.add("later", 20)
    for _ in range(10):
        output = harness.step()
        assert output.num_decode_rows == 2
        assert [row.request.request_id for row in output.rows[2:]] == ["long"]
    assert harness.scheduler.num_waiting == 1


def test_second_chunk_of_a_step_closes_a_page_or_waits() -> None:
    harness = Harness(max_num_batched_tokens=10)
    harness.add("a", 7)
    harness.add("b", 12)
    assert rows_of(harness.step()) == [("a", 0, 7)]
    assert rows_of(harness.step()) == [("a", 7, 1), ("b", 0, 8)]


def test_decode_rows_beyond_the_budget_take_turns() -> None:
    harness = Harness(max_num_batched_tokens=4)
    for i in range(4):
        harness.add(str(i), 1, max_tokens=6)
    harness.step()
    harness.scheduler.max_num_batched_tokens = 2
    served = []
    for _ in range(6):
        output = harness.step()
        assert output.num_decode_rows == 2
        served += [row.request.request_id for row in output.rows]
    assert {name: served.count(name) for name in "0123"} == dict.fromkeys("0123", 3)
    assert sorted(served[:4]) == ["0", "1", "2", "3"]
    harness.drain()


def test_max_num_seqs_bounds_running_requests() -> None:
    harness = Harness(max_num_seqs=2)
    for i in range(5):
        harness.add(str(i), 3)
    harness.step()
    assert (harness.scheduler.num_running, harness.scheduler.num_waiting) == (2, 3)
    harness.drain()


# Admission


def test_admission_needs_pages_for_the_whole_prompt_and_one_token() -> None:
    harness = Harness(num_pages=6, max_num_batched_tokens=8)
    harness.add("a", 7, max_tokens=3)
    harness.step()
    harness.add("b", 15)
    # "a" holds 2 of 6 pages and needs a third soon; "b" needs 4.
    assert rows_of(harness.step()) == [("a", 7, 1)]
    harness.scheduler.abort("b")
    harness.add("c", 11)
    assert rows_of(harness.step()) == [("a", 8, 1), ("c", 0, 4)]


def test_prompts_that_fit_only_one_by_one_are_not_admitted_together() -> None:
    harness = Harness(num_pages=8, max_num_batched_tokens=8)
    harness.add("a", 20, max_tokens=2)
    harness.add("b", 20, max_tokens=2)
    first = harness.step()
    assert harness.pool.num_free_pages == 6
    assert rows_of(first) == [("a", 0, 8)]
    while "a" not in harness.finish_reasons():
        assert {row.request.request_id for row in harness.step().rows} == {"a"}
    harness.drain()
    assert harness.scheduler.num_preemptions_total == 0


def test_pages_that_a_running_prompt_still_needs_are_not_given_away() -> None:
    harness = Harness(num_pages=6, max_num_batched_tokens=10)
    harness.add("a", 20, max_tokens=2)
    harness.add("b", 2, max_tokens=2)
    # Budget and free pages would do for "b", but "a" needs all 6 pages in the end.
    assert rows_of(harness.step()) == [("a", 0, 8)]
    assert rows_of(harness.step()) == [("a", 8, 8)]
    assert rows_of(harness.step()) == [("a", 16, 4)]
    harness.drain()
    assert harness.scheduler.num_preemptions_total == 0


def test_head_of_the_queue_holds_up_those_behind_it() -> None:
    harness = Harness(num_pages=6)
    harness.add("a", 12, max_tokens=3)
    harness.add("big", 18)
    harness.add("small", 1)
    harness.step()
    harness.step()
    assert harness.scheduler.num_waiting == 2
    harness.drain()
    assert [o.request_id for o in harness.outputs if o.finish_reason] == ["a", "big", "small"]


def test_cached_pages_count_as_free_once_only() -> None:
    # 5 pages: 3 cached ones are hits of "b", so 2 are left for the 2 more that it needs.
    harness = Harness(num_pages=5)
    harness.add("a", range(12), max_tokens=1)
    harness.drain()
    harness.add("b", range(19), max_tokens=1)
    assert rows_of(harness.step()) == [("b", 12, 7)]
    harness.add("c", range(12), max_tokens=1)
    harness.drain()


# Priority


def test_fcfs_ignores_priority() -> None:
    harness = Harness(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", -5)):
        harness.add(name, 3, priority=priority)
    harness.drain()
    assert list(harness.finish_reasons()) == ["a", "b", "c"]


def test_priority_admits_lowest_value_first_and_ties_by_arrival() -> None:
    harness = Harness(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 5), ("b", 0), ("c", 0), ("d", -5)):
        harness.add(name, 3, priority=priority)
    harness.drain()
    assert list(harness.finish_reasons()) == ["d", "b", "c", "a"]


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "b"), ("priority", "a")])
def test_the_last_in_policy_order_is_preempted(policy: str, victim: str) -> None:
    harness = Harness(num_pages=4, policy=policy)
    a = harness.add("a", 6, max_tokens=8, priority=1)
    b = harness.add("b", 6, max_tokens=8, priority=0)
    harness.drain()
    assert {r.request_id for r in (a, b) if r.num_preemptions} == {victim}
    for request in (a, b):
        assert request.output_token_ids == generate_alone(request)


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    harness = Harness(num_pages=7, policy="priority")
    harness.add("high", 6, max_tokens=20, priority=0)
    low = harness.add("low", 10, max_tokens=20, priority=1)
    harness.step()
    harness.add("top", 11, priority=-1)
    output = run_until_preemption(harness)
    assert output.preempted == [low]
    assert rows_of(output) == [("high", 12, 1)]
    # The pages that "low" gave back are enough for "top", one step later.
    assert harness.pool.num_free_pages == 3
    assert rows_of(harness.step()) == [("high", 13, 1), ("top", 0, 11)]


# Preemption


def run_until_preemption(harness: Harness) -> SchedulerOutput:
    for _ in range(100):
        output = harness.step()
        if output.preempted:
            return output
    raise AssertionError("nothing was preempted")


def test_preemption_gives_back_pages_keeps_tokens_and_returns_first() -> None:
    harness = Harness(num_pages=6)
    harness.add("a", 7, max_tokens=12)
    harness.add("b", 7, max_tokens=12)
    c = harness.add("c", 11, max_tokens=12)
    harness.step()
    assert c.status is RequestStatus.WAITING
    output = run_until_preemption(harness)
    (victim,) = output.preempted
    assert victim.request_id == "b"
    assert "b" not in {row.request.request_id for row in output.rows}
    assert victim.pages == []
    assert victim.num_computed_tokens == 0
    assert victim.num_output_tokens > 0
    assert victim.status is RequestStatus.WAITING
    assert harness.scheduler.num_preemptions_total == victim.num_preemptions == 1
    harness.drain()
    assert list(harness.finish_reasons()) == ["a", "b", "c"]


def test_a_request_may_preempt_itself() -> None:
    harness = Harness(num_pages=4)
    a = harness.add("a", 6, max_tokens=3)
    b = harness.add("b", 7, max_tokens=6)
    harness.step()
    harness.step()
    # "b" is at a page's end first, and it is the last that came.
    output = harness.step()
    assert output.preempted == [b]
    assert rows_of(output) == [("a", 7, 1)]
    harness.drain()
    assert a.num_preemptions == 0
    assert b.output_token_ids == generate_alone(b)


def test_a_row_of_this_step_is_withdrawn_when_its_request_is_preempted() -> None:
    # "a" is served first and needs no page for its row; "b", which outranks it, then needs one.
    harness = Harness(num_pages=4, policy="priority")
    a = harness.add("a", 5, max_tokens=9, priority=1)
    harness.step()
    harness.add("b", 7, max_tokens=9, priority=0)
    output = run_until_preemption(harness)
    assert output.preempted == [a]
    assert a.num_tokens == 8
    assert rows_of(output) == [("b", 8, 1)]
    assert (output.num_tokens, output.num_decode_rows) == (1, 1)
    harness.drain()


def test_preempted_request_recomputes_prompt_and_output() -> None:
    harness = Harness(num_pages=4, enable_prefix_caching=False)
    harness.add("a", 6, max_tokens=8)
    b = harness.add("b", 6, max_tokens=8)
    run_until_preemption(harness)
    num_tokens = b.num_tokens
    assert num_tokens > 6
    rows: list[tuple[str, int, int]] = []
    while not rows:
        rows = [row for row in rows_of(harness.step()) if row[0] == "b"]
    assert rows == [("b", 0, num_tokens)]


def test_preempted_request_finds_its_own_pages_and_counts_no_hits() -> None:
    harness = Harness(num_pages=5)
    harness.add("a", 7, max_tokens=6)
    b = harness.add("b", 7, max_tokens=9)
    run_until_preemption(harness)
    queries = harness.scheduler.prefix_cache_queries_total
    rows: list[tuple[str, int, int]] = []
    while not rows:
        rows = [row for row in rows_of(harness.step()) if row[0] == "b"]
    assert rows[0][1] > 0
    assert b.num_prefix_hit_tokens == 0
    assert harness.scheduler.prefix_cache_queries_total == queries == 14
    assert harness.scheduler.prefix_cache_hits_total == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [3, 7, 64])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_outputs_do_not_depend_on_contention(
    policy: str, max_num_batched_tokens: int, enable_prefix_caching: bool
) -> None:
    settings: dict[str, Any] = {"eos_token_ids": (1, 2)}
    harness = Harness(
        num_pages=8,
        policy=policy,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        **settings,
    )
    requests = [
        harness.add(str(i), [*range(5), *range(i)], max_tokens=20 - i, priority=i % 3)
        for i in range(6)
    ]
    harness.drain()
    assert harness.scheduler.num_preemptions_total > 0
    for request in requests:
        assert request.output_token_ids == generate_alone(request, **settings)
        sent = [o.token_ids for o in harness.outputs if o.request_id == request.request_id]
        assert sent == [[token_id] for token_id in request.output_token_ids]


# The prefix cache


def test_whole_pages_of_a_shared_prefix_are_hits() -> None:
    harness = Harness()
    harness.add("a", range(10), max_tokens=1)
    harness.drain()
    b = harness.add("b", [*range(8), 90, 91, 92], max_tokens=1)
    assert rows_of(harness.step()) == [("b", 8, 3)]
    assert b.num_prefix_hit_tokens == harness.outputs[-1].num_prefix_hit_tokens == 8
    assert harness.scheduler.prefix_cache_queries_total == 10 + 11
    assert harness.scheduler.prefix_cache_hits_total == 8


@pytest.mark.parametrize(("num_tokens", "start"), [(8, 4), (9, 8), (4, 0), (3, 0)])
def test_at_least_one_token_is_computed(num_tokens: int, start: int) -> None:
    harness = Harness()
    harness.add("a", range(12), max_tokens=1)
    harness.drain()
    harness.add("b", range(num_tokens), max_tokens=1)
    assert rows_of(harness.step()) == [("b", start, num_tokens - start)]


def test_prompts_that_diverge_share_only_what_is_equal() -> None:
    harness = Harness()
    a = harness.add("a", range(16), max_tokens=5)
    harness.step()
    b = harness.add("b", [0, 1, 2, 3, 4, 5, 99, 7, *range(8, 16)], max_tokens=5)
    assert ("b", 4, 12) in rows_of(harness.step())
    assert a.pages[0] == b.pages[0]
    assert not set(a.pages[1:]) & set(b.pages[1:])
    assert harness.pool.num_references(a.pages[0]) == 2
    harness.drain()
    for request in (a, b):
        assert request.output_token_ids == generate_alone(request)


def test_salts_separate_equal_prompts() -> None:
    harness = Harness()
    salts = [None, "", "x", "y", "x"]
    starts = []
    for index, salt in enumerate(salts):
        harness.add(str(index), range(9), max_tokens=1, cache_salt=salt)
        starts += [row[1] for row in rows_of(harness.step())]
    assert starts == [0, 0, 0, 0, 8]


def test_output_tokens_are_cached_too() -> None:
    harness = Harness()
    a = harness.add("a", 6, max_tokens=7)
    harness.drain()
    # 13 tokens are known and 12 were run: 3 pages.
    harness.add("b", [*a.token_ids, 1, 2, 3], max_tokens=1)
    assert rows_of(harness.step()) == [("b", 12, 4)]


def test_prompt_logprobs_skip_the_lookup() -> None:
    harness = Harness()
    harness.add("a", range(9), max_tokens=1)
    harness.drain()
    b = harness.add("b", range(9), max_tokens=1, prompt_logprobs=0)
    assert rows_of(harness.step()) == [("b", 0, 9)]
    assert b.num_prefix_hit_tokens == 0
    assert harness.scheduler.prefix_cache_queries_total == 9


def test_without_prefix_caching_nothing_is_looked_up() -> None:
    harness = Harness(enable_prefix_caching=False)
    for name in "ab":
        request = harness.add(name, range(9), max_tokens=1)
        assert rows_of(harness.step()) == [(name, 0, 9)]
        assert request.page_hashes == []
    assert harness.scheduler.prefix_cache_queries_total == 0


def test_equal_prompts_that_arrive_together_compute_their_prefix_once() -> None:
    harness = Harness()
    requests = [harness.add(str(i), range(18), max_tokens=3) for i in range(4)]
    assert rows_of(harness.step()) == [("0", 0, 18)]
    assert rows_of(harness.step())[1:] == [(str(i), 16, 2) for i in (1, 2, 3)]
    harness.drain()
    assert len({tuple(request.output_token_ids) for request in requests}) == 1
    assert harness.scheduler.prefix_cache_hits_total == 3 * 16


def test_a_shared_page_is_waited_for_no_longer_than_it_takes() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add("a", range(30))
    harness.add("b", [*range(4), 77, 78])
    assert rows_of(harness.step()) == [("a", 0, 8)]
    # "b" shares one page, which is there now, and starts as soon as the budget has room.
    assert rows_of(harness.step()) == [("a", 8, 8)]
    assert harness.scheduler.num_waiting == 1
    harness.scheduler.abort("a")
    assert rows_of(harness.step()) == [("b", 4, 2)]


def test_prefix_of_a_request_that_ends_early_is_not_waited_for() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add("a", range(30))
    harness.add("b", range(30))
    harness.step()
    harness.scheduler.fail("a", "broken")
    assert rows_of(harness.step()) == [("b", 8, 8)]
    harness.drain()


def test_reset_of_the_prefix_cache_while_requests_run() -> None:
    harness = Harness()
    a = harness.add("a", range(14))
    harness.step()
    harness.pool.reset_prefix_cache()
    b = harness.add("b", range(14))
    # "a" has computed the shared pages already and will not publish them again: no use waiting.
    assert rows_of(harness.step()) == [("a", 14, 1), ("b", 0, 14)]
    harness.drain()
    for request in (a, b):
        assert request.output_token_ids == generate_alone(request)


# Abort, fail, late updates


def abort_while_waiting(harness: Harness) -> None:
    harness.scheduler.abort("a")


def abort_in_prefill(harness: Harness) -> None:
    harness.step()
    harness.scheduler.abort("a")


def abort_in_decode(harness: Harness) -> None:
    for _ in range(4):
        harness.step()
    harness.scheduler.abort("a")


def abort_between_schedule_and_update(harness: Harness) -> None:
    output = harness.schedule()
    sampled = harness.model.run(output)
    harness.scheduler.abort("a")
    harness.scheduler.check()
    harness.update(output, sampled)


@pytest.mark.parametrize(
    "end",
    [
        abort_while_waiting,
        abort_in_prefill,
        abort_in_decode,
        abort_between_schedule_and_update,
    ],
)
def test_abort_frees_everything_and_leaves_others_alone(end: Callable[[Harness], None]) -> None:
    harness = Harness(max_num_batched_tokens=8)
    a = harness.add("a", 13)
    b = harness.add("b", 5)
    end(harness)
    harness.scheduler.check()
    assert a.status is RequestStatus.FINISHED
    assert a.pages == []
    assert harness.scheduler.unfinished_ids == ["b"]
    assert harness.scheduler.abort("a") is None
    harness.drain()
    assert "a" not in harness.finish_reasons()
    assert b.output_token_ids == generate_alone(b)


def test_abort_of_a_preempted_request() -> None:
    harness = Harness(num_pages=4)
    harness.add("a", 6, max_tokens=8)
    harness.add("b", 6, max_tokens=8)
    (victim,) = run_until_preemption(harness).preempted
    assert harness.scheduler.abort(victim.request_id) is victim
    assert harness.scheduler.num_waiting == 0
    harness.drain()


def test_abort_of_an_unknown_id_is_none() -> None:
    assert Harness().scheduler.abort("nobody") is None


def test_same_id_again_is_not_touched_by_the_old_step() -> None:
    harness = Harness()
    harness.add("a", range(6))
    output = harness.schedule()
    sampled = harness.model.run(output)
    harness.scheduler.abort("a")
    again = harness.add("a", range(50, 57))
    harness.update(output, sampled)
    assert again.num_output_tokens == 0
    harness.drain()
    assert again.output_token_ids == generate_alone(again)


def test_fail_ends_one_request_with_its_message() -> None:
    harness = Harness(max_num_batched_tokens=8)
    a = harness.add("a", 5)
    b = harness.add("b", 13)
    output = harness.schedule()
    sampled = harness.model.run(output)
    failed = harness.scheduler.fail("a", "the sampler broke")
    assert failed == TokenOutput(
        "a", [], finish_reason=FinishReason.ERROR, error="the sampler broke"
    )
    sampled.pop("a")
    harness.update(output, sampled)
    assert a.status is RequestStatus.FINISHED
    harness.drain()
    assert b.output_token_ids == generate_alone(b)
    with pytest.raises(KeyError):
        harness.scheduler.fail("a", "again")


def test_outstanding_tokens_are_not_scheduled_twice() -> None:
    harness = Harness(max_num_batched_tokens=8)
    a = harness.add("a", 13, max_tokens=3)
    steps = [harness.schedule() for _ in range(5)]
    # Pending tokens are run before they are known; the last one, which ends the request, never.
    assert [rows_of(step) for step in steps] == [
        [("a", 0, 8)],
        [("a", 8, 5)],
        [("a", 13, 1)],
        [("a", 14, 1)],
        [],
    ]
    rows = [step.rows[0] for step in steps[:4]]
    assert [row.samples for row in rows] == [False, True, True, True]
    assert [row.has_pending_token for row in rows] == [False, False, True, True]
    assert [row.output_position for row in rows[1:]] == [0, 1, 2]
    for output in steps:
        harness.update(output, harness.model.run(output))
    harness.drain()
    assert a.output_token_ids == generate_alone(a)


@pytest.mark.parametrize("max_tokens", [None, 1, 2, 3, 30])
@pytest.mark.parametrize("num_pages", [3, 50])
def test_no_row_goes_beyond_an_end_by_length(num_pages: int, max_tokens: int | None) -> None:
    harness = Harness(num_pages=num_pages, max_model_len=13)
    a = harness.add("a", 9, max_tokens=max_tokens)
    rows, previous = [], None
    while harness.scheduler.has_unfinished:
        output = harness.schedule()
        launched = output, harness.model.run(output)
        rows += rows_of(output)
        if previous is not None:
            harness.update(*previous)
        previous = launched
    num_outputs = min(max_tokens or 30, (12 if num_pages == 3 else 13) - 9)
    assert rows == [("a", 0, 9), *(("a", 9 + i, 1) for i in range(num_outputs - 1))]
    assert a.num_output_tokens == num_outputs
    assert harness.finish_reasons() == {"a": FinishReason.LENGTH}


def test_a_prompt_without_output_ends_with_its_last_chunk_however_late_the_first() -> None:
    harness = Harness(max_num_batched_tokens=4)
    harness.add("a", 10, max_tokens=0)
    steps = [harness.schedule() for _ in range(3)]
    for output in steps:
        assert not harness.outputs
        harness.update(output, harness.model.run(output))
    assert harness.finish_reasons() == {"a": FinishReason.LENGTH}


def test_a_row_behind_the_end_of_its_request_is_dropped() -> None:
    """EOS is sampled while the next row runs: its pages are free, and its token is nobody's."""
    harness = Harness(eos_token_ids=(7,))
    a, b = harness.add("a", 7), harness.add("b", 7)
    first = harness.schedule()
    harness.model.run(first)
    second = harness.schedule()
    assert rows_of(second) == [("a", 7, 1), ("b", 7, 1)]
    harness.update(first, {"a": SampledToken(7), "b": SampledToken(9)})
    assert [row.is_stale for row in second.rows] == [True, False]
    assert harness.finish_reasons() == {"a": FinishReason.STOP}
    assert a.pages == []
    harness.update(second, {"a": SampledToken(8), "b": SampledToken(8)})
    assert a.output_token_ids == [7]
    assert b.output_token_ids == [9, 8]


def test_without_chunked_prefill_a_prompt_runs_whole() -> None:
    harness = Harness(enable_chunked_prefill=False, max_num_batched_tokens=20, max_model_len=20)
    for name, length in (("a", 15), ("b", 9), ("c", 17)):
        harness.add(name, length, max_tokens=2)
    steps = [rows_of(harness.step()) for _ in range(4)]
    assert steps == [
        [("a", 0, 15)],
        [("a", 15, 1), ("b", 0, 9)],
        [("b", 9, 1), ("c", 0, 17)],
        [("c", 17, 1)],
    ]


def test_a_step_too_small_for_a_whole_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens is 19 .*len is 20: raise .* to 20, lower .* 19"):
        Harness(enable_chunked_prefill=False, max_num_batched_tokens=19, max_model_len=20)


def test_step_of_a_request_preempted_and_admitted_again_is_void() -> None:
    harness = Harness(num_pages=4, enable_prefix_caching=False)
    a = harness.add("a", 7, max_tokens=4)
    b = harness.add("b", 7, max_tokens=4)
    old = []
    for _ in range(20):
        output = harness.schedule()
        sampled = harness.model.run(output)
        for row in output.rows:
            if row.request is a or b.num_preemptions:
                harness.update(SchedulerOutput([row], row.num_tokens, 0, []), sampled)
            else:
                old.append(row)
        if b.num_preemptions and b.status is RequestStatus.RUNNING:
            break
    assert b.num_preemptions == 1
    num_computed_tokens = b.num_computed_tokens
    assert num_computed_tokens > 0
    assert [(row.start, row.is_stale) for row in old] == [(0, True), (7, True)]
    for row in old:
        harness.update(SchedulerOutput([row], 0, 0, []), {"b": SampledToken(1)})
    assert b.num_computed_tokens == num_computed_tokens
    harness.drain()
    assert b.output_token_ids == generate_alone(b)


def test_discarded_step_is_scheduled_again() -> None:
    harness = Harness(max_num_batched_tokens=8)
    a = harness.add("a", 13)
    harness.step()
    num_free_pages = harness.pool.num_free_pages
    output = harness.schedule()
    harness.scheduler.discard(output)
    harness.scheduler.check()
    assert harness.pool.num_free_pages == num_free_pages
    assert rows_of(harness.step()) == rows_of(output)
    harness.drain()
    assert a.output_token_ids == generate_alone(a)


def test_steps_updated_out_of_order_are_caught() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add("a", 13)
    harness.schedule()
    second = harness.schedule()
    with pytest.raises(AssertionError, match="out of order"):
        harness.scheduler.update(second, {"a": SampledToken(1)})


# check


def leak_page(harness: Harness) -> None:
    assert harness.pool.allocate(1)


def lose_page(harness: Harness) -> None:
    next(iter(harness.scheduler._running.values())).request.pages.pop()


def swap_page(harness: Harness) -> None:
    first, second = (entry.request for entry in harness.scheduler._running.values())
    first.pages[0] = second.pages[0]


def skip_tokens(harness: Harness) -> None:
    next(iter(harness.scheduler._running.values())).request.num_computed_tokens += PAGE_SIZE


def lose_request(harness: Harness) -> None:
    harness.scheduler._waiting._entries.pop()


def swap_queue(harness: Harness) -> None:
    harness.scheduler._waiting._entries.reverse()


@pytest.mark.parametrize(
    ("break_harness", "message"),
    [
        (leak_page, "pages are held"),
        (lose_page, "holds"),
        (swap_page, "hash of page|references are"),
        (skip_tokens, "that do not exist|holds"),
        (lose_request, "a request is lost"),
        (swap_queue, "out of order"),
    ],
)
def test_check_sees_each_kind_of_damage(
    break_harness: Callable[[Harness], None], message: str
) -> None:
    harness = Harness(max_num_seqs=2)
    for name in "abcd":
        harness.add(name, 6)
    harness.step()
    break_harness(harness)
    with pytest.raises(AssertionError, match=message):
        harness.scheduler.check()
