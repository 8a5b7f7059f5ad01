"""The scheduler's invariants: no request lost, no page leaked, no hash that lies."""

from collections import Counter
from collections.abc import Collection, Iterable

from nsa_serve.page_pool import PagePool
from nsa_serve.request import RequestStatus
from nsa_serve.scheduler_queue import Entry, WaitingQueue


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
    held = Counter(page for entry in running for page in entry.request.pages)
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
