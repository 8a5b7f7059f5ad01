"""Which request runs how many tokens in the next step, and what becomes of the tokens sampled.

There is no prefill phase and no decode phase: each request has `num_computed_tokens` chasing
`num_tokens`, and a step spends one budget of tokens on them. In a step, first every running request
that lacks one token gets it, then chunks of longer work take what is left, then waiting requests
are admitted in the order of the policy. When pages run out, the request that is last in that order
is preempted: it gives back its pages, keeps its tokens and is computed anew later.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from nsa_serve.errors import RequestError
from nsa_serve.page_pool import PagePool, hash_page, root_hash
from nsa_serve.request import FinishReason, Request, RequestStatus, TokenLogprobs, TokenOutput

Policy = Literal["fcfs", "priority"]


class SampledToken(msgspec.Struct, frozen=True):
    """What the sampler chose for one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Tokens [start, start + num_tokens) of one request, to run in one step.

    samples: the row reaches the last known token, so its last position yields a new one.
    num_preemptions: the request's own count when the row was made.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    num_preemptions: int = 0

    @property
    def is_stale(self) -> bool:
        """True when the request ended or was preempted since: what the row computed is void."""
        request = self.request
        return (
            request.status is not RequestStatus.RUNNING
            or request.num_preemptions != self.num_preemptions
        )


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: its rows, the `num_decode_rows` rows that lacked exactly one token first.

    num_tokens: tokens of all rows. preempted: requests that lost their pages to this step.
    The runner appends to `Request.prompt_logprobs` for the rows that are not stale; a request that
    is preempted starts that list anew.
    """

    rows: list[ScheduledRow]
    num_tokens: int
    num_decode_rows: int
    preempted: list[Request]


@dataclass(slots=True, eq=False)
class _Entry:
    """A request and what only the scheduler knows of it."""

    request: Request
    arrival: int
    num_in_flight_tokens: int = 0

    @property
    def next_start(self) -> int:
        return self.request.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_remaining(self) -> int:
        return self.request.num_tokens - self.next_start


@dataclass(slots=True)
class _Step:
    """A step being made; both dicts are keyed by request id."""

    budget: int
    decode_rows: dict[str, ScheduledRow] = field(default_factory=dict)
    chunks: dict[str, ScheduledRow] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)


class Scheduler:
    """Continuous batching over one page pool.

    A request's tokens, prompt and output together, are at most `max_request_tokens`: the smaller of
    max_model_len and what the whole pool holds. One that reaches it ends with
    FinishReason.LENGTH, so a request can always run to its end when it is alone.

    policy: "fcfs" serves by arrival, "priority" by (`Request.priority`, arrival), lowest first.
    Raises ValueError when a limit is below 1 or the policy is unknown.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: Policy = "fcfs",
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if policy not in ("fcfs", "priority"):
            raise ValueError(f"policy must be 'fcfs' or 'priority', got {policy!r}")
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_request_tokens = min(max_model_len, pool.num_pages * pool.page_size)
        self.policy = policy
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_preemptions_total = 0
        self.prefix_cache_queries_total = 0  # tokens looked up
        self.prefix_cache_hits_total = 0  # tokens found
        self._num_arrivals = 0
        self._entries: dict[str, _Entry] = {}
        # In the order of service; decode rows that the budget left out come to the front.
        self._running: dict[str, _Entry] = {}
        # Sorted by _queue_key, so a preempted request is back before those that came after it.
        self._waiting: list[_Entry] = []

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
        entry = _Entry(request, self._num_arrivals)
        self._num_arrivals += 1
        self._entries[request.request_id] = entry
        request.status = RequestStatus.WAITING
        insort(self._waiting, entry, key=self._queue_key)

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state and free its pages; None when it is unknown or has ended."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._end(entry)
        return entry.request

    def fail(self, request_id: str, message: str) -> TokenOutput:
        """End one request with FinishReason.ERROR and free its pages; KeyError if unknown."""
        self._end(self._entries[request_id])
        return TokenOutput(request_id, [], finish_reason=FinishReason.ERROR, error=message)

    def schedule(self) -> SchedulerOutput:
        """Choose the rows of the next step and give them pages.

        Rows of earlier steps that were not yet updated count as run: their tokens are not
        scheduled again, so `update` may follow one or more steps late.
        """
        step = _Step(budget=self.max_num_batched_tokens)
        self._schedule_decode_rows(step)
        self._schedule_chunks(step)
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
        for row in output.rows:
            if row.is_stale:
                continue
            request = row.request
            entry = self._entries[request.request_id]
            assert row.start == request.num_computed_tokens, "steps were updated out of order"
            entry.num_in_flight_tokens -= row.num_tokens
            request.num_computed_tokens += row.num_tokens
            self._publish_pages(row)
            if row.samples:
                outputs.append(self._accept(entry, sampled[request.request_id]))
            elif request.params.max_tokens == 0 and entry.num_remaining == 0:
                self._end(entry)
                outputs.append(_make_output(request, [], FinishReason.LENGTH, is_first=True))
        return outputs

    def discard(self, output: SchedulerOutput) -> None:
        """Forget a step that did not run, so that `schedule` gives its tokens out again.

        With several steps outstanding, the newest is discarded first.
        """
        for row in output.rows:
            if row.is_stale:
                continue
            entry = self._entries[row.request.request_id]
            assert row.start + row.num_tokens == entry.next_start, "a later step is outstanding"
            entry.num_in_flight_tokens -= row.num_tokens
            num_kept = self._num_pages(entry.next_start)
            self.pool.release(row.request.pages[num_kept:])
            del row.request.pages[num_kept:]

    def check(self) -> None:
        """Raise AssertionError, saying which, when an invariant of scheduler or pool is broken."""
        self.pool.check()
        waiting = [entry.request.request_id for entry in self._waiting]
        assert sorted([*waiting, *self._running]) == sorted(self._entries), "a request is lost"
        assert len(self._running) <= self.max_num_seqs, f"{len(self._running)} requests run"
        keys = [self._queue_key(entry) for entry in self._waiting]
        assert keys == sorted(keys), f"the waiting queue is out of order: {keys}"
        for entry in self._waiting:
            request = entry.request
            assert request.status is RequestStatus.WAITING, f"{request.request_id} waits"
            assert not request.pages, f"waiting {request.request_id} holds pages {request.pages}"
            assert entry.next_start == 0, f"waiting {request.request_id} has computed tokens"
        for entry in self._running.values():
            self._check_running(entry)
        held = Counter(page for e in self._running.values() for page in e.request.pages)
        references = {page: self.pool.num_references(page) for page in held}
        assert references == held, f"references are {references}, page lists say {dict(held)}"
        num_held = self.pool.num_pages - self.pool.num_free_pages
        assert num_held == len(held), f"{num_held} pages are held, requests list {len(held)}"

    def _check_running(self, entry: _Entry) -> None:
        request, name = entry.request, entry.request.request_id
        assert request.status is RequestStatus.RUNNING, f"{name} runs, but is {request.status}"
        assert entry.num_in_flight_tokens >= 0, f"{name} has negative tokens in flight"
        assert entry.next_start <= request.num_tokens, f"{name} ran tokens that do not exist"
        num_pages = self._num_pages(entry.next_start)
        assert len(request.pages) == num_pages, f"{name} holds {request.pages}, not {num_pages}"
        num_full_pages = request.num_computed_tokens // self.pool.page_size
        for index, page in enumerate(request.pages):
            page_hash = self.pool.page_hash(page)
            if page_hash is not None:
                assert index < num_full_pages, f"{name}: page {page} is published, not computed"
                assert page_hash == request.page_hashes[index], f"{name}: hash of page {page}"

    def _check_request(self, request: Request) -> None:
        if request.request_id in self._entries:
            raise RequestError(
                f"request id {request.request_id!r} is in use; choose another", param="request_id"
            )
        num_prompt_tokens = request.num_prompt_tokens
        if num_prompt_tokens == 0:
            raise RequestError("prompt is empty; send at least one token", param="prompt")
        num_tokens = _num_tokens_to_fit(request)
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

    def _queue_key(self, entry: _Entry) -> tuple[int, int]:
        priority = entry.request.priority if self.policy == "priority" else 0
        return priority, entry.arrival

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)

    def _schedule_decode_rows(self, step: _Step) -> None:
        ready = [entry for entry in self._running.values() if entry.num_remaining == 1]
        for entry in ready:
            if step.budget == 0:
                break
            if self._grow(entry, 1, step):
                self._add_row(entry, 1, step)
        if len(step.decode_rows) < len(ready):
            # Those served go to the back, so that the rest are first in the next step.
            for request_id in step.decode_rows:
                self._running[request_id] = self._running.pop(request_id)

    def _schedule_chunks(self, step: _Step) -> None:
        for entry in list(self._running.values()):
            if entry.num_remaining == 0:
                continue
            num_tokens = self._chunk_len(entry.next_start, entry.num_remaining, step)
            if num_tokens and self._grow(entry, num_tokens, step):
                self._add_row(entry, num_tokens, step)

    def _chunk_len(self, start: int, num_remaining: int, step: _Step) -> int:
        """Return how many tokens from `start` fit the step: all that remain, else whole pages.

        A chunk that closes no page is only for the first chunk of a step, which must progress
        however small the budget is; others wait for a step with more room.
        """
        if num_remaining <= step.budget:
            return num_remaining
        end = start + step.budget
        end -= end % self.pool.page_size
        if end > start:
            return end - start
        return 0 if step.chunks else step.budget

    def _add_row(self, entry: _Entry, num_tokens: int, step: _Step) -> None:
        request = entry.request
        num_remaining = entry.num_remaining
        samples = num_tokens == num_remaining and request.params.max_tokens != 0
        row = ScheduledRow(request, entry.next_start, num_tokens, samples, request.num_preemptions)
        rows = step.decode_rows if num_remaining == 1 else step.chunks
        rows[request.request_id] = row
        step.budget -= num_tokens
        entry.num_in_flight_tokens += num_tokens

    def _grow(self, entry: _Entry, num_tokens: int, step: _Step) -> bool:
        """Give a running request the pages for its next tokens, preempting others if need be.

        Returns False when the request itself is preempted, now or earlier in the step.
        """
        request = entry.request
        while request.status is RequestStatus.RUNNING:
            count = self._num_pages(entry.next_start + num_tokens) - len(request.pages)
            pages = self.pool.allocate(count)
            if pages is not None:
                request.pages.extend(pages)
                return True
            assert len(self._running) > 1, f"{request.request_id} does not fit the pool alone"
            self._preempt(max(self._running.values(), key=self._queue_key), step)
        return False

    def _preempt(self, entry: _Entry, step: _Step) -> None:
        request = entry.request
        rows = step.chunks if request.request_id in step.chunks else step.decode_rows
        row = rows.pop(request.request_id, None)
        if row is not None:
            step.budget += row.num_tokens
        del self._running[request.request_id]
        self._release_pages(entry)
        request.num_computed_tokens = 0
        # Its prompt is run again, and the runner reports on each prompt token it runs. A new list:
        # the old one may be part of an output.
        request.prompt_logprobs = []
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        insort(self._waiting, entry, key=self._queue_key)
        step.preempted.append(request)
        self.num_preemptions_total += 1

    def _admit(self, step: _Step) -> None:
        """Start waiting requests, in order, while seats, budget and pages last.

        A request starts only when all its tokens, and one more, fit beside what the running ones
        still need for theirs; the first that does not fit holds up those behind it.
        """
        num_claimed = sum(self._num_missing_pages(e.request) for e in self._running.values())
        while self._waiting and step.budget and len(self._running) < self.max_num_seqs:
            entry = self._waiting[0]
            request = entry.request
            hits = self._find_hits(request)
            if self._is_prefix_coming(request, len(hits)):
                break
            num_free = self.pool.num_free_pages - self.pool.num_unreferenced(hits) - num_claimed
            if self._num_pages(_num_tokens_to_fit(request)) - len(hits) > num_free:
                break
            start = len(hits) * self.pool.page_size
            num_tokens = self._chunk_len(start, request.num_tokens - start, step)
            if num_tokens == 0:
                break
            self._start(entry, hits)
            has_grown = self._grow(entry, num_tokens, step)
            assert has_grown, f"{request.request_id} was admitted without pages"
            self._add_row(entry, num_tokens, step)
            num_claimed += self._num_missing_pages(request)

    def _num_missing_pages(self, request: Request) -> int:
        return max(0, self._num_pages(_num_tokens_to_fit(request)) - len(request.pages))

    def _find_hits(self, request: Request) -> list[int]:
        """Return cached pages of the request's prefix; at least one token is left to compute."""
        if not self._uses_prefix_cache(request):
            return []
        self._extend_hashes(request)
        return self.pool.find_prefix(request.page_hashes[: self._max_hits(request)])

    def _uses_prefix_cache(self, request: Request) -> bool:
        # Prompt logprobs need the hidden state of every prompt token, so every one must run.
        return self.pool.enable_prefix_caching and request.params.prompt_logprobs is None

    def _max_hits(self, request: Request) -> int:
        return (request.num_tokens - 1) // self.pool.page_size

    def _is_prefix_coming(self, request: Request, num_hits: int) -> bool:
        """True when a running request is yet to compute the page that the hits end before.

        Waiting for it is cheaper than computing it twice: of n samples of one prompt, or requests
        with one system prompt that arrive together, one computes and the others share.
        """
        if not self._uses_prefix_cache(request) or num_hits >= self._max_hits(request):
            return False
        page_hash = request.page_hashes[num_hits]
        for entry in self._running.values():
            hashes = entry.request.page_hashes
            num_computed_pages = entry.request.num_computed_tokens // self.pool.page_size
            if num_computed_pages <= num_hits < len(hashes) and hashes[num_hits] == page_hash:
                return True
        return False

    def _start(self, entry: _Entry, hits: list[int]) -> None:
        request = entry.request
        del self._waiting[0]
        self._running[request.request_id] = entry
        request.status = RequestStatus.RUNNING
        self.pool.take(hits)
        request.pages = list(hits)
        request.num_computed_tokens = len(hits) * self.pool.page_size
        # A preempted request finds its own pages again; that is no hit that anybody saved.
        if request.num_preemptions == 0 and self._uses_prefix_cache(request):
            request.num_prefix_hit_tokens = request.num_computed_tokens
            self.prefix_cache_queries_total += request.num_tokens
            self.prefix_cache_hits_total += request.num_computed_tokens

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full pages of known tokens; tokens are only appended, so hashes stay valid."""
        page_size, hashes = self.pool.page_size, request.page_hashes
        for start in range(len(hashes) * page_size, request.num_tokens - page_size + 1, page_size):
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            hashes.append(hash_page(parent, request.token_ids[start : start + page_size]))

    def _publish_pages(self, row: ScheduledRow) -> None:
        if not self.pool.enable_prefix_caching:
            return
        request, page_size = row.request, self.pool.page_size
        self._extend_hashes(request)
        for index in range(row.start // page_size, request.num_computed_tokens // page_size):
            self.pool.register(request.pages[index], request.page_hashes[index])

    def _accept(self, entry: _Entry, token: SampledToken) -> TokenOutput:
        request = entry.request
        is_first = request.num_output_tokens == 0
        request.append_token(token.token_id)
        finish_reason, stop_reason = self._stop(request, token.token_id)
        if finish_reason is not None:
            self._end(entry)
        return _make_output(request, [token], finish_reason, stop_reason, is_first=is_first)

    def _stop(self, request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
        params = request.params
        if request.num_output_tokens >= params.min_tokens:
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
            if token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
        is_full = request.num_tokens >= self.max_request_tokens
        if is_full or request.num_output_tokens == params.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _end(self, entry: _Entry) -> None:
        request = entry.request
        del self._entries[request.request_id]
        if request.status is RequestStatus.RUNNING:
            del self._running[request.request_id]
            self._release_pages(entry)
        else:
            key = self._queue_key(entry)
            index = bisect_left(self._waiting, key, key=self._queue_key)
            assert self._waiting[index] is entry, f"{request.request_id} is not in the queue"
            del self._waiting[index]
        request.status = RequestStatus.FINISHED

    def _release_pages(self, entry: _Entry) -> None:
        self.pool.release(entry.request.pages)
        entry.request.pages = []
        entry.num_in_flight_tokens = 0


def _num_tokens_to_fit(request: Request) -> int:
    """Tokens that must have room for the request to be worth starting."""
    return request.num_tokens + (request.params.max_tokens != 0)


def _make_output(
    request: Request,
    tokens: list[SampledToken],
    finish_reason: FinishReason | None,
    stop_reason: int | None = None,
    *,
    is_first: bool,
) -> TokenOutput:
    logprobs = [token.logprobs for token in tokens if token.logprobs is not None]
    has_prompt_logprobs = is_first and request.params.prompt_logprobs is not None
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[token.token_id for token in tokens],
        logprobs=logprobs or None,
        prompt_logprobs=request.prompt_logprobs if has_prompt_logprobs else None,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_prefix_hit_tokens=request.num_prefix_hit_tokens,
    )
