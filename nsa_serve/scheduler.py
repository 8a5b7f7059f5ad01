"""Which request runs how many tokens in the next step, and what becomes of the tokens sampled.

There is no prefill phase and no decode phase: each request has `num_computed_tokens` chasing
`num_tokens`, and a step spends one budget of tokens on them. In a step, first every running request
that lacks one token gets it, then chunks of longer work take what is left, then waiting requests
are admitted in the order of the policy. When pages run out, the request that is last in that order
is preempted: it gives back its pages, keeps its tokens and is computed anew later.

Steps may be in flight, scheduled and not updated. A token that one of them samples is pending: the
next row of its request can be scheduled without it, since where a row lies does not depend on what
it holds. What cannot be foreseen is a token that ends its request: then the row behind it is
stale, and what it computes is dropped. An end by length is foreseen, so no row goes beyond it.

Pages of a request that ends or is preempted are free at once, though a stale row may yet write to
them. That is safe where steps run in the order in which they were scheduled, as on the stream of a
device: whoever gets such a page next writes to it in a later step, and reads of it only what it
wrote. The prefix cache has no page that a stale row writes to: a row writes to pages that are not
full without it, and a page is published when the rows that fill it are updated, which a stale row
never is. Window pages may be published earlier, see `window_pages.py`, but only full of known
tokens, which a row writes whether it is stale by then or not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nsa_serve.errors import ConfigError, RequestError
from nsa_serve.page_pool import PagePool
from nsa_serve.prefix_cache import PrefixCache
from nsa_serve.request import FinishReason, Request, RequestStatus, TokenOutput
from nsa_serve.scheduler_check import check_requests, check_windows
from nsa_serve.scheduler_output import (
    SampledToken,
    ScheduledRow,
    SchedulerOutput,
    make_token_output,
)
from nsa_serve.scheduler_queue import Entry, Policy, WaitingQueue
from nsa_serve.window_pages import WindowPages

__all__ = ["Policy", "SampledToken", "ScheduledRow", "Scheduler", "SchedulerOutput"]


@dataclass(slots=True)
class _Step:
    """A step being made; both dicts are keyed by request id."""

    budget: int
    decode_rows: dict[str, ScheduledRow] = field(default_factory=dict)
    chunks: dict[str, ScheduledRow] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Continuous batching over one page pool, or two.

    A request's tokens, prompt and output together, are at most `max_request_tokens`: the smaller of
    max_model_len and what the whole pool holds. One that reaches it ends with
    FinishReason.LENGTH, so a request can always run to its end when it is alone.

    enable_chunked_prefill: a prompt may be run in several steps; without, it takes one.
    policy: "fcfs" serves by arrival, "priority" by (`Request.priority`, arrival), lowest first.
    windows: of a model with window pages, with a pool for these limits (`num_step_pages`).
    clock: the one of `Request.arrival_s`, in seconds.
    Raises ValueError when a limit is below 1 or the policy is unknown, ConfigError when prompts
    must not be cut and the longest does not fit in a step.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        policy: Policy = "fcfs",
        eos_token_ids: tuple[int, ...] = (),
        windows: WindowPages | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"without chunked prefill a prompt runs in one step, but max_num_batched_tokens is "
                f"{max_num_batched_tokens} and max_model_len is {max_model_len}: raise "
                f"--max-num-batched-tokens to {max_model_len}, lower --max-model-len to "
                f"{max_num_batched_tokens}, or leave chunked prefill on"
            )
        self.pool = pool
        self.windows = windows
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_request_tokens = min(max_model_len, pool.num_pages * pool.page_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_preemptions_total = 0
        self.prefix_cache_queries_total = 0  # tokens looked up
        self.prefix_cache_hits_total = 0  # tokens found
        self._enable_chunked_prefill = enable_chunked_prefill
        self._num_arrivals = 0
        self._entries: dict[str, Entry] = {}
        # In the order of service; decode rows that the budget left out come to the front.
        self._running: dict[str, Entry] = {}
        self._waiting = WaitingQueue(policy)
        self._prefix_cache = PrefixCache(pool, windows)
        self._clock = clock

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._entries)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def unfinished_ids(self) -> list[str]:
        """Ids of all requests that wait or run, in the order of arrival."""
        return list(self._entries)

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises RequestError when its id is in use, its prompt is empty, or its prompt and one token
        to generate (none for max_tokens 0) exceed max_model_len or the whole page pool.
        """
        self._check_request(request)
        entry = Entry(request, self._num_arrivals, self._max_tokens(request))
        self._num_arrivals += 1
        self._entries[request.request_id] = entry
        request.status = RequestStatus.WAITING
        self._waiting.add(entry)

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state and free its pages; None when it is unknown or has ended."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._end(entry)
        return entry.request

    def fail(self, request_id: str, message: str, *, error_kind: str | None = None) -> TokenOutput:
        """End one request with FinishReason.ERROR and free its pages; KeyError if unknown."""
        self._end(self._entries[request_id])
        return TokenOutput(
            request_id,
            [],
            finish_reason=FinishReason.ERROR,
            error=message,
            error_kind=error_kind,
        )

    def schedule(self) -> SchedulerOutput:
        """Choose the rows of the next step and give them pages.

        Rows of earlier steps that were not yet updated count as run: their tokens are not
        scheduled again, and those that they sample are pending. So `update` may follow one or more
        steps late.
        """
        step = _Step(budget=self.max_num_batched_tokens)
        if self.windows is not None:
            # All of them, rows or not: else what long chunks have passed could fill the pool.
            for entry in self._running.values():
                self.windows.pass_by(entry.request, entry.next_start)
        longer = self._schedule_decode_rows(step)
        self._schedule_chunks(step, longer)
        # The pages of a preempted request are for those that run: admitting it again, or another,
        # in the same step would take them back.
        if not step.preempted:
            self._admit(step)
        return SchedulerOutput(
            rows=[*step.decode_rows.values(), *step.chunks.values()],
            num_tokens=self.max_num_batched_tokens - step.budget,
            num_decode_rows=len(step.decode_rows),
            preempted=step.preempted,
        )

    def update(
        self, output: SchedulerOutput, sampled: Mapping[str, SampledToken]
    ) -> list[TokenOutput]:
        """Take in what a step computed; return an output per request that got a token or ended.

        sampled: by request id, the token of each row with `samples`. Stale rows are skipped. Steps
        are updated in the order in which they were scheduled.
        """
        outputs = []
        page_size = self.pool.page_size
        for row in output.rows:
            if row.is_stale:
                continue
            request, start, num_tokens = row.request, row.start, row.num_tokens
            entry = self._entries[request.request_id]
            assert start == request.num_computed_tokens, "steps were updated out of order"
            entry.num_in_flight_tokens -= num_tokens
            request.num_computed_tokens = end = start + num_tokens
            if start // page_size != end // page_size:
                self._prefix_cache.publish(request, start=start)
            if row.samples:
                entry.num_pending_tokens -= 1
                outputs.append(self._accept(entry, sampled[request.request_id]))
            elif end == request.num_prompt_tokens and request.params.max_tokens == 0:
                self._end(entry)
                outputs.append(make_token_output(request, None, FinishReason.LENGTH, is_first=True))
        return outputs

    def discard(self, output: SchedulerOutput) -> None:
        """Forget a step that did not run, so that `schedule` gives its tokens out again.

        With several steps outstanding, the newest is discarded first. With window pages, its
        requests are preempted: what they have passed for the sake of this step may be gone. So are
        the hashes of window pages, some of which may stand for tokens of this step.
        """
        if self.windows is not None:
            self.windows.pool.reset_prefix_cache()
        for row in output.rows:
            if row.is_stale:
                continue
            entry = self._entries[row.request.request_id]
            assert row.start + row.num_tokens == entry.next_start, "a later step is outstanding"
            if self.windows is not None:
                self._requeue(entry)
                continue
            entry.num_in_flight_tokens -= row.num_tokens
            entry.num_pending_tokens -= row.samples
            num_kept = self._num_pages(entry.next_start)
            self.pool.release(row.request.pages[num_kept:])
            del row.request.pages[num_kept:]

    def reset_prefix_cache(self) -> None:
        """Forget what all pages hold; requests that run keep theirs."""
        self.pool.reset_prefix_cache()
        if self.windows is not None:
            self.windows.pool.reset_prefix_cache()

    def check(self) -> None:
        """Raise AssertionError, saying which, when an invariant of scheduler or pool is broken."""
        self.pool.check()
        assert len(self._running) <= self.max_num_seqs, f"{len(self._running)} requests run"
        check_requests(self.pool, self._entries, self._waiting, self._running.values())
        check_windows(self.windows, self._waiting, self._running.values())

    def _check_request(self, request: Request) -> None:
        if request.request_id in self._entries:
            raise RequestError(
                f"request id {request.request_id!r} is in use; choose another", param="request_id"
            )
        num_prompt_tokens = request.num_prompt_tokens
        if num_prompt_tokens == 0:
            raise RequestError("prompt is empty; send at least one token", param="prompt")
        num_tokens = num_prompt_tokens + (request.params.max_tokens != 0)
        room = "" if num_tokens == num_prompt_tokens else ", which must also hold one output token"
        if num_tokens > self.max_model_len:
            raise RequestError(
                f"prompt has {num_prompt_tokens} tokens but max_model_len is "
                f"{self.max_model_len}{room}; shorten it or raise --max-model-len",
                param="prompt",
            )
        if num_tokens > self.max_request_tokens:
            raise RequestError(
                f"prompt has {num_prompt_tokens} tokens but the KV cache holds "
                f"{self.max_request_tokens} tokens ({self.pool.num_pages} pages of "
                f"{self.pool.page_size}){room}; shorten it or raise --page-memory",
                param="prompt",
            )

    def _max_tokens(self, request: Request) -> int:
        """Return the length at which a request ends at the latest."""
        max_tokens = request.params.max_tokens
        if max_tokens is None:
            return self.max_request_tokens
        return min(self.max_request_tokens, request.num_prompt_tokens + max_tokens)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)

    def _schedule_decode_rows(self, step: _Step) -> list[Entry]:
        """Add the rows of requests that lack one token; return those that lack more."""
        ready: list[Entry] = []
        longer: list[Entry] = []
        for entry in self._running.values():
            num_remaining = entry.num_remaining
            if num_remaining == 1:
                ready.append(entry)
            elif num_remaining:
                longer.append(entry)
        page_size = self.pool.page_size
        for entry in ready:
            if step.budget == 0:
                break
            request = entry.request
            # Most tokens go to the last page that their request has.
            has_room = entry.next_start < len(request.pages) * page_size
            if (has_room and request.status is RequestStatus.RUNNING) or self._grow(entry, 1, step):
                self._add_row(entry, 1, step)
        if len(step.decode_rows) < len(ready):
            # Those served go to the back, so that the rest are first in the next step.
            for request_id in step.decode_rows:
                self._running[request_id] = self._running.pop(request_id)
        return longer

    def _schedule_chunks(self, step: _Step, entries: list[Entry]) -> None:
        for entry in entries:
            num_tokens = self._chunk_len(entry.next_start, entry.num_remaining, step)
            if num_tokens and self._grow(entry, num_tokens, step):
                self._add_row(entry, num_tokens, step)

    def _chunk_len(self, start: int, num_remaining: int, step: _Step) -> int:
        """Return how many tokens from `start` fit the step: all that remain, else whole pages.

        Without chunked prefill it is all or none. A chunk that closes no page is only for the first
        chunk of a step, which must progress however small the budget is; others wait for a step
        with more room.
        """
        if num_remaining <= step.budget:
            return num_remaining
        if not self._enable_chunked_prefill:
            return 0
        end = start + step.budget
        end -= end % self.pool.page_size
        if end > start:
            return end - start
        return 0 if step.chunks else step.budget

    def _add_row(self, entry: Entry, num_tokens: int, step: _Step) -> None:
        request = entry.request
        start, num_remaining = entry.next_start, entry.num_remaining
        samples = num_tokens == num_remaining and request.params.max_tokens != 0
        row = ScheduledRow(
            request,
            start,
            num_tokens,
            samples,
            request.num_preemptions,
            start + num_tokens > len(request.token_ids),
        )
        rows = step.decode_rows if num_remaining == 1 else step.chunks
        rows[request.request_id] = row
        step.budget -= num_tokens
        entry.num_in_flight_tokens += num_tokens
        entry.num_pending_tokens += samples

    def _grow(self, entry: Entry, num_tokens: int, step: _Step) -> bool:
        """Give a running request the pages for its next tokens, preempting others if need be.

        Returns False when the request itself is preempted, now or earlier in the step.
        """
        request = entry.request
        while request.status is RequestStatus.RUNNING:
            count = self._num_pages(entry.next_start + num_tokens) - len(request.pages)
            if count <= 0:
                return True
            pages = self.pool.allocate(count)
            if pages is not None:
                request.pages.extend(pages)
                if self.windows is not None:
                    self.windows.grow(request, len(request.pages))
                return True
            assert len(self._running) > 1, f"{request.request_id} does not fit the pool alone"
            self._preempt(max(self._running.values(), key=self._waiting.key), step)
        return False

    def _preempt(self, entry: Entry, step: _Step) -> None:
        request = entry.request
        rows = step.chunks if request.request_id in step.chunks else step.decode_rows
        row = rows.pop(request.request_id, None)
        if row is not None:
            step.budget += row.num_tokens
        self._requeue(entry)
        step.preempted.append(request)

    def _requeue(self, entry: Entry) -> None:
        """Take a running request's pages and let it wait, to be computed anew."""
        request = entry.request
        del self._running[request.request_id]
        self._release_pages(entry)
        request.num_computed_tokens = 0
        # Its prompt is run again, and the runner reports on each prompt token it runs. A new list:
        # the old one may be part of an output.
        request.prompt_logprobs = []
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._waiting.add(entry)
        self.num_preemptions_total += 1

    def _admit(self, step: _Step) -> None:
        """Start waiting requests, in order, while seats, budget and pages last.

        A request starts only when all its tokens, and one more, fit beside what the running ones
        still need for theirs; the first that does not fit holds up those behind it.
        """
        if not self._waiting:
            return
        num_claimed = sum(map(self._num_missing_pages, self._running.values()))
        while self._waiting and step.budget and len(self._running) < self.max_num_seqs:
            entry = self._waiting.first
            request = entry.request
            hits = self._prefix_cache.find_hits(request)
            running = (other.request for other in self._running.values())
            if self._prefix_cache.is_prefix_coming(request, len(hits), running=running):
                break
            num_free = self.pool.num_free_pages - self.pool.num_unreferenced(hits) - num_claimed
            if self._num_pages(_num_tokens_to_fit(entry)) - len(hits) > num_free:
                break
            start = len(hits) * self.pool.page_size
            num_tokens = self._chunk_len(start, request.num_tokens - start, step)
            if num_tokens == 0:
                break
            self._start(entry, hits)
            has_grown = self._grow(entry, num_tokens, step)
            assert has_grown, f"{request.request_id} was admitted without pages"
            self._add_row(entry, num_tokens, step)
            num_claimed += self._num_missing_pages(entry)

    def _num_missing_pages(self, entry: Entry) -> int:
        return max(0, self._num_pages(_num_tokens_to_fit(entry)) - len(entry.request.pages))

    def _start(self, entry: Entry, hits: list[int]) -> None:
        request = entry.request
        self._waiting.remove(entry)
        self._running[request.request_id] = entry
        request.status = RequestStatus.RUNNING
        if request.scheduled_s is None:
            request.scheduled_s = self._clock()
        self.pool.take(hits)
        request.pages = list(hits)
        if self.windows is not None:
            self.windows.take(request, len(hits))
        request.num_computed_tokens = len(hits) * self.pool.page_size
        # A preempted request finds its own pages again; that is no hit that anybody saved.
        if request.num_preemptions == 0 and self._prefix_cache.is_used_by(request):
            request.num_prefix_hit_tokens = request.num_computed_tokens
            self.prefix_cache_queries_total += request.num_tokens
            self.prefix_cache_hits_total += request.num_computed_tokens

    def _accept(self, entry: Entry, token: SampledToken) -> TokenOutput:
        request = entry.request
        is_first = not request.output_token_ids
        request.append_token(token.token_id)
        finish_reason, stop_reason = self._stop(entry, token.token_id)
        if finish_reason is not None:
            self._end(entry)
        return make_token_output(request, token, finish_reason, stop_reason, is_first=is_first)

    def _stop(self, entry: Entry, token_id: int) -> tuple[FinishReason | None, int | None]:
        request = entry.request
        params = request.params
        # A grammar lets EOS come only at its end, after which nothing can be sampled.
        is_eos = token_id in self.eos_token_ids
        if is_eos and request.matcher is not None:
            return FinishReason.STOP, None
        is_stop = token_id in params.stop_token_ids
        if (is_eos or is_stop) and request.num_output_tokens >= params.min_tokens:
            if is_eos and not params.ignore_eos:
                return FinishReason.STOP, None
            if is_stop:
                return FinishReason.STOP, token_id
        if len(request.token_ids) >= entry.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _end(self, entry: Entry) -> None:
        request = entry.request
        del self._entries[request.request_id]
        if request.status is RequestStatus.RUNNING:
            del self._running[request.request_id]
            self._release_pages(entry)
        else:
            self._waiting.remove(entry)
        request.status = RequestStatus.FINISHED

    def _release_pages(self, entry: Entry) -> None:
        self.pool.release(entry.request.pages)
        entry.request.pages = []
        if self.windows is not None:
            self.windows.release(entry.request)
        # Rows in flight are stale from here on, and so are the tokens that they sample.
        entry.num_in_flight_tokens = 0
        entry.num_pending_tokens = 0


def _num_tokens_to_fit(entry: Entry) -> int:
    """Tokens that must have room for the request to be worth starting."""
    return min(entry.request.num_tokens + 1, entry.max_tokens)
