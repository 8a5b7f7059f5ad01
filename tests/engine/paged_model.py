"""A stand-in for the model, and a scheduler driven over it step by step."""

import zlib
from collections.abc import Iterable
from typing import Any

from nsa_serve.page_pool import NULL_PAGE, PagePool, hash_page
from nsa_serve.request import EngineRequest, FinishReason, Request, SamplingParams, TokenOutput
from nsa_serve.scheduler import SampledToken, ScheduledRow, Scheduler, SchedulerOutput
from nsa_serve.window_pages import WindowPages, history_len, num_step_pages

PAGE_SIZE = 4
VOCAB_SIZE = 50


class PagedModel:
    """A stand-in for the model: its next token is a checksum of the history that the pages hold.

    A page shared, freed or overwritten wrongly changes what a row reads back, hence its token.
    A step is run when it is scheduled, as on a device whose stream runs behind the host; a pending
    token is what the model itself sampled for that position.

    window_size, cmp_len: of a model with window pages. Each row then reads them as attention would,
    and finds there what the tokens up to each position make of it.
    """

    def __init__(self, page_size: int, *, window_size: int = 0, cmp_len: int = 0) -> None:
        self.page_size = page_size
        self.window_size = window_size
        self.cmp_len = cmp_len
        self.slots: dict[int, int] = {}  # page * page_size + offset -> token id
        # What k_swa, v_swa and k_tail, v_tail hold: window page, offset or position % cmp_len.
        self.window_slots: dict[tuple[int, int], bytes] = {}
        self.tail_slots: dict[tuple[int, int], bytes] = {}
        self.sampled: dict[tuple[int, int], int] = {}  # id(request), position -> token id

    def slot(self, request: Request, position: int) -> int:
        page = request.pages[position // self.page_size]
        assert page != NULL_PAGE
        return page * self.page_size + position % self.page_size

    def run(self, output: SchedulerOutput) -> dict[str, SampledToken]:
        """Write every row's tokens to its pages, then sample the rows that ask for it."""
        for row in output.rows:
            for position in range(row.start, row.start + row.num_tokens):
                slot = self.slot(row.request, position)
                self.slots[slot] = self._token(row, position)
        if self.cmp_len:
            for row in output.rows:
                self._run_windows(row)
        tokens = {}
        for row in output.rows:
            if row.samples:
                token_id = self._next_token(row)
                self.sampled[id(row.request), row.start + row.num_tokens] = token_id
                tokens[row.request.request_id] = SampledToken(token_id)
        return tokens

    def _run_windows(self, row: ScheduledRow) -> None:
        """Write a row's tokens to its window pages, and read what its queries attend to."""
        request, start, stop = row.request, row.start, row.start + row.num_tokens
        content = [b""]
        for position in range(stop):
            token_id = self.slots[self.slot(request, position)]
            content.append(hash_page(content[-1], [token_id]))
        pages = request.swa_pages
        # A tail is read for tokens of earlier rows only, before this row writes to it.
        for position in range(max(0, start - self.cmp_len + 1), start):
            page = pages[position // self.page_size]
            assert self.tail_slots[page, position % self.cmp_len] == content[position + 1]
        for position in range(start, stop):
            page = pages[position // self.page_size]
            assert page != NULL_PAGE
            self.window_slots[page, position % self.page_size] = content[position + 1]
            self.tail_slots[page, position % self.cmp_len] = content[position + 1]
        for position in range(max(0, start - self.window_size + 1), stop):
            page = pages[position // self.page_size]
            assert self.window_slots[page, position % self.page_size] == content[position + 1]

    def _token(self, row: ScheduledRow, position: int) -> int:
        token_ids = row.request.token_ids
        if position < len(token_ids):
            return token_ids[position]
        assert row.has_pending_token and position == row.start
        return self.sampled[id(row.request), position]

    def _next_token(self, row: ScheduledRow) -> int:
        positions = range(row.start + row.num_tokens)
        history = [self.slots[self.slot(row.request, position)] for position in positions]
        return next_token(history)


def next_token(history: Iterable[int]) -> int:
    return zlib.crc32(repr(list(history)).encode()) % VOCAB_SIZE


def make_request(
    request_id: str,
    prompt: int | Iterable[int],
    *,
    priority: int = 0,
    cache_salt: str | None = None,
    **params: Any,
) -> Request:
    """A request with this prompt, or with a prompt of this many tokens that no other id shares."""
    if isinstance(prompt, int):
        prompt = [zlib.crc32(f"{request_id} {i}".encode()) % 1000 + 100 for i in range(prompt)]
    params.setdefault("max_tokens", 4)
    message = EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),
        priority=priority,
        cache_salt=cache_salt,
    )
    return Request(message, arrival_s=0.0)


def make_windows(
    page_size: int,
    *,
    window_size: int,
    cmp_len: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    num_extra: int = 0,
    enable_prefix_caching: bool = True,
) -> WindowPages:
    """Window pages with a pool of just what steps need, and `num_extra` for prefix hits."""
    history = history_len(window_size, cmp_len)
    num_pages = num_step_pages(
        page_size,
        history_len=history,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )
    pool = PagePool(num_pages + num_extra, page_size, enable_prefix_caching=enable_prefix_caching)
    return WindowPages(pool, history_len=history)


class Harness:
    """A scheduler, its pools and the model, driven step by step with `check` after each.

    window_size, cmp_len, num_extra: of window pages, see `make_windows`; without cmp_len none.
    """

    def __init__(
        self,
        num_pages: int = 100,
        *,
        window_size: int = 0,
        cmp_len: int = 0,
        num_extra: int = 0,
        **settings: Any,
    ) -> None:
        enable_prefix_caching = settings.pop("enable_prefix_caching", True)
        page_size = settings.pop("page_size", PAGE_SIZE)
        pool = PagePool(num_pages + 1, page_size, enable_prefix_caching=enable_prefix_caching)
        settings = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 200,
        } | settings
        self.pool = pool
        self.windows = None
        if cmp_len:
            self.windows = make_windows(
                page_size,
                window_size=window_size,
                cmp_len=cmp_len,
                max_num_batched_tokens=settings["max_num_batched_tokens"],
                max_num_seqs=settings["max_num_seqs"],
                num_extra=num_extra,
                enable_prefix_caching=enable_prefix_caching,
            )
        self.scheduler = Scheduler(pool, windows=self.windows, **settings)
        self.model = PagedModel(page_size, window_size=window_size, cmp_len=cmp_len)
        self.outputs: list[TokenOutput] = []

    def add(self, request_id: str, prompt: int | Iterable[int], **params: Any) -> Request:
        request = make_request(request_id, prompt, **params)
        self.scheduler.add(request)
        self.scheduler.check()
        return request

    def schedule(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.scheduler.check()
        return output

    def update(self, output: SchedulerOutput, sampled: dict[str, SampledToken]) -> None:
        self.outputs += self.scheduler.update(output, sampled)
        self.scheduler.check()

    def step(self) -> SchedulerOutput:
        output = self.schedule()
        self.update(output, self.model.run(output))
        return output

    def drain(self) -> None:
        """Run to the end; a step without rows would never end."""
        while self.scheduler.has_unfinished:
            assert self.step().rows, "requests are left but nothing is scheduled"
        assert self.pool.num_free_pages == self.pool.num_pages
        if self.windows is not None:
            assert self.windows.pool.num_free_pages == self.windows.pool.num_pages

    def finish_reasons(self) -> dict[str, FinishReason]:
        reasons = [(o.request_id, o.finish_reason) for o in self.outputs if o.finish_reason]
        assert len(reasons) == len(dict(reasons)), "a request ended twice"
        return dict(reasons)


def rows_of(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(row.request.request_id, row.start, row.num_tokens) for row in output.rows]


def generate_alone(request: Request, **settings: Any) -> list[int]:
    """Tokens of the same request with a whole pool to itself and no prefix cache."""
    harness = Harness(enable_prefix_caching=False, **settings)
    alone = Request(
        EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
        )
    )
    harness.scheduler.add(alone)
    harness.drain()
    return alone.output_token_ids
