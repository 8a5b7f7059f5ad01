"""Window pages: the second page group of a model whose branches have keys and values of their own.

Page i of the group holds, of tokens [i * page_size, (i + 1) * page_size), what the sliding window
attends to and the last raw tokens for compression windows that are still open. A row that starts at
token p reads nothing before p - `history_len`, so a request lists pages from there on, and 0, the
null page, for those that it has passed.

Pages are released when a step is scheduled, as soon as no row scheduled from then on reads them;
rows in flight run before that step. A page released full keeps its hash, and can be found until
it is evicted. It may be published before the row in flight that fills it is updated: whoever takes
it runs later. `Scheduler.discard` says what becomes of such a page when that row does not run.
"""

from collections.abc import Sequence

from nsa_serve.page_pool import NULL_PAGE, PagePool
from nsa_serve.request import Request


def history_len(window_size: int, cmp_len: int) -> int:
    """Return how many tokens before its own a query reads: window's and open compression's."""
    return max(window_size, cmp_len) - 1


def num_row_pages(page_size: int, *, history_len: int) -> int:
    """Return the most window pages that a request with one row of one token lists."""
    return -(-(history_len + 1) // page_size) + 2


def num_step_pages(
    page_size: int, *, history_len: int, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """Return the pages, the null page included, with which no scheduled row can lack one.

    A run of n tokens touches at most (n - 2) / page_size + 2 pages, and the rows of a step read
    `history_len` tokens each before those that they add.
    """
    per_request = num_row_pages(page_size, history_len=history_len)
    return -(-max_num_batched_tokens // page_size) + max_num_seqs * per_request + 1


class WindowPages:
    """The window pages of requests, `Request.swa_pages`, and the pool that they come from.

    pool: at least `num_step_pages`; what it has more is for prefix hits. history_len: see the
    function.
    """

    def __init__(self, pool: PagePool, *, history_len: int) -> None:
        self.pool = pool
        self.history_len = history_len

    def first_index(self, position: int) -> int:
        """Return the first page that a row from token `position` on reads."""
        return max(0, position - self.history_len) // self.pool.page_size

    def num_hits(self, hashes: Sequence[bytes]) -> int:
        """Return how many pages a request may skip that found `hashes` among the main pages.

        The most after which every window page that the next row reads is cached, too.
        """
        page_size = self.pool.page_size
        num_hits = index = len(hashes)
        while index > self.first_index(num_hits * page_size):
            index -= 1
            if not self.pool.find_prefix(hashes[index : index + 1]):
                num_hits = index
        return num_hits

    def take(self, request: Request, num_hits: int) -> None:
        """Give a request the pages that `num_hits` found."""
        first = self.first_index(num_hits * self.pool.page_size)
        pages = self.pool.find_prefix(request.page_hashes[first:num_hits])
        assert len(pages) == num_hits - first, f"{request.request_id} takes what is not cached"
        self.pool.take(pages)
        request.swa_pages = [NULL_PAGE] * first + pages

    def grow(self, request: Request, num_pages: int) -> None:
        """Extend a request's list to `num_pages` pages; the pool always has them."""
        count = num_pages - len(request.swa_pages)
        if count > 0:
            pages = self.pool.allocate(count)
            assert pages is not None, f"{request.request_id} found no window page"
            request.swa_pages += pages

    def pass_by(self, request: Request, position: int) -> None:
        """Release the pages that rows from token `position` on do not read."""
        pages = request.swa_pages
        start = stop = self.first_index(position)
        while start and pages[start - 1] != NULL_PAGE:
            start -= 1
        if start == stop:
            return
        passed = pages[start:stop]
        # Hashes stand for known tokens: a page with a pending one is not published.
        for page, page_hash in zip(passed, request.page_hashes[start:stop], strict=False):
            self.pool.register(page, page_hash)
        # First out: a long prompt passes more pages than the pool keeps, and is found again by
        # those that its last page reads, which runs again where it is full.
        page_size = self.pool.page_size
        prompt_end = (len(request.prompt_token_ids) - 1) // page_size * page_size
        split = min(max(start, self.first_index(prompt_end)), stop) - start
        self.pool.release(passed[split:])
        self.pool.release(passed[:split], first_out=True)
        pages[start:stop] = [NULL_PAGE] * len(passed)

    def publish(self, request: Request, *, start: int, stop: int) -> None:
        """Offer pages [start, stop), which were computed, as far as the request still has them."""
        for index in range(start, stop):
            page = request.swa_pages[index]
            if page != NULL_PAGE:
                self.pool.register(page, request.page_hashes[index])

    def release(self, request: Request) -> None:
        """Release all that a request has."""
        self.pool.release([page for page in request.swa_pages if page != NULL_PAGE])
        request.swa_pages = []
