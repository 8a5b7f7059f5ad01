"""Window pages: what a request holds, what a prefix hit needs of them, and a pool that never lacks.

The model of `paged_model.py` reads every window page that attention would, and fails on wrong ones.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.page_pool import NULL_PAGE, PagePool, hash_page, root_hash
from nsa_serve.request import Request
from nsa_serve.scheduler import SampledToken, SchedulerOutput
from nsa_serve.window_pages import WindowPages, history_len, num_row_pages, num_step_pages

from .paged_model import PAGE_SIZE, Harness, generate_alone, make_request

# Queries read 8 tokens before their own: two pages, or three where they begin inside one.
WINDOW = {"window_size": 9, "cmp_len": 4}


def held(request: Request) -> list[int]:
    return [index for index, page in enumerate(request.swa_pages) if page != NULL_PAGE]


def chain(num_pages: int) -> list[bytes]:
    hashes = [root_hash(None)]
    for index in range(num_pages):
        hashes.append(hash_page(hashes[-1], [index]))
    return hashes[1:]


# What a prefix hit needs


def hits_by_definition(
    cached: list[bool], *, page_size: int, window_size: int, cmp_len: int
) -> int:
    """The longest k whose next token finds its window, and the tail of the page before it."""
    for num_hits in range(len(cached), 0, -1):
        position = num_hits * page_size
        needed = {i // page_size for i in range(max(0, position - window_size + 1), position)}
        if cmp_len > 1:
            needed.add(num_hits - 1)
        if all(cached[index] for index in needed):
            return num_hits
    return 0


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    cached=st.lists(st.sampled_from([True, True, True, False]), max_size=14),
    page_size=st.integers(1, 5),
    window_size=st.integers(0, 17),
    cmp_len=st.integers(1, 5),
)
def test_hits_are_those_whose_windows_are_cached(
    cached: list[bool], page_size: int, window_size: int, cmp_len: int
) -> None:
    cmp_len = min(cmp_len, page_size)
    pool = PagePool(len(cached) + 2, page_size)
    hashes = chain(len(cached))
    pages = pool.allocate(len(cached))
    assert pages is not None
    for page, page_hash, is_cached in zip(pages, hashes, cached, strict=True):
        if is_cached:
            pool.register(page, page_hash)
    pool.release(pages)
    windows = WindowPages(pool, history_len=history_len(window_size, cmp_len))
    geometry = {"page_size": page_size, "window_size": window_size, "cmp_len": cmp_len}
    num_hits = windows.num_hits(hashes)
    assert num_hits == hits_by_definition(cached, **geometry)
    request = make_request("a", 1)
    request.page_hashes = hashes
    windows.take(request, num_hits)
    assert len(request.swa_pages) == num_hits
    assert held(request) == list(range(windows.first_index(num_hits * page_size), num_hits))
    windows.release(request)
    pool.check()


@pytest.mark.parametrize("num_shared", [3, 4, 7, 12, 15, 16, 19, 20, 23])
def test_a_hit_on_a_prefix_whose_window_is_cached(num_shared: int) -> None:
    harness = Harness(**WINDOW, num_extra=20)
    first = harness.add("first", 20)
    harness.drain()
    prompt = first.prompt_token_ids
    other = prompt[:num_shared] + [1] * (24 - num_shared)
    second = harness.add("second", other)
    harness.drain()
    shared = min(num_shared, len(first.token_ids) - 1)
    assert second.num_prefix_hit_tokens == shared // PAGE_SIZE * PAGE_SIZE
    assert second.output_token_ids == generate_alone(second)


def evict(pool: PagePool, page_hash: bytes) -> None:
    """Take pages until this one is forgotten, and give them back."""
    pages: list[int] = []
    while pool.find_prefix([page_hash]):
        more = pool.allocate(1)
        assert more is not None
        pages += more
    pool.release(pages)


def test_an_evicted_window_shortens_the_hit() -> None:
    harness = Harness(**WINDOW, num_extra=20)
    first = harness.add("first", 41)
    harness.drain()
    assert harness.windows is not None
    # What a window at page 4 reads went first, what one at page 10 reads is still there.
    evict(harness.windows.pool, first.page_hashes[3])
    hits = {}
    for num_pages in (10, 4, 3, 2):
        tokens = first.prompt_token_ids[: num_pages * PAGE_SIZE]
        request = harness.add(f"{num_pages}", [*tokens, 7], max_tokens=1)
        harness.step()
        hits[num_pages] = request.num_prefix_hit_tokens // PAGE_SIZE
        harness.drain()
        assert request.output_token_ids == generate_alone(request)
        evict(harness.windows.pool, first.page_hashes[3])
    assert hits[10] == 10
    assert hits[4] < 4


def test_long_prompts_do_not_evict_the_ends_of_others() -> None:
    """What a prompt passes goes first, so that the prompts of many are found afterwards."""
    harness = Harness(300, **WINDOW, num_extra=16)
    firsts = []
    for number in range(6):
        firsts.append(harness.add(f"{number}", 121 + number))
        harness.drain()
    for more in ([7], []):
        for number, first in enumerate(firsts):
            tokens = [*first.prompt_token_ids, *more]
            request = harness.add(f"again {number} {len(more)}", tokens, max_tokens=1)
            harness.drain()
            # Its last token runs in any case, and so does the page that it is in.
            assert request.num_prefix_hit_tokens == (len(tokens) - 1) // PAGE_SIZE * PAGE_SIZE
            assert request.output_token_ids == generate_alone(request)


def test_without_a_cached_window_nothing_is_taken() -> None:
    harness = Harness(**WINDOW, num_extra=20)
    first = harness.add("first", 20)
    harness.drain()
    assert harness.windows is not None
    harness.windows.pool.reset_prefix_cache()
    second = harness.add("second", first.prompt_token_ids)
    harness.drain()
    assert second.num_prefix_hit_tokens == 0
    assert second.output_token_ids == first.output_token_ids
    # It left its own: the main pages were there, the window pages are again.
    third = harness.add("third", first.prompt_token_ids)
    harness.drain()
    assert third.num_prefix_hit_tokens == 16


def test_reset_forgets_both_groups() -> None:
    harness = Harness(**WINDOW, num_extra=20)
    harness.add("first", 20)
    harness.drain()
    assert harness.windows is not None
    assert harness.windows.pool.num_cached_pages == harness.pool.num_cached_pages == 5
    harness.scheduler.reset_prefix_cache()
    assert harness.windows.pool.num_cached_pages == harness.pool.num_cached_pages == 0


def test_without_prefix_caching_no_window_page_is_kept() -> None:
    harness = Harness(**WINDOW, num_extra=20, enable_prefix_caching=False)
    harness.add("first", 50)
    harness.drain()
    assert harness.windows is not None
    assert harness.windows.pool.num_cached_pages == 0


# What a request holds


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_a_long_request_holds_its_window_and_the_chunk(is_overlapped: bool) -> None:
    page_size, window, budget = 64, 512, 8192
    harness = Harness(
        1100,
        page_size=page_size,
        window_size=window,
        cmp_len=32,
        max_num_batched_tokens=budget,
        max_model_len=70_000,
    )
    scheduler, windows = harness.scheduler, harness.windows
    assert windows is not None
    request = harness.add("long", [5] * 65_536, max_tokens=200)
    in_flight: list[SchedulerOutput] = []
    most = {True: 0, False: 0}
    while scheduler.has_unfinished:
        output = scheduler.schedule()
        in_flight.append(output)
        for row in output.rows:
            most[row.num_tokens > 1] = max(most[row.num_tokens > 1], len(held(request)))
        if not is_overlapped or len(in_flight) > 1 or not output.rows:
            for step in in_flight[: 1 if is_overlapped and output.rows else 2]:
                scheduler.update(step, {"long": SampledToken(9)})
                in_flight.remove(step)
    assert most[False] <= window // page_size + 2
    assert most[True] <= budget // page_size + window // page_size + 2
    assert windows.pool.num_free_pages == windows.pool.num_pages
    assert len(held(request)) == 0
    scheduler.check()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    page_size=st.integers(1, 9),
    history=st.integers(0, 30),
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), min_size=1, max_size=6),
)
def test_no_step_needs_more_than_the_pool_has(
    page_size: int, history: int, rows: list[tuple[int, int]]
) -> None:
    """rows: of every running request, its first token and how many it has; 0 is no row."""
    needed = 0
    for start, num_tokens in rows:
        touched = {i // page_size for i in range(max(0, start - history), start + num_tokens)}
        needed += len(touched)
        if num_tokens <= 1:
            assert len(touched) <= num_row_pages(page_size, history_len=history)
    num_pages = num_step_pages(
        page_size,
        history_len=history,
        max_num_batched_tokens=max(1, sum(num_tokens for _, num_tokens in rows)),
        max_num_seqs=len(rows),
    )
    assert needed <= num_pages - 1


def test_the_pool_of_the_paper_s_window() -> None:
    assert history_len(512, 32) == 511
    assert history_len(0, 32) == 31
    assert num_row_pages(64, history_len=511) == 512 // 64 + 2
    num_pages = num_step_pages(64, history_len=511, max_num_batched_tokens=8192, max_num_seqs=64)
    assert num_pages == 8192 // 64 + 64 * (512 // 64 + 2) + 1


def test_every_seat_taken_by_a_long_request_leaves_no_row_without_pages() -> None:
    """Chunks wait for budget while others decode; all of them are beyond their windows."""
    harness = Harness(100, **WINDOW, max_num_seqs=5, max_num_batched_tokens=13, max_model_len=90)
    requests = [harness.add(f"{number}", 30 + number, max_tokens=40) for number in range(5)]
    most = 0
    assert harness.windows is not None
    pool = harness.windows.pool
    while harness.scheduler.has_unfinished:
        harness.step()
        most = max(most, pool.num_pages - pool.num_free_pages)
    assert most >= 15, "every request should hold three pages at some time"
    for request in requests:
        assert request.output_token_ids == generate_alone(request)


# Steps in flight


def overlapped(**settings: Any) -> Harness:
    return Harness(max_num_batched_tokens=16, **WINDOW, num_extra=20, **settings)


def test_pages_passed_while_a_step_is_in_flight_are_found_later() -> None:
    """A chunk longer than the window passes pages of the chunk before it, which is in flight."""
    harness = overlapped()
    first = harness.add("first", 49, max_tokens=1)
    in_flight: list[tuple[SchedulerOutput, dict[str, SampledToken]]] = []
    while harness.scheduler.has_unfinished:
        output = harness.schedule()
        in_flight.append((output, harness.model.run(output)))
        if len(in_flight) > 1 or not output.rows:
            harness.update(*in_flight.pop(0))
    for num_pages in range(1, 13):
        prompt = [*first.prompt_token_ids[: num_pages * PAGE_SIZE], 7]
        request = harness.add(f"{num_pages}", prompt, max_tokens=1)
        harness.drain()
        assert request.num_prefix_hit_tokens == num_pages * PAGE_SIZE
        assert request.output_token_ids == generate_alone(request)


def test_pages_of_steps_that_did_not_run_are_not_found() -> None:
    harness = overlapped()
    first = harness.add("first", 49, max_tokens=3)
    outputs = [harness.schedule(), harness.schedule()]
    assert harness.windows is not None
    assert harness.windows.pool.num_cached_pages == 2
    while outputs:
        harness.scheduler.discard(outputs.pop())
        harness.scheduler.check()
    assert harness.windows.pool.num_cached_pages == 0
    assert harness.pool.num_free_pages == harness.pool.num_pages
    harness.drain()
    assert first.output_token_ids == generate_alone(first)


def test_an_abort_in_flight_releases_both_groups() -> None:
    harness = overlapped()
    harness.add("first", 49)
    outputs = [harness.schedule(), harness.schedule()]
    harness.scheduler.abort("first")
    harness.scheduler.check()
    second = harness.add("second", 30)
    for output in outputs:
        harness.update(output, {})
    harness.drain()
    assert second.output_token_ids == generate_alone(second)


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_preemption_gives_back_both_groups(enable_prefix_caching: bool) -> None:
    harness = Harness(
        12, **WINDOW, num_extra=4, enable_prefix_caching=enable_prefix_caching, max_num_seqs=3
    )
    requests = [harness.add(f"{number}", 11, max_tokens=20) for number in range(3)]
    harness.drain()
    assert harness.scheduler.num_preemptions_total > 0
    for request in requests:
        assert request.output_token_ids == generate_alone(request)
