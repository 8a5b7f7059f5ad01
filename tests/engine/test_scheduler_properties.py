"""Random lives of the scheduler: no page leaks, no request is lost, no output changes.

Steps may be updated late, discarded, or overtaken by aborts and failures, over a pool that is too
small. Whatever happens, what a request generates is what it generates alone.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from nsa_serve.page_pool import PagePool
from nsa_serve.request import FinishReason, Request, RequestStatus, TokenOutput
from nsa_serve.scheduler import SampledToken, ScheduledRow, Scheduler, SchedulerOutput

from .paged_model import PagedModel, make_request, make_windows, next_token

EOS_TOKEN_ID = 7
MAX_OUTSTANDING_STEPS = 3


def generate_by_definition(request: Request, max_request_tokens: int) -> list[int]:
    """What the model says to this prompt, without any scheduler."""
    history = list(request.prompt_token_ids)
    max_tokens = request.params.max_tokens
    num_prompt_tokens = len(history)
    while len(history) - num_prompt_tokens != max_tokens:
        history.append(next_token(history))
        if history[-1] == EOS_TOKEN_ID or len(history) == max_request_tokens:
            break
    return history[num_prompt_tokens:]


class SchedulerMachine(RuleBasedStateMachine):
    """add, abort, fail, schedule, update, discard and reset in any order."""

    ids = Bundle("ids")

    @initialize(
        num_pages=st.integers(2, 9),
        page_size=st.sampled_from([1, 3, 4]),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 20),
        max_model_len=st.integers(2, 30),
        policy=st.sampled_from(["fcfs", "priority"]),
        enable_prefix_caching=st.booleans(),
        enable_chunked_prefill=st.sampled_from([True, True, False]),
        # Window size, length of a compression window (at most a page), pages for prefix hits.
        window=st.one_of(
            st.none(), st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 8))
        ),
    )
    def start(self, **drawn: Any) -> None:
        self.enable_chunked_prefill = drawn["enable_chunked_prefill"]
        if not self.enable_chunked_prefill:
            drawn["max_num_batched_tokens"] += drawn["max_model_len"] - 1
        page_size = drawn.pop("page_size")
        caching = drawn.pop("enable_prefix_caching")
        self.pool = PagePool(drawn.pop("num_pages") + 1, page_size, enable_prefix_caching=caching)
        window_size, cmp_len, num_extra = drawn.pop("window") or (0, 0, 0)
        cmp_len = min(cmp_len, page_size)
        self.windows = None
        if cmp_len:
            self.windows = make_windows(
                page_size,
                window_size=window_size,
                cmp_len=cmp_len,
                max_num_batched_tokens=drawn["max_num_batched_tokens"],
                max_num_seqs=drawn["max_num_seqs"],
                num_extra=num_extra,
                enable_prefix_caching=caching,
            )
        self.scheduler = Scheduler(
            self.pool, eos_token_ids=(EOS_TOKEN_ID,), windows=self.windows, **drawn
        )
        self.model = PagedModel(page_size, window_size=window_size, cmp_len=cmp_len)
        self.requests: dict[str, Request] = {}
        self.sent: dict[str, list[TokenOutput]] = {}
        self.ended_by_us: set[str] = set()
        self.outstanding: list[tuple[SchedulerOutput, dict[str, SampledToken]]] = []
        self.num_pending_rows = 0

    @rule(
        target=ids,
        # Two symbols and short prompts, so that prefixes meet.
        prompt=st.lists(st.sampled_from([100, 101]), min_size=1, max_size=14),
        max_tokens=st.one_of(st.none(), st.integers(0, 9)),
        priority=st.integers(-1, 1),
        cache_salt=st.sampled_from([None, None, "salt"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, prompt: list[int], max_tokens: int | None, **drawn: Any) -> str:
        request_id = str(len(self.requests))
        request = make_request(request_id, prompt, max_tokens=max_tokens, **drawn)
        num_tokens = len(prompt) + (max_tokens != 0)
        if num_tokens > self.scheduler.max_request_tokens:
            with pytest.raises(ValueError, match="tokens but"):
                self.scheduler.add(request)
            self.ended_by_us.add(request_id)
        else:
            self.scheduler.add(request)
        self.requests[request_id] = request
        self.sent[request_id] = []
        return request_id

    @rule(request_id=consumes(ids))
    def abort(self, request_id: str) -> None:
        was_unfinished = request_id in self.scheduler.unfinished_ids
        request = self.scheduler.abort(request_id)
        assert (request is not None) == was_unfinished
        if was_unfinished:
            self.ended_by_us.add(request_id)

    @rule(request_id=consumes(ids))
    def fail(self, request_id: str) -> None:
        if request_id in self.scheduler.unfinished_ids:
            output = self.scheduler.fail(request_id, "injected")
            assert output.finish_reason is FinishReason.ERROR
            self.ended_by_us.add(request_id)
        else:
            with pytest.raises(KeyError):
                self.scheduler.fail(request_id, "injected")

    @precondition(lambda self: len(self.outstanding) < MAX_OUTSTANDING_STEPS)
    @rule()
    def schedule(self) -> None:
        output = self.scheduler.schedule()
        self.check_output(output)
        self.outstanding.append((output, self.model.run(output)))

    @precondition(lambda self: self.outstanding)
    @rule()
    def update(self) -> None:
        output, sampled = self.outstanding.pop(0)
        expected = {
            row.request.request_id for row in output.rows if row.samples and not row.is_stale
        }
        outputs = self.scheduler.update(output, sampled)
        got = {out.request_id for out in outputs if out.token_ids}
        assert got == expected
        for out in outputs:
            self.sent[out.request_id].append(out)

    @precondition(lambda self: self.outstanding)
    @rule()
    def discard(self) -> None:
        output, _ = self.outstanding.pop()
        self.scheduler.discard(output)

    @rule()
    def step(self) -> None:
        while self.outstanding:
            self.update()
        has_work = self.scheduler.has_unfinished
        self.schedule()
        assert bool(self.outstanding[-1][0].rows) == has_work, "a step makes no progress"
        self.update()

    @rule(num_steps=st.integers(1, 12))
    def overlap(self, num_steps: int) -> None:
        """Schedule each step while the one before it is in flight, as the engine does."""
        while len(self.outstanding) > 1:
            self.update()
        for _ in range(num_steps):
            has_work = self.scheduler.has_unfinished
            self.schedule()
            # Nothing to run, nothing in flight, and yet somebody waits: that would never end.
            is_moving = bool(self.outstanding[-1][0].rows) or len(self.outstanding) > 1
            assert is_moving or not has_work, "a step makes no progress"
            if len(self.outstanding) > 1:
                self.update()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def check_output(self, output: SchedulerOutput) -> None:
        counts = [row.num_tokens for row in output.rows]
        assert min(counts, default=1) >= 1
        assert sum(counts) == output.num_tokens <= self.scheduler.max_num_batched_tokens
        assert set(counts[: output.num_decode_rows]) <= {1}
        names = [row.request.request_id for row in output.rows]
        assert len(set(names)) == len(names)
        assert not set(names) & {request.request_id for request in output.preempted}
        for row in output.rows:
            request, end = row.request, row.start + row.num_tokens
            assert len(request.pages) * self.pool.page_size >= end
            if self.windows is not None:
                self.check_window_bound(row)
            entry = self.scheduler._entries[request.request_id]
            num_tokens = entry.num_tokens - row.samples
            assert row.has_pending_token == (end > request.num_tokens)
            assert row.num_tokens == 1 or not row.has_pending_token
            assert row.output_position == end - request.num_prompt_tokens
            self.num_pending_rows += row.has_pending_token
            # An end by length is foreseen: no row computes what nobody can use.
            assert end < self.max_len(request) or request.params.max_tokens == 0
            is_last = end == num_tokens
            assert row.samples == (is_last and request.params.max_tokens != 0)
            if not is_last:
                # What was left out did not fit the budget.
                num_left = self.scheduler.max_num_batched_tokens - output.num_tokens
                assert num_left < num_tokens - row.start
                assert self.enable_chunked_prefill, "a prompt was cut"

    def check_window_bound(self, row: ScheduledRow) -> None:
        """A row has the window pages that its tokens read and write, and no other."""
        assert self.windows is not None
        first = self.windows.first_index(row.start)
        pages = row.request.swa_pages
        assert not any(pages[:first])
        assert all(pages[first:])
        assert len(pages) == len(row.request.pages)

    def max_len(self, request: Request) -> int:
        """Most tokens that a request can have, prompt and output together."""
        if request.params.max_tokens is None:
            return self.scheduler.max_request_tokens
        wanted = request.num_prompt_tokens + request.params.max_tokens
        return min(self.scheduler.max_request_tokens, wanted)

    def check_ended(self, request: Request) -> None:
        expected = generate_by_definition(request, self.scheduler.max_request_tokens)
        outputs = self.sent[request.request_id]
        sent = [token_id for out in outputs for token_id in out.token_ids]
        assert sent == request.output_token_ids
        if request.request_id in self.ended_by_us:
            assert sent == expected[: len(sent)]
            assert all(out.finish_reason is None for out in outputs)
            return
        assert sent == expected
        assert [out.finish_reason for out in outputs[:-1]] == [None] * (len(outputs) - 1)
        has_stopped = bool(sent) and sent[-1] == EOS_TOKEN_ID
        last = FinishReason.STOP if has_stopped else FinishReason.LENGTH
        assert outputs[-1].finish_reason is last
        assert request.status is RequestStatus.FINISHED

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.scheduler.has_unfinished:
            self.step()
            self.scheduler.check()
        while self.outstanding:
            self.update()
        self.scheduler.check()
        assert self.pool.num_free_pages == self.pool.num_pages
        if self.windows is not None:
            assert self.windows.pool.num_free_pages == self.windows.pool.num_pages
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for request in self.requests.values():
            self.check_ended(request)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
