"""The scheduler's invariants: no request lost, no page leaked, no hash that lies."""

from collections import Counter
from collections.abc import Collection, Iterable

from nsa_serve.page_pool import NULL_PAGE, PagePool
from nsa_serve.request import RequestStatus
from nsa_serve.scheduler_queue import Entry, WaitingQueue
from nsa_serve.window_pages import WindowPages


def check_requests(
    pool: PagePool, known_ids: Iterable[str], waiting: WaitingQueue, running: Collection[Entry]
) -> None:
    """Raise AssertionError, saying which, when requests, queues and pages disagree."""
    names = [entry.request.request_id for entry in (*waiting, *running)]
    assert sorted(names) == sorted(known_ids), "a request is lost"
    keys = [waiting.key(entry) for entry in waiting]
    assert keys == sorted(keys), f"the waiting queue is out of order: {keys}"
    for entry in waiting:
        request = entry.request
        assert request.status is RequestStatus.WAITING, f"{request.request_id} waits"
        assert not request.pages, f"waiting {request.request_id} holds pages {request.pages}"
        assert entry.next_start == 0, f"waiting {request.request_id} has computed tokens"
        assert not entry.num_pending_tokens, f"waiting {request.request_id} has pending tokens"
    for entry in running:
        _check_running(pool, entry)
    _check_held(pool, [page for entry in running for page in entry.request.pages])


def check_windows(
    windows: WindowPages | None, waiting: WaitingQueue, running: Collection[Entry]
) -> None:
    """Raise AssertionError, saying which, when requests and window pages disagree."""
    if windows is None:
        listed = [entry.request for entry in (*waiting, *running) if entry.request.swa_pages]
        assert not listed, f"{listed[0].request_id} holds window pages of a model without"
        return
    windows.pool.check()
    for entry in waiting:
        request = entry.request
        assert not request.swa_pages, f"waiting {request.request_id} holds {request.swa_pages}"
    for entry in running:
        request, name, pages = entry.request, entry.request.request_id, entry.request.swa_pages
        assert len(pages) == len(request.pages), f"{name} lists {pages} beside {request.pages}"
        num_passed = next((i for i, page in enumerate(pages) if page != NULL_PAGE), len(pages))
        num_unread = windows.first_index(entry.next_start)
        assert num_passed <= num_unread, f"{name} lacks page {num_unread} of {pages}"
        assert NULL_PAGE not in pages[num_passed:], f"{name} has a hole in {pages}"
        for page, page_hash in zip(pages, request.page_hashes, strict=False):
            known = windows.pool.page_hash(page)
            assert known in (None, page_hash), f"{name}: hash of window page {page}"
    _check_held(
        windows.pool,
        [page for entry in running for page in entry.request.swa_pages if page != NULL_PAGE],
    )


def _check_held(pool: PagePool, listed: Iterable[int]) -> None:
    """Raise AssertionError unless references are what the lists of requests say."""
    held = Counter(listed)
    references = {page: pool.num_references(page) for page in held}
    assert references == held, f"references are {references}, page lists say {dict(held)}"
    num_held = pool.num_pages - pool.num_free_pages
    assert num_held == len(held), f"{num_held} pages are held, requests list {len(held)}"


def _check_running(pool: PagePool, entry: Entry) -> None:
    request, name = entry.request, entry.request.request_id
    assert request.status is RequestStatus.RUNNING, f"{name} runs, but is {request.status}"
    assert entry.num_in_flight_tokens >= 0, f"{name} has negative tokens in flight"
    num_pending = entry.num_pending_tokens
    assert 0 <= num_pending <= entry.num_in_flight_tokens, f"{name} has {num_pending} pending"
    assert entry.next_start <= entry.num_tokens, f"{name} ran tokens that do not exist"
    assert request.num_tokens < entry.max_tokens or not request.num_output_tokens, (
        f"{name} goes on at {request.num_tokens} tokens of {entry.max_tokens}"
    )
    assert not num_pending or entry.num_tokens <= entry.max_tokens, f"{name} samples too many"
    num_pages = -(-entry.next_start // pool.page_size)
    assert len(request.pages) == num_pages, f"{name} holds {request.pages}, not {num_pages}"
    num_full_pages = request.num_computed_tokens // pool.page_size
    for index, page in enumerate(request.pages):
        page_hash = pool.page_hash(page)
        if page_hash is not None:
            assert index < num_full_pages, f"{name}: page {page} is published, not computed"
            assert page_hash == request.page_hashes[index], f"{name}: hash of page {page}"
